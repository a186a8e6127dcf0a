"""A replayable iterator gives the same items again, and finds its place on a newcomer."""

from __future__ import annotations

import itertools

import pytest

from resilient.errors import GoneError
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


def test_it_goes_back_two_commits() -> None:
    it = Replayable(itertools.count())
    starts = []
    for _ in range(5):
        starts.append(it.state_dict())
        next(it)
        next(it)
        it.committed()
    it.load_state_dict(starts[3])
    assert [next(it) for _ in range(5)] == [6, 7, 8, 9, 10]


def test_further_back_a_list_begins_again_and_a_generator_cannot() -> None:
    for source in (list(range(20)), iter(range(20))):
        it = Replayable(source)
        for _ in range(6):
            next(it)
            it.committed()
        if isinstance(source, list):
            it.load_state_dict({"taken": 1})
            assert [next(it), next(it)] == [1, 2]
        else:
            with pytest.raises(GoneError, match="item 1 is wanted, the first one kept is 4"):
                it.load_state_dict({"taken": 1})


def test_more_than_there_is_is_refused() -> None:
    with pytest.raises(ValueError, match="9 items expected, the iterator ended after 3"):
        Replayable(range(3)).load_state_dict({"taken": 9})
