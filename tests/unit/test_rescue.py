"""The newest step that all ranks have sealed, when it is looked for, and what is said about it."""

from __future__ import annotations

from resilient.core.messages import NONE, Chair
from resilient.core.rescue import Rescue, newest_common


def chair(rank, *snapshots, state="dead"):
    return Chair(rank=rank, local_rank=0, state=state, snapshots=snapshots)


def test_the_newest_that_all_hold():
    assert newest_common({0: chair(0, 5, 6), 1: chair(1, 6, 7)}) == 6
    assert newest_common({0: chair(0, 5, 6), 1: chair(1, 7, 8)}) == NONE
    assert newest_common({0: chair(0, 5, 6), 1: None}) == NONE, "its node is lost"
    assert newest_common({0: chair(0, 0), 1: chair(1, 0)}) == NONE, "nothing was done yet"
    assert newest_common({0: chair(0, 5, 6), 1: chair(1, 5, 6)}, {("memory", 6, 1)}) == 5, "what was refused does not count"


def test_it_is_looked_for_when_all_workers_are_gone():
    rescue = Rescue(["a", "b"], 20.0, 100.0)
    chairs = {0: chair(0, 5, 6), 1: chair(1, 6, 7)}
    rescue.take("a", [chairs[0]])
    rescue.take("b", [chair(1, 6, state="active")])
    assert not rescue.ready(101.0)
    rescue.take("b", [chairs[1]])
    assert rescue.ready(101.0)
    rescue.choose(chairs, {3}, ())
    assert rescue.step == 6
    assert not rescue.over({3}, 102.0)
    assert rescue.over({3, 6}, 102.0)
    assert "step 6 was brought" in rescue.outcome({3, 6}, 0, 2, 20.0)


def test_or_when_half_of_the_time_is_over():
    rescue = Rescue(["a"], 20.0, 100.0)
    assert rescue.deadline() == 109.0
    assert rescue.ready(109.0)
    rescue.choose({0: chair(0, 5, state="active")}, set(), ())
    assert rescue.deadline() == 118.0
    assert rescue.over((), 118.0)
    assert rescue.outcome((), 0, 1, 20.0) == (
        "step 5 did not get from memory to the checkpoint URL within 20 s (--grace-s): files of 0 of 1 ranks were there, "
        "its marker was not; there is no checkpoint"
    )


def test_nothing_newer_ends_it_at_once():
    rescue = Rescue([], 20.0, 100.0)
    rescue.choose({0: chair(0, 5)}, {5}, ())
    assert rescue.over({5}, 100.0)
    assert "nothing newer" in rescue.outcome({5}, 0, 1, 20.0)
