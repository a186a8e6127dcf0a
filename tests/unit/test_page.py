"""The page: what a worker shows of its pace, and what it is asked for."""

from __future__ import annotations

import time

from resilient.core.messages import NONE, Tally, pair_name, pair_of
from resilient.wire.page import GROUP_COUNT, OVERFLOW_SLOT, PAGE_BYTES, STILL_S, Page, group_name


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


def test_groups_are_shown_by_names_that_are_equal_on_all_nodes_once_nothing_moves(tmp_path):
    worker = Page(str(tmp_path / "page"), create=True)
    assert group_name("0-1#0") == 4344026607097218939, "a hash that differs from process to process would be nobody's name"
    worker.name_group(0, group_name("world#0"))
    worker.name_group(OVERFLOW_SLOT, pair_name(3, 2))
    for _ in range(3):
        worker.enter(0)
    worker.leave(0, time.monotonic_ns() - 2_000_000_000)
    worker.enter(OVERFLOW_SLOT)
    assert worker.groups() == (Tally(group_name("world#0"), 3, 1), Tally(pair_name(2, 3), 1, 0))
    assert worker.read().groups == ()
    still = worker.read(time.monotonic_ns() + int((STILL_S + 0.1) * 1e9))
    assert still.groups == worker.groups()
    assert (still.entered, still.completed) == (4, 1)
    assert 2.0 <= still.waited_s < 3.0
    worker.regroup()
    assert [t[1:] if isinstance(t, tuple) else (t.entered, t.completed) for t in worker.groups()] == [(0, 0), (0, 0)]
    assert worker.read().entered == 4
    assert 8 * (64 + 4 * GROUP_COUNT) == PAGE_BYTES
    worker.close()


def test_a_pair_is_named_by_its_ranks():
    for one, other in ((0, 1), (7, 3), (99_999, 12), (0, 0)):
        assert pair_of(pair_name(one, other)) == (min(one, other), max(one, other))
        assert pair_name(one, other) < 0


def test_sections_are_counted_and_a_step_remembers_where_its_collectives_began(tmp_path):
    page = Page(str(tmp_path / "page"), create=True)
    for depth in (1, 2, 1, 0, 1, 0):
        page.section(depth)
    assert page.read().sections == 3
    page.enter(0)
    page.write(round=1, step=4, phase="clean", torn=False, marks_ns=(0, 0, 0, 0))
    page.enter(0)
    page.write(round=1, step=4, phase="voted", torn=False, marks_ns=(0, 0, 0, 0))
    assert (page.read().begun, page.read().entered) == (1, 2)
    page.close()
