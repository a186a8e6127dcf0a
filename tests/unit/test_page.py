"""The page: what a worker shows of its pace, and what it is asked for."""

from __future__ import annotations

import time

from resilient.core.messages import NONE
from resilient.wire.page import Page


def test_a_new_page_asks_for_nothing_and_shows_no_checkpoint(tmp_path):
    page = Page(str(tmp_path / "page"), create=True)
    assert page.wanted() == NONE
    assert (page.pace(3).rank, page.pace(3).step, page.pace(3).sealed) == (3, NONE, NONE)
    page.close()


def test_the_pace_says_when_a_step_was_complete_not_when_the_record_was_written(tmp_path):
    worker = Page(str(tmp_path / "page"), create=True)
    agent = Page(worker.path)
    before = time.monotonic()
    worker.write(round=1, step=7, phase="clean", torn=False, marks_ns=(0, 0, 0, 0))
    at_s = agent.pace(0).at_s
    assert before <= at_s <= time.monotonic()
    worker.write(round=1, step=7, phase="running", torn=False, marks_ns=(0, 0, 0, 0))
    assert agent.pace(0).at_s == at_s
    restored = time.monotonic_ns()
    worker.write(round=2, step=7, phase="clean", torn=False, marks_ns=(0, 0, restored, 0))
    assert agent.pace(0).at_s == restored / 1e9, "what a recovery took is no step"
    worker.sealed(7, 5_000_000)
    pace = agent.pace(0)
    assert (pace.sealed, pace.stall_s) == (7, 0.005)
    assert pace.sealed_s >= at_s
    agent.want(12)
    assert worker.wanted() == 12
    assert agent.read().step == 7
    worker.close()
    agent.close()
