"""The comparison of replicas, as the coordinator sees it; and what a sheet is."""

from __future__ import annotations

import msgspec
import pytest

from resilient.checkpoint import replicas
from resilient.checkpoint.layout import Layout, Row, Twins
from resilient.checkpoint.replicas import Difference, Held
from resilient.core import audits
from resilient.core.audits import Audits
from resilient.core.messages import NONE, Audit, Compared, Plan, Report, Sum
from resilient.core.messages import Difference as Told
from resilient.errors import SnapshotCorrupt

WORLD = 6


class House:
    """Three nodes of two ranks; all ranks are twins of each other, unless said otherwise."""

    def __init__(self, world=WORLD, twins=None):
        self.audits, self.now, self.world = Audits(), 0.0, world
        self.twins = twins or (lambda rank: (0, world, 1))
        self.last: dict[str, Report] = {}
        self.audits.seated(1, Plan())

    def tell(self, node, step, digests=("a", "a"), *, round=1, ranks=None, after=1.0):
        ranks = ranks or (2 * node, 2 * node + 1)
        sums = tuple(Sum(twins=self.twins(rank), digest=digest, ranks=(rank,)) for rank, digest in zip(ranks, digests, strict=True))
        return self.say(node, audit=Audit(step=step, round=round, sums=sums), after=after)

    def say(self, node, after=0.0, **facts):
        self.now += after
        before = self.last.get(f"n{node}")
        self.last[f"n{node}"] = report = Report(run="r", node=f"n{node}", boot=1, seq=0, host=f"n{node}", data_port=7, **facts)
        return self.audits.take(report, before, self.world, self.now, leads=node == 0)

    def audit(self, step, odd=None, **facts):
        for node in range(self.world // 2):
            self.tell(node, step, tuple((odd or {}).get(rank, "a") for rank in (2 * node, 2 * node + 1)), **facts)

    def compared(self, *differences, void=""):
        wish = self.audits.wish
        return self.say(0, compared=Compared(step=wish.step, round=wish.round, differences=differences, void=void))


def told(*ranks, twins=WORLD):
    return Told(ranks=ranks, twins=twins, text=f"w: differs on {ranks}")


def test_equal_replicas_are_counted_and_that_is_all():
    house = House()
    assert house.audits.status() is None
    house.tell(0, 10)
    house.tell(1, 10)
    assert house.audits.status() is None
    house.tell(2, 10)
    house.audit(20)
    found = house.audits.status()
    assert (found.audits, found.step, found.differ, found.since) == (2, 20, (), NONE)
    assert house.audits.wish is None


def test_a_difference_is_looked_into_and_told_once():
    house = House()
    house.audit(10, {3: "b"})
    wish = house.audits.wish
    assert (wish.step, wish.round) == (10, 1)
    assert [(sheet.vault, sheet.digest, sheet.ranks) for sheet in wish.sheets] == [("n0:7", "a", (0, 1, 2, 4, 5)), ("n1:7", "b", (3,))]
    (finding,) = house.compared(told(3))
    assert (finding.kind, finding.step, finding.rank, finding.round) == ("replicas_differ", 10, 3, 1)
    assert house.audits.wish is None
    assert house.audits.doubted == {3}
    assert house.say(0, compared=Compared(step=10, round=1, differences=(told(3),))) == [], "nobody has asked"
    house.audit(20, {3: "c"})
    assert house.compared(told(3)) == [], "it is known"
    assert (house.audits.status().differ, house.audits.status().since) == ((3,), 10)
    house.audit(30, {3: "c", 5: "d"})
    assert {f.rank for f in house.compared(told(3), told(5))} == {3, 5}
    house.audit(40)
    assert house.audits.doubted == set()
    house.audit(50, {3: "b"})
    assert [f.step for f in house.compared(told(3))] == [50], "it is another one"


def test_without_a_majority_all_are_named_and_none_is_doubted():
    house = House(world=2)
    house.audit(10, {1: "b"})
    assert {f.rank for f in house.compared(told(0, 1, twins=2))} == {0, 1}
    assert house.audits.doubted == set()
    assert house.audits.status().differ == (0, 1)


def test_only_twins_are_compared():
    house = House(twins=lambda rank: (rank % 2, 3, 2))
    house.audit(10, {1: "b", 3: "b", 5: "b"})
    assert house.audits.wish is None
    house.audit(20, {1: "b", 3: "b", 5: "c"})
    assert [sheet.ranks for sheet in house.audits.wish.sheets] == [(1, 3), (5,)]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda house: house.tell(1, 20),  # its snapshot of step 10 was overwritten
        lambda house: house.tell(1, 10, round=2),  # sealed in another round
        lambda house: house.tell(1, 10, ranks=(4, 5)),  # ranks that sit elsewhere
        lambda house: house.say(1),  # nothing of it can be said there
        lambda house: house.audits.seated(2, Plan()),  # somebody died
    ],
)
def test_an_audit_that_does_not_come_to_its_end_is_void(spoil):
    house = House()
    house.tell(0, 10, ("a", "b"))
    spoil(house)
    house.tell(2, 10)
    assert house.audits.wish is None
    assert house.audits.status() is None


def test_a_round_takes_the_place_of_a_comparison():
    house = House()
    house.audit(10, {3: "b"})
    house.audits.seated(2, Plan())
    assert house.audits.wish is None
    assert house.say(0, compared=Compared(step=10, round=1, differences=(told(3),))) == []


def test_a_comparison_that_came_to_nothing_is_asked_for_again():
    house = House()
    house.audit(10, {3: "b"})
    assert house.compared(void="n1 does not answer") == []
    assert house.audits.doubted == set()
    house.audit(20, {3: "b"})
    assert house.audits.wish.step == 20
    house.audit(30, {3: "b"})
    assert house.audits.wish.step == 20, "it is under way"
    house.audit(40, {3: "b"}, after=audits.COMPARE_S)
    assert house.audits.wish.step == 40


def test_a_restore_ends_the_doubt():
    for plan, doubted in ((Plan(tier="live", receivers=(3,)), set()), (Plan(tier="live", receivers=(4,)), {3}), (Plan(tier="memory"), {3})):
        house = House()
        house.audit(10, {3: "b"})
        house.compared(told(3))
        house.audits.seated(2, plan)
        assert house.audits.doubted == doubted


def test_there_are_limits():
    world = 2 * audits.LISTED + 40
    house = House(world=world)
    house.audit(10, {rank: f"d{rank}" for rank in range(30, world)})
    sheets = house.audits.wish.sheets
    assert len(sheets) == audits.SHEETS_MAX
    assert sheets[0].ranks == tuple(range(30)), "those of most ranks come first"
    found = house.compared(told(*range(30, world), twins=world))
    assert len(found) == audits.LISTED


def test_a_vault_that_says_nonsense_is_refused_by_name():
    data = msgspec.msgpack.encode(
        {"type": "Audit", "step": 1, "round": 1, "sums": [{"type": "Sum", "twins": [0, 2], "digest": "", "ranks": []}]}
    )
    with pytest.raises(msgspec.ValidationError, match=r"length 3.*twins"):
        msgspec.msgpack.decode(data, type=Audit)


# --------------------------------------------------------------------------- sheets


ALL = Twins(0, 5)


def layout(*names, twins=ALL):
    return Layout(tuple(Row(name, "float32", (4,), (0,), (4,)) for name in names), twins)


def digests(*words):
    return [word.encode().ljust(16) for word in words]


def test_ranks_that_hold_the_same_are_compared_as_one():
    of = layout("w", "w.exp_avg")
    found = [Held((0, 2, 3), of, digests("a", "b")), Held((1,), of, digests("a", "c")), Held((4,), of, digests("x", "b"))]
    expected = [Difference((4,), 5, ("w",)), Difference((1,), 5, ("w.exp_avg",))]
    assert replicas.compare(found) == expected
    assert replicas.compare([Held((rank,), *held[1:]) for held in found for rank in held.ranks]) == expected
    assert str(expected[0]) == "w: differs on rank 4 of 5 replicas"


def test_half_is_no_majority_and_another_layout_is_a_difference():
    of = layout("w", twins=Twins(0, 4))
    assert replicas.compare([Held((0, 2), of, digests("a")), Held((1, 3), of, digests("b"))]) == [Difference((0, 1, 2, 3), 4, ("w",))]
    other = layout("v", twins=Twins(0, 4))
    assert replicas.compare([Held((0, 1, 2), of, digests("a")), Held((3,), other, digests("a"))]) == [Difference((3,), 4, ("w",))]


def test_who_is_alone_is_compared_with_nobody():
    assert replicas.compare([Held((0,), layout("w"), digests("a")), Held((7,), layout("w", twins=Twins(1)), digests("b"))]) == []


def test_a_sheet_there_and_back():
    described = layout("w", "v").encode()
    sheet = replicas.sheet(described, digests("a", "b"))
    found = replicas.held((1, 2), sheet, "here")
    assert (found.ranks, found.layout.encode(), found.digests) == ((1, 2), described, digests("a", "b"))
    assert replicas.digest_of(sheet) != replicas.digest_of(replicas.sheet(described, digests("a", "c")))


@pytest.mark.parametrize(
    "damage",
    [
        lambda sheet: sheet[:-1],
        lambda _: b"",
        lambda _: b"\x92\xc4\x01\x00\xc4\x00",
        lambda _: replicas.sheet(layout("w").encode(), digests("a", "b")),
        lambda _: msgspec.msgpack.encode((1, 2)),
    ],
)
def test_what_is_no_sheet_is_refused(damage):
    with pytest.raises(SnapshotCorrupt):
        replicas.held((0,), damage(replicas.sheet(layout("w").encode(), digests("a"))), "here")
