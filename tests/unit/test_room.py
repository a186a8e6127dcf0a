"""The limit that is met first is the one that counts, and the one that is named."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from resilient.checkpoint import room

GB = 1 << 30


@pytest.fixture
def machine(tmp_path):
    """Writes the files that a kernel shows below a root; `machine(path=text)` gives that root. The directory asked for is on a tmpfs."""

    def write(fstype="tmpfs", **files: str) -> Path:
        device = os.stat(tmp_path).st_dev
        given = {
            "proc/self/mountinfo": f"25 1 {os.major(device)}:{os.minor(device)} / /somewhere rw,relatime shared:1 - {fstype} tmpfs rw,size=1k\n",
            "proc/meminfo": "MemTotal: 64000000 kB\nMemAvailable: 33554432 kB\nSwapFree: 0 kB\n",
            **{name.replace("__", "/"): text for name, text in files.items()},
        }
        for name, text in given.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)
        return tmp_path

    return write


@pytest.fixture(autouse=True)
def roomy(monkeypatch):
    """The file system has 40 GB."""
    real = os.statvfs("/")
    fields = [4096, 4096, 10 * GB // 4096, 10 * GB // 4096, 40 * GB // 4096, *real[5:10]]
    monkeypatch.setattr(room.os, "statvfs", lambda _: os.statvfs_result(fields))


def group(root: Path, name: str, **files: str) -> None:
    where = root / "sys/fs/cgroup" / name
    where.mkdir(parents=True, exist_ok=True)
    for key, text in files.items():
        (where / key.replace("__", ".")).write_text(text)


def test_a_file_system_larger_than_what_the_machine_has_left(machine):
    found = room.left(machine(), machine())
    assert found.num_bytes == 32 * GB
    assert "this machine's memory" in found.where
    assert "--memory-dir" in found.cure


def test_on_a_disk_only_the_disk_counts(machine):
    root = machine(fstype="ext4")
    assert room.left(root, root)[:2] == (40 * GB, f"in {root}")


def test_the_limit_of_a_container(machine):
    root = machine(proc__self__cgroup="0::/\n")
    stat = f"anon 77\ninactive_file {GB}\nactive_file {GB}\nslab_reclaimable 0\nshmem {GB}\n"
    group(root, "", memory__max=f"{8 * GB}\n", memory__current=f"{5 * GB}\n", memory__stat=stat)
    found = room.left(root, root)
    assert found.num_bytes == 5 * GB
    assert f"limit of {8 * GB} bytes in {root}/sys/fs/cgroup/memory.max" in found.where
    assert "resources.limits.memory" in found.cure


def test_a_limit_further_up_counts_too(machine):
    root = machine(proc__self__cgroup="0::/pods/mine\n")
    group(root, "pods", memory__max=f"{4 * GB}", memory__current=f"{3 * GB}", memory__stat="inactive_file 0\n")
    group(root, "pods/mine", memory__max="max", memory__current=f"{GB}", memory__stat="inactive_file 0\n")
    assert room.left(root, root).num_bytes == GB


def test_the_older_kind_of_cgroup_seen_from_inside(machine):
    root = machine(proc__self__cgroup="4:cpu,cpuacct:/docker/1\n3:memory:/docker/1\n0::/\n")
    stat = f"inactive_file 5\ntotal_inactive_file {GB}\n"
    limits = {"memory__limit_in_bytes": f"{2 * GB}", "memory__usage_in_bytes": f"{2 * GB}", "memory__stat": stat}
    group(root, "memory", **limits)
    assert room.left(root, root).num_bytes == GB


def test_what_cannot_be_read_is_no_limit(machine):
    root = machine(proc__self__cgroup="0::/\n", proc__meminfo="")
    assert room.left(root, root).num_bytes == 40 * GB


def test_this_machine_has_some():
    assert room.left("/dev/shm").num_bytes > 0
    with pytest.raises(FileNotFoundError):
        room.left("/nowhere/at/all", "/nowhere")
