"""How fast nodes are closed, and when not at all."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from resilient.core.cause import Seen
from resilient.core.cordon import NEVER, NODE_MAX, Cordons, Wish
from resilient.core.messages import Finding
from resilient.core.placement import Place
from resilient.core.rules import Limits


def wish(node, kind="fabric", device="", verdict="cordon", since=0.0, hold=0.0, local_ranks=None):
    finding = Finding(seq=0, kind=kind, device=device, class_="cordon")
    seen = Seen(since, node, finding, "cordon", verdict, "", proof=True)
    return Wish(node, verdict, seen, since, since + hold, local_ranks)


def fleet(count, domain=""):
    return {f"n{i}": domain for i in range(count)}


def names(closed):
    return [c.node for c in closed]


def test_the_first_at_once_the_next_ten_seconds_later():
    cordons = Cordons(Limits())
    assert cordons.wish(wish("n1"))
    assert not cordons.wish(wish("n1")), "asked for already"
    cordons.wish(wish("n2"))
    assert names(cordons.act(0.0, fleet(9))) == ["n1"]
    assert cordons.due() == 10.0
    assert cordons.act(9.9, fleet(9)) == []
    assert names(cordons.act(10.0, fleet(9))) == ["n2"]
    assert cordons.nodes == {"n1", "n2"}
    assert cordons.due() == NEVER


def test_an_eviction_comes_first_and_another_reason_for_a_closed_node_waits_for_nothing():
    cordons = Cordons(Limits())
    cordons.wish(wish("n1"))
    cordons.wish(wish("n2", verdict="evict", device="gpu:0", local_ranks=frozenset({0})))
    assert names(cordons.act(0.0, fleet(9))) == ["n2"]
    cordons.wish(wish("n2", verdict="evict", device="gpu:1", local_ranks=frozenset({1})))
    assert cordons.act(0.1, fleet(9)) == []
    places = {r: Place(node=f"n{2 + r // 2}", local_rank=r % 2, why="") for r in range(4)}
    assert set(cordons.leaving(places)) == {0, 1}
    assert cordons.broken() == {"n2"}


def test_where_most_of_a_small_domain_is_sick_nothing_is_closed():
    cordons = Cordons(Limits())
    for i in range(3):
        cordons.wish(wish(f"n{i}"))
    assert cordons.act(0.0, fleet(5)) == []  # 3 of 5
    assert cordons.due() == NEVER
    assert names(cordons.act(1.0, fleet(5))) == []
    cordons.changed()
    assert names(cordons.act(2.0, fleet(9))) == ["n0"]  # the fleet has grown: 3 of 9


def test_in_a_large_one_slowly():
    cordons = Cordons(Limits())
    for i in range(60):
        cordons.wish(wish(f"n{i:02}"))
    domains = {f"n{i:02}": "" for i in range(100)}
    assert names(cordons.act(0.0, domains)) == ["n00"]
    assert cordons.due() == 100.0


def test_two_sick_of_three_are_few():
    cordons = Cordons(Limits())
    cordons.wish(wish("n0"))
    cordons.wish(wish("n1"))
    assert names(cordons.act(0.0, fleet(3))) == ["n0"]


def test_when_all_are_sick_it_is_not_they():
    cordons = Cordons(Limits())
    cordons.wish(wish("n0"))
    assert cordons.act(0.0, fleet(1)) == []
    assert names(cordons.act(1.0, fleet(1))) == []
    cordons.changed()
    assert names(cordons.act(2.0, fleet(2))) == ["n0"]


def test_domains_have_a_pace_of_their_own():
    cordons = Cordons(Limits())
    cordons.wish(wish("a0"))
    cordons.wish(wish("b0"))
    domains = {"a0": "a", "a1": "a", "b0": "b", "b1": "b"}
    assert sorted(names(cordons.act(0.0, domains))) == ["a0", "b0"]


def test_a_recovery_takes_back_what_its_kind_and_device_had_asked_for():
    cordons = Cordons(Limits())
    cordons.wish(wish("n0", "ib-link", "dev:mlx5_0"))
    cordons.wish(wish("n0", "ib-link", "dev:mlx5_1"))
    cordons.act(0.0, fleet(9))
    assert cordons.lift("n0", "fabric", "") == []
    assert cordons.lift("n1", "ib-link", "dev:mlx5_0") == []
    assert cordons.lift("n0", "ib-link", "dev:mlx5_0") == []  # the other port is still down
    assert names(cordons.lift("n0", "ib-link", "dev:mlx5_1")) == ["n0"]
    assert cordons.nodes == frozenset()


def test_what_is_held_can_be_taken_back_before_it_is_done():
    cordons = Cordons(Limits())
    cordons.wish(wish("n0", "ib-link", hold=3.0))
    assert cordons.act(0.0, fleet(9)) == []
    assert cordons.due() == 3.0
    assert cordons.lift("n0", "ib-link", "") == []
    assert cordons.act(3.0, fleet(9)) == []
    assert cordons.nodes == frozenset()


@given(st.lists(st.tuples(st.integers(0, 19), st.floats(0.0, 50.0), st.booleans()), max_size=40))
def test_never_faster_than_the_pace_and_never_all(asked):
    limits = Limits()
    cordons, domains, at = Cordons(limits), fleet(20), []
    events = sorted((when, f"n{i}", evict) for i, when, evict in asked)
    now = 0.0
    for when, node, evict in [*events, (200.0, "", False)]:
        while cordons.due() <= when and cordons.due() > -NEVER:
            now = max(now, cordons.due())
            before = cordons.due()
            at += [now] * len(cordons.act(now, domains))
            assert cordons.due() > before, "it makes no progress"
        now = when
        if node:
            cordons.wish(wish(node, verdict="evict" if evict else "cordon", since=now))
            at += [now] * len(cordons.act(now, domains))
    assert all(b - a >= 1 / limits.cordons_per_s - 1e-6 for a, b in pairwise(at))
    assert len(cordons.nodes) < len(domains)
    assert cordons.nodes == {w.node for w in cordons.done.values()}


def xid(code, verdict, *, hold=0.0, ranks=(0,), proof=True):
    finding = Finding(seq=0, kind="xid", code=code, device="gpu:0", class_="cordon")
    return Wish("n1", verdict, Seen(0.0, "n1", finding, "cordon", verdict, "", proof), 0.0, hold, frozenset(ranks))


def test_an_eviction_outweighs_a_cordon_for_the_same_device():
    cordons = Cordons(Limits())
    cordons.wish(xid("63", "cordon"))
    cordons.act(0.0, fleet(3))
    assert cordons.broken() == frozenset()
    assert cordons.wish(xid("79", "evict")), "a row was to be remapped, and now the device is lost"
    assert cordons.act(1.0, fleet(3)) == []
    assert cordons.broken() == {"n1"}
    assert not cordons.wish(xid("63", "cordon"))
    held = Cordons(Limits())
    held.wish(xid("79", "evict", hold=3.0))
    assert not held.wish(xid("63", "cordon"))
    assert held.act(1.0, fleet(3)) == []
    held.act(3.0, fleet(3))
    assert held.broken() == {"n1"}


def test_words_do_not_take_back_what_a_device_said():
    cordons = Cordons(Limits())
    cordons.wish(xid("79", "evict"))
    cordons.wish(xid("79", "evict", ranks=(1,), proof=False))
    cordons.act(0.0, fleet(3))
    assert cordons.lift("n1", "xid", "", proof=False) == []
    places = {rank: Place(node="n1", local_rank=rank, why="") for rank in range(2)}
    assert set(cordons.leaving(places)) == {0}
    assert names(cordons.lift("n1", "xid", "")) == ["n1"]


def test_one_node_does_not_fill_the_book():
    cordons = Cordons(Limits())
    asked = [cordons.wish(wish("n1", device=f"dev:{i}")) for i in range(NODE_MAX)]
    cordons.act(0.0, fleet(9))
    asked += [cordons.wish(wish("n1", device=f"dev:{i}")) for i in range(NODE_MAX, 9000)]
    assert sum(asked) == NODE_MAX
    assert cordons.wish(wish("n2"))
