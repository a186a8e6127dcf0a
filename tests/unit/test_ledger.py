"""The table of who gets state from where: one test per row."""

from __future__ import annotations

import msgspec
import pytest

from resilient.core.ledger import Account, Copy, best_copy, choose, claim
from resilient.core.messages import NONE, Plan, Record


def rank(number, step=None, phase="running", *, own=(), gate=NONE, snapshots=(), torn=False, replicated=True, finished=False, node="n0"):
    record = Record(round=1, step=step, phase=phase, torn=torn) if step is not None else None
    copies = (Copy(node=node, seated=True, own_steps=tuple(own), gate_step=gate, snapshots=tuple(snapshots)),) if own or snapshots else ()
    return Account(rank=number, record=record, replicated=replicated, finished=finished, copies=copies)


@pytest.mark.parametrize(("phase", "held"), [("clean", 5), ("running", 5), ("voted", 5), ("committing", 6), ("done", 5)])
def test_claims(phase, held):
    assert claim(Record(step=5, phase=phase)) == held


def test_a_replicated_newcomer_takes_live_state():
    choice = choose([rank(0, 5), rank(1, own=[4, 5])], ())
    assert choice.plan == Plan(step=5, tier="live", receivers=(1,), sources=(0,))
    assert choice.lost == 0


def test_those_who_voted_are_told_to_commit_when_somebody_did():
    choice = choose([rank(0, 5, "voted"), rank(1, 5, "committing"), rank(2, own=[5], gate=6)], ())
    assert choice.plan == Plan(step=6, tier="live", receivers=(2,), sources=(1,), repeat=(2,))


def test_all_voted_and_nobody_heard_replays_even_if_the_dead_one_had_gone_on():
    choice = choose([rank(0, 5, "voted"), rank(1, 5, "voted"), rank(2, own=[5, 6], gate=6)], ())
    assert choice.plan == Plan(step=5, tier="live", receivers=(2,), sources=(0, 1))


def test_nobody_needs_anything():
    assert choose([rank(0, 5), rank(1, 5, "voted")], ()).plan == Plan(step=5)


def test_a_torn_survivor_receives_and_does_not_give():
    choice = choose([rank(0, 5, torn=True), rank(1, 5), rank(2, own=[5])], ())
    assert choice.plan == Plan(step=5, tier="live", receivers=(0, 2), sources=(1,))


def test_all_torn_takes_snapshots():
    accounts = [rank(n, 5, torn=True, snapshots=[4, 5]) for n in range(2)]
    assert choose(accounts, ()).plan == Plan(step=5, tier="memory", receivers=(0, 1), kept=5)


def test_a_shard_takes_its_own_snapshot():
    accounts = [rank(0, 5, replicated=False), rank(1, replicated=False, own=[5], snapshots=[4, 5])]
    assert choose(accounts, ()).plan == Plan(step=5, tier="memory", receivers=(1,))


def test_a_shard_whose_newest_snapshot_is_missing_takes_all_back():
    accounts = [rank(0, 5, "committing", replicated=False, snapshots=[4, 5]), rank(1, replicated=False, own=[5], snapshots=[4, 5])]
    choice = choose(accounts, ())
    assert choice.plan == Plan(step=5, tier="memory", receivers=(0, 1), kept=5)
    assert choice.lost == 0, "a step that one rank never completed is replayed, not lost"


def test_shards_keep_the_newest_step_that_all_have_a_snapshot_of():
    """One of them may not have heard the vote by which the others know it."""
    ranks = [rank(0, 6, replicated=False, snapshots=[5, 6]), rank(1, 5, "committing", replicated=False, snapshots=[4, 5])]
    assert choose(ranks, ()).plan == Plan(step=6, kept=5)
    assert choose(ranks, (), {("memory", 5, 1)}).plan == Plan(step=6), "there is none"
    ranks[1] = rank(1, 6, replicated=False, snapshots=[5, 6])
    assert choose(ranks, ()).plan == Plan(step=6, kept=6)
    moved = msgspec.structs.replace(rank(1, replicated=False), copies=(Copy(node="n1", snapshots=(5, 6)),))
    assert choose([ranks[0], moved], ()).plan == Plan(step=6, tier="memory", receivers=(1,), kept=6), "it is brought that one alone"


def test_the_persistent_tier_is_next_and_refused_ones_are_skipped():
    accounts = [rank(0, 55, replicated=False), rank(1, replicated=False)]
    assert choose(accounts, {40, 50}).plan == Plan(step=50, tier="persistent", receivers=(0, 1), kept=50)
    choice = choose(accounts, {40, 50}, {("persistent", 50, 1)})
    assert (choice.plan.step, choice.lost) == (40, 15)


def test_memory_wins_over_an_older_checkpoint_and_loses_to_a_newer_one():
    accounts = [rank(n, replicated=False, snapshots=[30]) for n in range(2)]
    assert choose(accounts, {20}).plan.tier == "memory"
    assert choose(accounts, {40}).plan.tier == "persistent"


def test_nothing_was_ever_committed_starts_again_and_says_so():
    choice = choose([rank(0, 5, replicated=False), rank(1, replicated=False)], ())
    assert choice.fresh
    assert (choice.plan.step, choice.lost, choice.error) == (NONE, 5, "")


def test_all_checkpoints_refused_is_an_error_and_no_fresh_start():
    choice = choose([rank(0), rank(1)], {10, 20}, {("persistent", 10, 0), ("persistent", 20, 1)})
    assert "10, 20" in choice.error
    assert not choice.fresh


def test_a_refused_copy_is_never_chosen_again():
    accounts = [rank(0, 5, replicated=False, snapshots=[4, 5]), rank(1, replicated=False, snapshots=[4, 5])]
    choice = choose(accounts, (), {("memory", 5, 1)})
    assert choice.plan == Plan(step=4, tier="memory", receivers=(0, 1), kept=4)
    assert choose([rank(0, 5), rank(1, own=[5], snapshots=[5])], (), {("live", 5, 1)}).plan.tier == "memory"


def test_after_the_loop_a_newcomer_finishes_alone_from_its_snapshot():
    accounts = [rank(0, 9, "done", finished=True), rank(1, own=[9], snapshots=[9])]
    assert choose(accounts, ()).plan == Plan(step=9, tier="memory", receivers=(1,), over=True)
    survivors = [rank(0, 9, "done"), rank(1, 9, "clean"), rank(2, own=[9], snapshots=[9])]
    assert choose(survivors, ()).plan == Plan(step=9, tier="memory", receivers=(2,), over=True)


def test_replicated_state_is_lent_where_nobody_can_give_it_any_more():
    accounts = [rank(0, 9, "done", finished=True, own=[9], snapshots=[9]), rank(1, own=[9], node="n1"), rank(2, own=[9])]
    plan = choose(accounts, ()).plan
    assert plan == Plan(step=9, tier="memory", receivers=(1, 2), lender=0, over=True)
    assert best_copy(accounts[1], plan, "n0").node == "n1", "its own state alone is what it needs of its own"
    assert choose([*accounts[:2], rank(2)], ()).fresh, "without an own state there is nothing to go on from"
    assert choose([rank(0, 9, "done", snapshots=[9], replicated=False), rank(1, own=[9], replicated=False)], ()).fresh


def test_the_nearest_copy_is_the_best():
    account = Account(
        rank=1, copies=(Copy(node="n2", snapshots=(5,)), Copy(node="n1", snapshots=(5,)), Copy(node="n3", seated=True, snapshots=(4,)))
    )
    plan = Plan(step=5, tier="memory", receivers=(1,))
    assert best_copy(account, plan, "n9").node == "n1"
    assert best_copy(account, plan, "n2").node == "n2"
    assert best_copy(account, Plan(step=6, tier="memory"), "n2") is None


def test_who_is_doubted_gives_nothing_while_somebody_else_can():
    doubted = msgspec.structs.replace(rank(0, 5), doubted=True)
    assert choose([doubted, rank(1, 5), rank(2, own=[5])], ()).plan.sources == (1,)
    assert choose([doubted, rank(2, own=[5])], ()).plan.sources == (0,)
    ahead = msgspec.structs.replace(rank(0, 5, "committing"), doubted=True)
    assert choose([ahead, rank(1, 5, "voted"), rank(2, own=[5], gate=6)], ()).plan.sources == (1,), (
        "who waits for the word will hold it too"
    )


def test_who_is_doubted_lends_nothing_while_somebody_else_can():
    over = [rank(n, 5, "done", own=[5], snapshots=[5], finished=True) for n in range(2)]
    over[0] = msgspec.structs.replace(over[0], doubted=True)
    newcomer = rank(2, own=[5])
    assert choose([*over, newcomer], ()).plan.lender == 1
    assert choose([over[0], newcomer], ()).plan.lender == 0
