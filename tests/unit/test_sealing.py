"""Which steps are sealed in memory: as the page and the slots of a real segment say it."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from resilient.checkpoint.memory import create
from resilient.checkpoint.slot import Slot
from resilient.core.messages import NONE
from resilient.train import sealing
from resilient.train.sealing import AGAIN, AUDIT, CHECKPOINT, NOT_YET, NOTHING, SNAPSHOT, Sealing
from resilient.wire.page import UNCOPIED, Page

BYTES = 1 << 20


class Tier0:
    """What of Tier0 is asked here, over one real slot."""

    payload_bytes = BYTES
    cost_s = 1e-9

    def __init__(self, path: str) -> None:
        self.slot = Slot(path)
        self.kept: list[int] = []
        self.void: set[int] = set()

    def sealed(self, step: int) -> bool:
        return step not in self.void

    def keep(self, step: int) -> None:
        self.kept.append(step)

    def being_read(self) -> bool:
        return self.slot.is_marked()


@pytest.fixture
def page(tmp_path: Path) -> Page:
    return Page(str(tmp_path / "page"), create=True)


@pytest.fixture
def tier0(tmp_path: Path) -> Tier0:
    return Tier0(create(str(tmp_path / "slot"), BYTES))


def wish(sealing: Sealing, step: int, *, rank: int = 0, sharded: bool = True, asked: bool = False) -> int:
    return sealing.wish(step, rank=rank, sharded=sharded, asked=asked)


def test_the_first_step_is_sealed_and_then_as_often_as_it_is_worth_it(page, tier0):
    ours = Sealing(page, tier0, every=None, checkpoint_every=0)
    assert wish(ours, 1) == wish(ours, 1, rank=3) == AGAIN  # nobody knows what the others have
    ours.sealed(1, alike=True)
    time.sleep(1e-4)
    assert wish(ours, 2) == SNAPSHOT  # it costs next to nothing
    assert wish(ours, 2, rank=3) == NOTHING  # which is rank 0's to say
    tier0.cost_s = 3600.0
    for step in range(2, 2 + sealing.COSTS):
        ours.sealed(step, alike=True)
        wish(ours, step)
    assert wish(ours, 9) == NOTHING
    assert wish(ours, 9, asked=True) == CHECKPOINT


def test_one_slow_snapshot_is_not_the_price_of_all(page, tier0):
    ours = Sealing(page, tier0, every=None, checkpoint_every=0)
    ours.sealed(1, alike=True)
    wish(ours, 2)
    tier0.cost_s = 3600.0
    ours.sealed(2, alike=True)
    time.sleep(1e-4)
    assert wish(ours, 3) == SNAPSHOT


def test_replicated_state_is_rank_0s_affair(page, tier0):
    ours = Sealing(page, tier0, every=1, checkpoint_every=0)
    assert wish(ours, 1, sharded=False) == SNAPSHOT
    assert wish(ours, 1, rank=1, sharded=False) == NOTHING
    tier0.cost_s = 3600.0
    ours.sealed(1, alike=True)
    assert wish(ours, 2, sharded=False) == NOTHING  # `every` is for what no other rank holds


def test_fixed_steps(page, tier0):
    ours = Sealing(page, tier0, every=3, checkpoint_every=5)
    assert wish(ours, 1) == AGAIN  # others may not have what this rank has
    ours.sealed(1, alike=True)
    assert [wish(ours, step, rank=2) for step in range(2, 8)] == [NOTHING, SNAPSHOT, NOTHING, SNAPSHOT, SNAPSHOT, NOTHING]


def test_what_lies_nowhere_else_is_not_overwritten_before_it_does(page, tier0):
    ours = Sealing(page, tier0, every=None, checkpoint_every=7)
    ours.sealed(4, alike=True)
    page.set_copied(3)
    assert wish(ours, 5) == wish(ours, 5, rank=1) == wish(ours, 5, asked=True) == NOT_YET
    assert wish(ours, 5, sharded=False, rank=1) == NOTHING
    assert wish(ours, 7) == SNAPSHOT  # all seal it; the gate has waited for the copies
    page.set_copied(4)
    assert wish(ours, 5, asked=True) == CHECKPOINT
    page.set_copied(UNCOPIED)
    assert wish(ours, 5, asked=True) == CHECKPOINT


def test_what_the_agent_reads_is_left_alone_for_a_while(page, tier0, monkeypatch):
    ours = Sealing(page, tier0, every=None, checkpoint_every=0)
    ours.sealed(4, alike=True)
    reader = Slot(tier0.slot.path, writable=False)
    time.sleep(1e-4)
    with reader.marked():
        assert wish(ours, 5) == wish(ours, 5, rank=1) == NOT_YET
        assert wish(ours, 5, sharded=False) == NOTHING
        monkeypatch.setattr(sealing, "NEEDED_S", -1.0)
        assert wish(ours, 5) == SNAPSHOT
    monkeypatch.undo()
    assert wish(ours, 5) == SNAPSHOT


def test_after_a_new_round_all_ranks_are_made_alike(page, tier0):
    ours = Sealing(page, tier0, every=None, checkpoint_every=0)
    tier0.cost_s = 3600.0
    ours.sealed(8, alike=True)
    page.set_copied(NONE)
    ours.placed(5, NONE)
    assert wish(ours, 6, rank=2, asked=True) == AGAIN  # what was sealed at 8 is of a future that will not be: nobody waits for it
    assert ours.passed(AGAIN)
    ours.sealed(6, alike=True)
    page.set_copied(6)
    assert wish(ours, 7, rank=2) == NOTHING
    assert not ours.passed(NOTHING)
    assert tier0.kept == [6]


def test_what_a_broken_vote_may_have_told_others_the_plan_tells(page, tier0):
    ours = Sealing(page, tier0, every=1, checkpoint_every=0)
    ours.told(7)
    ours.placed(8, 8)
    ours.placed(8, NONE)  # there is none that all have: what was known stands
    assert tier0.kept == [7, 8]


def test_what_one_rank_sealed_alone_is_no_common_step(page, tier0):
    ours, other = (Sealing(page, tier0, every=None, checkpoint_every=0) for _ in range(2))
    tier0.cost_s = 3600.0
    for one, alike in ((ours, False), (other, True)):
        one.sealed(6, alike=alike)
    vote = max(wish(ours, 7, rank=1), wish(other, 7, rank=2))
    assert vote == AGAIN
    assert ours.passed(vote)
    assert other.passed(vote)
    assert tier0.kept == []


def test_a_snapshot_that_came_to_nothing_is_made_again(page, tier0):
    ours = Sealing(page, tier0, every=None, checkpoint_every=0)
    tier0.cost_s = 3600.0
    ours.sealed(6, alike=True)
    tier0.void = {6}
    assert wish(ours, 7, rank=2) == AGAIN
    assert wish(ours, 7, rank=2, sharded=False) == NOTHING


@pytest.mark.parametrize(
    ("vote", "seals"), [(NOTHING, False), (SNAPSHOT, True), (AUDIT, True), (CHECKPOINT, True), (NOT_YET, False), (AGAIN, True)]
)
def test_what_a_vote_means(page, tier0, vote, seals):
    assert Sealing(page, tier0, every=None, checkpoint_every=0).passed(vote) is seals


def test_the_gate_waits_for_copies_but_not_for_ever(page, tier0, monkeypatch):
    ours = Sealing(page, tier0, every=1, checkpoint_every=0)
    ours.await_newest(lambda: False)  # there is none
    ours.sealed(4, alike=True)
    page.set_copied(4)
    ours.await_newest(lambda: False)
    page.set_copied(3)
    ours.await_newest(lambda: True)  # the round is broken
    monkeypatch.setattr(sealing, "COPIES_S", 0.01)
    ours.await_newest(lambda: False)


def auditing(page, tier0, *, every_s=0.01, **words) -> Sealing:
    words = {"every": None, "checkpoint_every": 0, **words}
    ours = Sealing(page, tier0, audit_every_s=every_s, **words)
    ours.sealed(1, alike=True)
    ours._audit_s = float("-inf")  # a minute has passed
    time.sleep(1e-4)
    return ours


@pytest.mark.parametrize("sharded", [True, False])
def test_rank_0_names_a_snapshot_that_is_audited(page, tier0, sharded):
    ours = auditing(page, tier0)
    assert ours.wish(2, rank=0, sharded=sharded, asked=False, twins=True) == AUDIT
    assert ours.wish(2, rank=0, sharded=sharded, asked=False) == SNAPSHOT  # nobody holds the same
    assert ours.wish(2, rank=1, sharded=sharded, asked=False, twins=True) == NOTHING
    assert auditing(page, tier0, every_s=0.0).wish(2, rank=0, sharded=sharded, asked=False, twins=True) == SNAPSHOT
    assert ours.passed(AUDIT)
    ours.sealed(2, alike=True)
    assert ours.audit == 2
    time.sleep(1e-4)
    assert ours.wish(3, rank=0, sharded=sharded, asked=False, twins=True) == SNAPSHOT  # it goes into the other slot
    ours.sealed(3, alike=True)
    for rank in (0, 1):  # until the agent has hashed it
        assert ours.wish(4, rank=rank, sharded=sharded, asked=True, twins=True) == NOT_YET
    tier0.void.add(2)
    assert ours.wish(4, rank=0, sharded=sharded, asked=True, twins=True) == CHECKPOINT  # there is nothing to be hashed
    tier0.void.clear()
    page.set_audited(2, 0.001)
    time.sleep(1e-4)
    assert ours.wish(4, rank=0, sharded=sharded, asked=False, twins=True) == SNAPSHOT  # and the next one is not due


def test_what_other_ranks_may_not_have_sealed_is_not_audited(page, tier0):
    ours = auditing(page, tier0)
    ours.passed(AUDIT)
    ours.sealed(2, alike=False)
    assert ours.audit == NONE
    ours.sealed(3, alike=True)
    assert ours.audit == NONE


def test_an_agent_that_does_not_answer_is_not_waited_for_for_ever(page, tier0, monkeypatch):
    ours = auditing(page, tier0)
    ours.passed(AUDIT)
    ours.sealed(2, alike=True)
    ours.sealed(3, alike=True)
    time.sleep(1e-4)
    assert wish(ours, 4, sharded=False) == NOT_YET
    monkeypatch.setattr(sealing, "NEEDED_S", -1.0)
    assert wish(ours, 4, sharded=False) == SNAPSHOT
    monkeypatch.undo()
    ours.placed(3, NONE)
    time.sleep(1e-4)
    assert wish(ours, 4, sharded=False) == SNAPSHOT  # the round is another one


def test_audits_are_as_rare_as_they_are_dear(page, tier0, monkeypatch):
    ours = auditing(page, tier0)
    ours._audit_s = time.monotonic() - 50.0
    page.set_audited(1, 0.2)
    assert ours.wish(2, rank=0, sharded=True, asked=False, twins=True) == AUDIT
    page.set_audited(1, 0.3)
    assert ours.wish(2, rank=0, sharded=True, asked=False, twins=True) == SNAPSHOT
    ours._audit_s = time.monotonic() - sealing.AUDIT_MIN_S / 2
    page.set_audited(1, 0.0)
    assert ours.wish(2, rank=0, sharded=True, asked=False, twins=True) == SNAPSHOT


def test_where_snapshots_are_taken_at_fixed_steps_one_of_them_is_audited(page, tier0):
    ours = auditing(page, tier0, every=2, checkpoint_every=4)
    page.set_copied(UNCOPIED)
    found = [ours.wish(step, rank=0, sharded=True, asked=False, twins=True) for step in (2, 3, 4)]
    assert found == [AUDIT, NOTHING, SNAPSHOT], "what is committed is compared then"
    assert ours.wish(2, rank=1, sharded=True, asked=False, twins=True) == SNAPSHOT
    assert ours.wish(2, rank=0, sharded=True, asked=True, twins=True) == CHECKPOINT


def test_a_gate_waits_only_where_the_audited_snapshot_would_be_overwritten(page, tier0, monkeypatch):
    ours = auditing(page, tier0, every=1)
    ours.passed(AUDIT)
    ours.sealed(2, alike=True)
    ours.await_audit(lambda: False)  # the next one goes into the other slot
    ours.sealed(3, alike=True)
    ours.await_audit(lambda: True)  # the round is broken
    monkeypatch.setattr(sealing, "COPIES_S", 0.01)
    ours.await_audit(lambda: False)
    monkeypatch.undo()
    page.set_audited(2, 0.0)
    ours.await_audit(lambda: False)
