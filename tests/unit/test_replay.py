"""A replayable iterator gives the same items again, and finds its place on a newcomer."""

from __future__ import annotations

import itertools

import pytest

from resilient.train.replay import Replayable


def test_items_since_the_commit_come_again() -> None:
    it = Replayable(itertools.count())
    assert [next(it), next(it)] == [0, 1]
    it.committed()
    start = it.state_dict()
    assert [next(it), next(it)] == [2, 3]
    it.load_state_dict(start)
    assert [next(it), next(it), next(it)] == [2, 3, 4]


def test_a_fresh_one_is_brought_forward() -> None:
    it = Replayable(range(10))
    it.load_state_dict({"taken": 7})
    assert next(it) == 7


def test_one_that_ran_ahead_in_its_warm_up_goes_back() -> None:
    it = Replayable(range(10))
    assert [next(it) for _ in range(4)] == [0, 1, 2, 3]
    it.load_state_dict({"taken": 1})
    assert next(it) == 1


def test_what_was_let_go_or_never_was_is_refused() -> None:
    it = Replayable(range(3))
    next(it)
    it.committed()
    with pytest.raises(ValueError, match="item 0 was let go, the first one kept is 1"):
        it.load_state_dict({"taken": 0})
    with pytest.raises(ValueError, match="9 items expected, the iterator ended after 3"):
        it.load_state_dict({"taken": 9})
