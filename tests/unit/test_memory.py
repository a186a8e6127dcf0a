"""Segments: really allocated, named by their owner, removed when that is gone."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from resilient.checkpoint import memory, room
from resilient.checkpoint.chest import Chest
from resilient.errors import TierUnavailable

OWNER = """
import sys
from resilient.checkpoint import memory, room
from resilient.checkpoint.chest import Chest
key = memory.new_key()
for what in ("page.n0.1", "rank-0.own"):
    memory.create(memory.segment_path(sys.argv[1], key, what), 4096)
claim = memory.Claim(sys.argv[1], key) if "claim" in sys.argv else None
print(key, flush=True)
sys.stdin.read()
"""


@pytest.fixture
def owner(tmp_path):
    """A process that owns segments in tmp_path; `owner(...)` gives (process, key)."""
    started = []

    def start(*words: str):
        process = subprocess.Popen(
            [sys.executable, "-c", OWNER, str(tmp_path), *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        started.append(process)
        return process, process.stdout.readline().strip()

    yield start
    for process in started:
        process.kill()
        process.communicate()


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_every_byte_of_a_segment_is_there(tmp_path):
    path = memory.create(memory.segment_path(tmp_path, memory.new_key(), "rank-0.own"), 1 << 20)
    found = os.stat(path)
    assert (found.st_size, found.st_blocks * 512 >= 1 << 20, found.st_mode & 0o777) == (1 << 20, True, 0o600)
    assert Path(path).name.startswith(f"resilient.{os.getpid()}-")
    with pytest.raises(TierUnavailable, match="File exists"):
        memory.create(path, 4096)
    memory.remove(path)
    memory.remove(path)
    assert names(tmp_path) == []


def test_all_of_one_owner_are_removed(tmp_path):
    mine, other = memory.new_key(), "1-1-abcd"
    for key in (mine, other):
        memory.create(memory.segment_path(tmp_path, key, "a"), 4096)
    memory.remove_all(tmp_path, mine)
    assert names(tmp_path) == [f"resilient.{other}.a"]


def test_the_living_keep_what_is_theirs(tmp_path, owner):
    process, key = owner()
    assert memory.clean_stale(tmp_path) == []
    process.send_signal(signal.SIGKILL)
    process.wait()
    (tmp_path / "resilient.notes.txt").touch()  # not a segment
    (tmp_path / "somebody-else").touch()
    removed = memory.clean_stale(tmp_path)
    assert [Path(path).name for path in removed] == [f"resilient.{key}.page.n0.1", f"resilient.{key}.rank-0.own"]
    assert names(tmp_path) == ["resilient.notes.txt", "somebody-else"]


def test_a_zombie_is_dead(tmp_path, owner):
    process, _ = owner()
    process.send_signal(signal.SIGKILL)
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # dead, but not reaped
    assert len(memory.clean_stale(tmp_path)) == 2


def test_a_pid_that_was_given_again_is_not_the_owner(tmp_path, owner):
    _, key = owner()
    pid, start, salt = key.split("-")
    earlier = f"{pid}-{int(start) - 1}-{salt}"
    memory.create(memory.segment_path(tmp_path, earlier, "rank-1.own"), 4096)
    assert [Path(path).name for path in memory.clean_stale(tmp_path)] == [f"resilient.{earlier}.rank-1.own"]


def test_an_owner_whose_pid_cannot_be_seen_holds_a_lock(tmp_path, owner):
    """Another container that shares the directory: its pids mean nothing here."""
    process, key = owner("claim")
    hidden = f"999999999-1-{key[-4:]}"
    for path in list(tmp_path.iterdir()):
        path.rename(tmp_path / path.name.replace(key, hidden))
    assert memory.clean_stale(tmp_path) == []
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert len(memory.clean_stale(tmp_path)) == 3
    assert names(tmp_path) == []


def test_a_claim_ends_with_its_release(tmp_path):
    claim = memory.Claim(tmp_path, memory.new_key())
    claim.release()
    claim.release()
    assert names(tmp_path) == []


@pytest.fixture
def small(request):
    """A file system of 4 MiB in memory."""
    directory = tempfile.mkdtemp()
    if (
        os.geteuid() != 0
        or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", directory], capture_output=True, check=False).returncode
    ):
        shutil.rmtree(directory)
        pytest.skip("mounting a small tmpfs needs root and CAP_SYS_ADMIN")
    yield Path(directory)
    subprocess.run(["umount", "-l", directory], check=True)
    shutil.rmtree(directory)


def test_a_full_file_system_is_a_clear_error(small):
    memory.create(memory.segment_path(small, "1-1-0000", "a"), 2 << 20)
    with pytest.raises(TierUnavailable, match=r"3145728 bytes wanted, 2097152 free .*rank-0\.slot-0.*--memory-dir DIR"):
        memory.create(memory.segment_path(small, "1-1-0000", "rank-0.slot-0"), 3 << 20)
    assert names(small) == ["resilient.1-1-0000.a"]


def test_room_that_is_taken_between_question_and_allocation(small, monkeypatch):
    found = room.left(small)
    rooms = iter([found._replace(num_bytes=1 << 40)] * 2)
    monkeypatch.setattr(memory.room, "left", lambda directory: next(rooms, found))
    with pytest.raises(TierUnavailable, match="5242880 bytes wanted, 4194304 free"):
        memory.create(memory.segment_path(small, "1-1-0000", "a"), 5 << 20)
    assert names(small) == []


def test_room_that_is_taken_while_a_segment_grows(small, monkeypatch):
    monkeypatch.setattr(memory, "_PIECE", 1 << 20)
    found, asked = room.left(small), []

    def shrinking(directory):
        asked.append(directory)
        return found._replace(num_bytes=(3 << 20) + 4096 - ((2 << 20) if len(asked) > 2 else 0))

    monkeypatch.setattr(memory.room, "left", shrinking)
    with pytest.raises(TierUnavailable, match="2097152 bytes wanted, 2101248 free"):
        memory.create(memory.segment_path(small, "1-1-0000", "a"), 2 << 20)
    assert names(small) == []


def test_two_slots_are_asked_for_together(small):
    chest = Chest(small, "1-1-0000", 0)
    with pytest.raises(TierUnavailable, match=r"4194304 bytes wanted, 4194304 free in .*rank-0\.slot-0.*--memory-dir DIR"):
        chest.grow_snapshots(2 << 20)
    assert names(small) == []
    assert len(chest.grow_snapshots(1 << 20).slots) == 2


def test_a_directory_that_is_not_there():
    with pytest.raises(TierUnavailable, match=r"No such file or directory.*--memory-dir"):
        memory.create("/nowhere/at/all/resilient.1-1-0000.a", 4096)
