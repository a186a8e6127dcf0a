"""Kernel log: heads of records, who wrote them, when; and a file or FIFO in the place of /dev/kmsg."""

from __future__ import annotations

import os
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from resilient_agents.probe import Absent, Surroundings
from resilient_agents.probes.kernel_log import KernelLog, Line, parse

LOST = "NVRM: Xid (PCI:0000:3b:00): 79, pid='<unknown>', name=<unknown>, GPU has fallen off the bus."


def test_a_record_has_a_head_and_what_follows_the_first_line_is_its_dictionary():
    assert parse(f"4,1201,5140900,-;{LOST}\n SUBSYSTEM=pci\n DEVICE=+pci:0000:3b:00.0\n".encode()) == Line(LOST, "kmsg", 5.1409)


def test_what_a_program_wrote_is_not_the_kernels():
    assert parse(f"12,1201,5140900,-;{LOST}\n".encode()).stream == "syslog"


@pytest.mark.parametrize("record", [b"", b"\n", b"6,1,2,-;\n", b"   "])
def test_nothing_is_nothing(record):
    assert parse(record) is None


def test_a_plain_line_is_taken_as_it_is():
    assert parse(LOST.encode()) == Line(LOST, "kmsg")


@given(st.binary(max_size=400))
def test_any_bytes_are_a_line_or_nothing(record):
    line = parse(record)
    assert line is None or (line.text and line.stream in ("kmsg", "syslog"))


@pytest.fixture
def root(tmp_path):
    (tmp_path / "dev").mkdir()
    return tmp_path


def test_what_was_said_before_is_not_news(root):
    (root / "dev/kmsg").write_text(f"4,1,1,-;{LOST}\n")
    probe = KernelLog(Surroundings(root=str(root)))
    with (root / "dev/kmsg").open("a") as file:
        file.write(f"4,2,2,-;{LOST.replace('3b', '5e')}\n6,3,3,-;unfinished")
    (found,) = probe.check(time.monotonic())
    assert (found.kind, found.code, found.device, found.probe) == ("xid", "79", "pci:0000:5e:00", "kernel-log")


def test_what_came_after_a_prober_was_lost_is_news(root):
    (root / "dev/kmsg").write_text(f"4,1,1000000,-;{LOST}\n4,2,3000000,-;{LOST.replace('3b', '5e')}\n")
    (found,) = KernelLog(Surroundings(root=str(root), since=2.0)).check(time.monotonic())
    assert found.device == "pci:0000:5e:00"


def test_who_looks_once_is_told_what_has_happened_and_is_not_over(root):
    def at(seconds: float, text: str) -> str:
        return f"4,1,{int(seconds * 1e6)},-;{text}\n"

    down, up = "mlx5_core 0000:18:00.0 mlx5_2: Port: 1 Link DOWN", "mlx5_core 0000:18:00.0 mlx5_2: Port: 1 Link ACTIVE"
    lines = [at(100, LOST), at(3000, LOST.replace("3b", "5e")), at(3001, LOST.replace("3b", "5e")), at(3002, "usb 1-1: new device")]
    lines += [at(4000, down), at(4001, down.replace("mlx5_2", "mlx5_3")), at(4100, up)]
    (root / "dev/kmsg").write_text("".join([*lines, at(10000, "the newest line")]))
    probe = KernelLog(Surroundings(root=str(root), lookback_s=7200.0))
    found = probe.check(time.monotonic())
    assert [(it.kind, it.device, it.count) for it in found] == [("xid", "pci:0000:5e:00", 2), ("ib-link", "dev:mlx5_3", 1)]
    assert [it.text.rpartition(" (")[2] for it in found] == ["117 min ago)", "100 min ago)"]
    with (root / "dev/kmsg").open("a") as file:
        file.write(at(10001, LOST))
    assert [it.device for it in probe.check(time.monotonic())] == ["pci:0000:3b:00"], "and then it goes on as usual"


def test_a_fifo_may_be_written_by_one_after_another(root):
    os.mkfifo(root / "dev/kmsg")
    probe = KernelLog(Surroundings(root=str(root)))
    for bus in ("3b", "5e"):
        with (root / "dev/kmsg").open("w") as file:
            file.write(f"4,2,2,-;{LOST.replace('3b', bus)}\n")
        assert [found.device for found in probe.check(time.monotonic())] == [f"pci:0000:{bus}:00"]


def test_a_tree_without_a_log_has_none(tmp_path):
    with pytest.raises(Absent):
        KernelLog(Surroundings(root=str(tmp_path)))


class Closed(Surroundings):
    """This machine, with a kernel log that is closed to us."""

    def path(self, absolute: str) -> str:
        return "/nowhere" + absolute


@pytest.fixture
def journalctl(tmp_path, monkeypatch):
    """A journal that says one line, each time that it is asked, and then stays or ends."""

    def write(then: str) -> None:
        program = tmp_path / "journalctl"
        program.write_text(f"#!/bin/sh\necho '{LOST.replace(chr(39), '')}'\n{then}\n")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    return write


def test_where_the_log_is_closed_the_journal_is_the_source_and_ends_with_us(journalctl):
    journalctl("exec sleep 60")
    probe = KernelLog(Closed())
    assert probe.note.startswith("journalctl (/nowhere/dev/kmsg: ")
    (found,) = probe.check(time.monotonic())
    assert (found.kind, found.device) == ("xid", "pci:0000:3b:00")
    probe._child.kill()
    probe._child.wait()
    probe._child.stdout.close()


def test_the_journal_is_asked_for_what_has_happened(journalctl):
    journalctl('case "$*" in *--since=-7200s*) exit 0;; esac; exec sleep 60')
    probe = KernelLog(Closed(lookback_s=7200.0))
    assert [it.device for it in probe.check(time.monotonic())] == ["pci:0000:3b:00"]
    probe._child.kill()
    probe._child.wait()
    probe._child.stdout.close()


def test_a_journal_that_ends_is_asked_again(journalctl):
    journalctl("exit 3")
    probe = KernelLog(Closed())
    for _ in range(2):
        assert len(probe.check(time.monotonic())) == 1
        with pytest.raises(RuntimeError, match="exit code 3"):
            probe.check(time.monotonic())
    probe._child.wait()
    probe._child.stdout.close()


def test_where_there_is_no_journal_either_there_is_nothing(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(Absent, match="no journalctl"):
        KernelLog(Closed())
