"""The culprit is the rank that did not arrive, not the one that shouts."""

from __future__ import annotations

import msgspec

from resilient.core import culprit
from resilient.core.culprit import Standstill, blame
from resilient.core.messages import Chair, Finding, Record, Tally, pair_name


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
    still.add(stalled(1), chair(1, 6), 11.0)
    assert still.due() == 15.0
    assert still.look([chair(0), chair(1, 6)], 12.0).ranks == (0,)
    assert still.look([chair(0, 7, 7), chair(1, 6)], 13.0).ranks == ()
    assert still.look([chair(0, 7, 7), chair(1, 7, 7)], 14.0).wait
    assert still.due() is None


def test_who_waits_for_a_newcomer_waits_for_good_reason_but_a_culprit_is_named_all_the_same():
    newcomer = Chair(rank=2, local_rank=2, state="joined", worker="w2")
    assert blame([chair(0, 6), chair(1, 6), newcomer], {0, 1}).wait
    assert blame([chair(0, 6), chair(1), newcomer], {0, 1}).ranks == (1,)


def test_where_nobody_waits_nobody_is_to_blame_until_the_patience_of_all_is_over():
    """An evaluation, a compile, a storage that hangs: on all ranks at once."""
    still = Standstill(5.0, alone_s=600.0)
    for rank in range(3):
        still.add(stalled(rank), chair(rank), 10.0)
    chairs = [chair(rank) for rank in range(3)]
    assert still.look(chairs, 40.0).wait
    assert still.look(chairs, 609.0).wait
    assert still.look(chairs, 610.0).ranks == (0, 1, 2)


def test_what_the_others_took_for_the_same_stretch_says_what_it_takes():
    """Rank 0 has evaluated for 20 s and waits; that the others need 30 s is no wonder."""
    first = msgspec.structs.replace(chair(0, 6), pause_s=20.0)
    still = [chair(rank, idle_s=30.0) for rank in (1, 2)]
    assert blame([first, *still], {0, 1, 2}).wait
    still = [chair(rank, idle_s=61.0) for rank in (1, 2)]
    assert blame([first, *still], {0, 1, 2}).ranks == (1, 2)


# --------------------------------------------------------------------------- by the counters of groups

WORLD, LEFT, RIGHT, ROWS = 11, 21, 31, 41


def counted(rank, *tallies, idle_s=9.0, **more):
    """tallies: (group, entered, completed)."""
    groups = tuple(Tally(*t) for t in tallies)
    sums = sum(t.entered for t in groups), sum(t.completed for t in groups)
    record = Record(round=1, step=3, phase="running", entered=sums[0], completed=sums[1], idle_s=idle_s, groups=groups, **more)
    return Chair(rank=rank, local_rank=rank, state="active", worker=f"w{rank}", record=record)


def test_who_has_not_begun_what_the_others_are_in():
    chairs = [counted(rank, (WORLD, 7, 6)) for rank in (0, 2, 3)] + [counted(1, (WORLD, 6, 6))]
    found = blame(chairs, {0, 1, 2, 3})
    assert found.ranks == (1,)
    assert found.why == "did not arrive in operation 7 of the group of ranks 0, 1, 2, 3 that ranks 0, 2, 3 wait in"


def test_a_chain_is_followed_to_its_end():
    """0 and 1 wait for 2 in one group, 2 waits for 3 in another."""
    chairs = [
        counted(0, (WORLD, 5, 4), (LEFT, 2, 2)),
        counted(1, (WORLD, 5, 4), (LEFT, 2, 2)),
        counted(2, (WORLD, 4, 4), (RIGHT, 3, 2)),
        counted(3, (WORLD, 4, 4), (RIGHT, 2, 2)),
    ]
    assert blame(chairs, {0, 1, 2, 3}).ranks == (3,)


def test_tensor_and_data_parallel_groups():
    """Eight ranks, four in each tensor parallel group, pairs of data parallel ones: 5 hangs, its row waits there and the others for the row."""
    chairs = []
    for rank in range(8):
        row, column = (WORLD + 2 + rank // 4), 100 + rank % 4
        if rank == 5:
            chairs.append(counted(rank, (row, 9, 9), (column, 3, 3)))
        elif rank >= 4:
            chairs.append(counted(rank, (row, 10, 9), (column, 3, 3)))
        else:
            chairs.append(counted(rank, (row, 12, 12), (column, 4, 3)))
    assert blame(chairs, set(range(8))).ranks == (5,)


def test_a_pipelines_neighbours():
    """2 sends to 3, who hangs; 1 waits for 2's gradients, 0 for those of 1."""
    p01, p12, p23 = pair_name(0, 1), pair_name(2, 1), pair_name(2, 3)
    chairs = [
        counted(0, (p01, 4, 3)),
        counted(1, (p01, 3, 3), (p12, 4, 3)),
        counted(2, (p12, 3, 3), (p23, 4, 3)),
        counted(3, (p23, 3, 3)),
    ]
    found = blame(chairs, {0, 1, 2, 3})
    assert found.ranks == (3,)
    assert "what ranks 2 and 3 send to each other" in found.why
    never = [counted(2, (p23, 1, 0)), counted(3, (WORLD, 1, 1))]
    assert blame(never, {2, 3}).ranks == (3,), "3 has not sent anything yet"


def test_a_rank_that_began_something_it_does_not_wait_for_is_not_inside():
    """Rank 2 has an operation in flight that is over for the others, and loops."""
    chairs = [counted(rank, (WORLD, 5, 4), (LEFT, 3, 3)) for rank in (0, 1)] + [counted(2, (WORLD, 4, 4), (LEFT, 3, 2))]
    assert blame(chairs, {0, 1, 2}).ranks == (2,)


def test_an_operation_that_all_have_begun_and_nobody_ends_is_nobodys_fault():
    assert not blame([counted(rank, (WORLD, 5, 4)) for rank in range(3)], {0, 1, 2}).ranks
    chairs = [counted(0, (WORLD, 5, 4)), *(counted(rank, (WORLD, 4, 4), (LEFT, 3, 2)) for rank in (1, 2))]
    found = blame(chairs, {0, 1, 2})
    assert not found.ranks
    assert not found.wait


def test_who_is_missed_but_moves_or_has_a_reason_is_waited_for():
    waiting = [counted(rank, (WORLD, 5, 4)) for rank in (0, 1)]
    assert blame([*waiting, counted(2, (WORLD, 4, 4), idle_s=2.0)], {0, 1}).wait
    assert blame([*waiting, counted(2, (WORLD, 4, 4), section=True)], {0, 1}).wait
    moves = Chair(
        rank=2, local_rank=2, state="active", worker="w2", record=Record(round=1, step=3, phase="running", entered=9, completed=9)
    )
    assert blame([*waiting, moves], {0, 1}).wait


def test_a_section_elsewhere_excuses_nobody():
    chairs = [counted(0, (WORLD, 5, 4)), counted(1, (WORLD, 4, 4)), counted(2, (WORLD, 4, 4), section=True)]
    assert blame(chairs, {0, 1}).ranks == (1,)


def test_a_hundred_thousand_ranks_of_which_half_are_missing():
    """The work is bounded: not every one of those who wait is compared with every one of those who are missing."""
    many = [counted(rank, (WORLD, 5, 4)) if rank % 2 else counted(rank, (WORLD, 4, 4)) for rank in range(20_000)]
    assert len(blame(many, set(range(20_000))).ranks) == 64


def test_crossed_orders_are_the_programs_mistake():
    chairs = [counted(0, (LEFT, 3, 2), (RIGHT, 2, 2)), counted(1, (LEFT, 2, 2), (RIGHT, 3, 2))]
    found = blame(chairs, {0, 1})
    assert (found.ranks, found.crossed, found.verdict) == ((0, 1), True, "watch")
    assert "different order" in found.why
    still = Standstill(5.0)
    for rank in (0, 1):
        still.add(stalled(rank), chairs[rank], 10.0)
    assert still.judge(still.look(chairs, 11.0)).verdict == "watch"
    assert still.judge(still.look(chairs, 12.0)).verdict == "halt", "the same step once more"


def test_who_left_one_out_is_told_by_those_who_did_not():
    """Rank 1 has left out an operation of its pair and gone on to the next one of all."""
    chairs = [
        counted(0, (WORLD, 4, 4), (LEFT, 3, 2)),
        counted(1, (WORLD, 5, 4), (LEFT, 2, 2)),
        counted(2, (WORLD, 5, 4), (RIGHT, 3, 3)),
        counted(3, (WORLD, 5, 4), (RIGHT, 3, 3)),
    ]
    found = blame(chairs, {0, 1, 2, 3})
    assert (found.ranks, found.crossed) == ((1,), True)


def test_two_halves_of_a_large_world_that_wait_for_each_other_are_looked_through_once(monkeypatch):
    halves = [counted(rank, (LEFT, 5 + rank % 2, 5), (RIGHT, 6 - rank % 2, 5)) for rank in range(1000)]
    looks = []
    monkeypatch.setattr(culprit, "_reach", lambda rank, edges, real=culprit._reach: looks.append(rank) or real(rank, edges))
    found = blame(halves, set(range(1000)))
    assert found.crossed
    assert len(looks) == 2, "one for each half"
