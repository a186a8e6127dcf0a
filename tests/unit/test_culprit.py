"""The culprit is the rank that did not arrive, not the one that shouts."""

from __future__ import annotations

from resilient.core.culprit import Standstill, blame
from resilient.core.messages import Chair, Finding, Record


def chair(rank, entered=5, completed=5, **more):
    record = Record(round=1, step=3, phase="running", entered=entered, completed=completed, **more)
    return Chair(rank=rank, local_rank=rank, state="active", worker=f"w{rank}", record=record)


def stalled(rank):
    return Finding(seq=1, kind="stalled", rank=rank, worker=f"w{rank}")


def test_who_is_outside_is_to_blame():
    assert blame([chair(0, 6), chair(1), chair(2, 6)], {0, 1, 2}).ranks == (1,)


def test_who_waits_for_a_section_waits_for_good_reason():
    assert blame([chair(0, 6), chair(1, section=True)], {0}).wait


def test_all_inside_is_nobodys_fault_yet():
    found = blame([chair(0, 6), chair(1, 6)], {0, 1})
    assert not found.ranks
    assert not found.wait


def test_a_standstill_forgets_who_has_moved():
    still = Standstill(5.0)
    still.add(stalled(0), chair(0), 10.0)
    still.add(stalled(1), chair(1), 11.0)
    assert still.due() == 15.0
    assert still.look([chair(0), chair(1, 6, 6)]).ranks == (0,)
    assert still.look([chair(0, 7, 7)]).wait
    assert still.due() is None


def test_who_waits_for_a_newcomer_waits_for_good_reason_but_a_culprit_is_named_all_the_same():
    newcomer = Chair(rank=2, local_rank=2, state="joined", worker="w2")
    assert blame([chair(0, 6), chair(1, 6), newcomer], {0, 1}).wait
    assert blame([chair(0, 6), chair(1), newcomer], {0, 1}).ranks == (1,)
