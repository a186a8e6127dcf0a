"""Worker log: who said it, tracebacks as one block, streams that grow, end, are too fast or no text at all."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from resilient_agents.probe import Roster, Surroundings, Watched
from resilient_agents.probes import worker_log
from resilient_agents.probes.worker_log import AFTER, Blocks, WorkerLog

TRACEBACK = ["Traceback (most recent call last):", '  File "train.py", line 3, in <module>', "    step()", "ValueError: no such thing"]
NCCL = "[rank3]:[E1122 ProcessGroupNCCL.cpp:2057] [PG ID 0 PG GUID 0 Rank 3] Process group watchdog thread terminated with exception: NCCL error: remote process exited or there was a network error"


def test_a_traceback_is_one_block_with_its_message():
    blocks = Blocks()
    lines = ["before", *TRACEBACK, *[f"more {i}" for i in range(AFTER - 1)], "after"]
    found = [block for line in lines for block in blocks.feed(line)]
    assert found[0] == "before" and found[1].splitlines() == lines[1:-1] and found[2] == "after"


def test_chained_tracebacks_stay_together_and_prefixes_do_not_matter():
    blocks = Blocks()
    lines = [
        f"[rank1]: {line}"
        for line in [*TRACEBACK, "", "During handling of the above exception, another exception occurred:", "", *TRACEBACK]
    ]
    assert [block for line in lines for block in blocks.feed(line)] == []
    assert blocks.flush() == ["\n".join(lines)]


@given(st.lists(st.sampled_from([*TRACEBACK, "", "x", "[rank0]: y", "  z"]), max_size=200))
def test_no_line_is_lost_and_none_comes_twice(lines):
    blocks = Blocks()
    found = [block for line in lines for block in blocks.feed(line)] + blocks.flush()
    assert [line for block in found for line in block.split("\n")] == lines


class Stage:
    def __init__(self, where) -> None:
        self.where = where
        self.roster = Roster()

    def worker(self, name: str, rank: int, *, alive: bool = True) -> None:
        watched = Watched(
            worker=name, rank=rank, pid=7, stdout=str(self.where / f"{name}.out"), stderr=str(self.where / f"{name}.err"), alive=alive
        )
        self.roster = Roster(workers=(*(w for w in self.roster.workers if w.worker != name), watched))

    def write(self, name: str, text: str | bytes, stream: str = "err") -> None:
        with (self.where / f"{name}.{stream}").open("ab") as file:
            file.write(text if isinstance(text, bytes) else text.encode())

    def probe(self) -> WorkerLog:
        return WorkerLog(Surroundings(roster=lambda: self.roster))


@pytest.fixture
def stage(tmp_path):
    return Stage(tmp_path)


def test_a_finding_knows_who_said_it(stage):
    probe = stage.probe()
    stage.worker("w1", 3)
    assert probe.check(0.0) == []  # its files are not there yet
    stage.write("w1", f"step 1\n{NCCL}\nstep 2\n")
    (found,) = probe.check(1.0)
    assert (found.rank, found.worker, found.pid, found.probe, found.layer) == (3, "w1", 7, "worker-log", "nccl")
    assert probe.check(2.0) == []


def test_what_was_written_before_is_not_news_but_a_later_worker_is_read_from_its_beginning(stage):
    stage.worker("old", 0)
    stage.write("old", NCCL + "\n")
    probe = stage.probe()
    stage.worker("new", 1)
    stage.write("new", NCCL + "\n")
    assert [found.rank for found in probe.check(0.0)] == [1]


def test_a_successor_goes_on_where_its_predecessor_was_lost(stage):
    stage.worker("w", 0)
    stage.write("w", NCCL + "\n")
    size = (stage.where / "w.err").stat().st_size
    stage.write("w", NCCL.replace("remote process exited", "unhandled system error") + "\n")
    probe = WorkerLog(Surroundings(roster=lambda: stage.roster, since=1.0, read={str(stage.where / "w.err"): size}))
    assert len(probe.check(0.0)) == 1


def test_a_line_may_come_in_pieces_and_the_last_one_without_an_end(stage):
    probe = stage.probe()
    stage.worker("w", 0)
    stage.write("w", NCCL[:90])
    assert probe.check(0.0) == []
    stage.write("w", NCCL[90:])
    assert probe.check(1.0) == []
    stage.worker("w", 0, alive=False)
    assert len(probe.check(2.0)) == 1
    assert probe.check(3.0) == []


def test_a_traceback_waits_for_its_exception(stage):
    probe = stage.probe()
    stage.worker("w", 0)
    stage.write("w", "\n".join(TRACEBACK[:2]) + "\n")
    assert probe.check(0.0) == []
    stage.write("w", "\n".join(TRACEBACK[2:]) + "\n")
    found = [*probe.check(1.0), *probe.check(2.0)]
    assert [f.class_ for f in found] == ["user"]


def test_what_is_too_fast_loses_its_middle_and_says_so(stage, monkeypatch):
    monkeypatch.setattr(worker_log, "BEHIND_BYTES_MAX", 1 << 16)
    monkeypatch.setattr(worker_log, "LOOK_BYTES_MAX", 1 << 12)
    probe = stage.probe()
    stage.worker("w", 0)
    stage.write("w", "x" * 99 + "\n")
    probe.check(0.0)
    stage.write("w", ("x" * 99 + "\n") * 2000 + NCCL + "\n")
    assert [found.kind for found in probe.check(1.0)][-1] == "log-skipped"


@given(st.lists(st.binary(max_size=300), max_size=20))
def test_any_bytes_may_come(tmp_path_factory, pieces):
    stage = Stage(tmp_path_factory.mktemp("any"))
    probe = stage.probe()
    stage.worker("w", 0)
    for piece in pieces:
        stage.write("w", piece)
        probe.check(0.0)
    stage.worker("w", 0, alive=False)
    probe.check(1.0)


def test_the_last_words_of_a_worker_that_is_forgotten_at_once_are_read(stage):
    """A killed worker is dead, replaced and forgotten within less than one look."""
    probe = stage.probe()
    stage.worker("w", 1)
    assert probe.check(0.0) == []
    stage.write("w", NCCL)
    stage.roster = Roster()
    found = [*probe.check(1.0), *probe.check(2.0), *probe.check(3.0)]
    assert [(f.worker, f.rank) for f in found] == [("w", 1)]


def test_a_worker_that_is_forgotten_leaves_nothing_open(stage):
    import os

    probe = stage.probe()
    stage.worker("w", 0)
    stage.write("w", "x\n")
    before = len(os.listdir("/proc/self/fd"))
    probe.check(0.0)
    stage.roster = Roster()
    probe.check(1.0)
    probe.check(2.0)
    assert len(os.listdir("/proc/self/fd")) == before
