"""Wherever nodes stand and whichever are lost: no node keeps its own copies, none keeps too many, and nothing moves without need."""

from __future__ import annotations

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from resilient.core.holders import choose

DOMAINS = st.sampled_from(["", "a", "b", "c", "d"])


@st.composite
def fleets(draw):
    return {f"n{i}": draw(DOMAINS) for i in range(draw(st.integers(0, 14)))}


def loads(chosen) -> Counter[str]:
    return Counter(holder for holders in chosen.values() for holder in holders)


def domain(nodes, node) -> str:
    alone = len({d or n for n, d in nodes.items()}) == 1
    return node if alone else nodes[node] or f"alone {node}"


def sound(nodes, copies, chosen) -> None:
    wanted = max(0, min(copies, len(nodes) - 1))
    assert chosen.keys() == nodes.keys()
    for owner, holders in chosen.items():
        assert owner not in holders
        assert len(set(holders)) == len(holders) == wanted
        assert set(holders) <= nodes.keys()
    assert max(loads(chosen).values(), default=0) <= wanted + 1


@given(nodes=fleets(), copies=st.integers(0, 4))
@settings(max_examples=400, deadline=None)
def test_balanced_and_in_another_domain_where_there_is_one(nodes, copies):
    chosen = choose(nodes, copies)
    sound(nodes, copies, chosen)
    assert chosen == choose(dict(nodes), copies)
    held = loads(chosen)
    for owner, holders in chosen.items():
        for holder in holders:
            if domain(nodes, holder) == domain(nodes, owner):
                elsewhere = [n for n in nodes if domain(nodes, n) != domain(nodes, owner) and n not in holders]
                assert all(held[n] > len(holders) for n in elsewhere), f"{owner} -> {holder}, {elsewhere}"


@given(nodes=fleets(), copies=st.integers(1, 3), data=st.data())
@settings(max_examples=300, deadline=None)
def test_the_loss_of_a_node_moves_only_what_it_held(nodes, copies, data):
    chosen = choose(nodes, copies)
    while len(nodes) > 1:
        lost = data.draw(st.sampled_from(sorted(nodes)))
        nodes = {node: domain for node, domain in nodes.items() if node != lost}
        after = choose(nodes, copies, chosen)
        wanted = min(copies, len(nodes) - 1)
        for owner, holders in after.items():
            stayed = [h for h in chosen[owner] if h != lost]
            assert list(holders[: len(stayed)]) == stayed[:wanted]
            if lost not in chosen[owner] and len(chosen[owner]) == wanted:
                assert holders == chosen[owner]
        assert all(len(h) == wanted and o not in h for o, h in after.items())
        assert max(loads(after).values(), default=0) <= copies + 1
        chosen = after


@given(nodes=fleets(), copies=st.integers(1, 3), news=st.lists(DOMAINS, min_size=1, max_size=3))
@settings(max_examples=200, deadline=None)
def test_a_newcomer_takes_only_what_lay_in_its_owners_domain(nodes, copies, news):
    before = choose(nodes, copies)
    grown = {**nodes, **{f"new{i}": domain for i, domain in enumerate(news)}}
    after = choose(grown, copies, before)
    for owner in nodes:
        for old, new in zip(before[owner], after[owner], strict=False):
            assert old == new or (grown[old] == grown[owner] != grown[new] and new.startswith("new"))
    # what stands stays, so a newcomer may have to ask a node that holds one too many already; each asks it for one copy at most
    assert max(loads(after).values(), default=0) <= copies + 1 + len(news)


def test_without_names_it_is_a_ring():
    assert choose({"a": "", "b": "", "c": ""}, 1) == {"a": ("b",), "b": ("c",), "c": ("a",)}
    assert choose({"a": "", "b": "", "c": ""}, 2) == {"a": ("b", "c"), "b": ("c", "a"), "c": ("a", "b")}
    assert choose({"a": ""}, 1) == {"a": ()}
    assert choose({"a": "", "b": ""}, 0) == {"a": (), "b": ()}


def test_racks_keep_each_others_copies():
    nodes = {"a0": "a", "a1": "a", "b0": "b", "b1": "b"}
    chosen = choose(nodes, 1)
    assert all(nodes[owner] != nodes[holder] for owner, (holder,) in chosen.items())
    assert set(loads(chosen).values()) == {1}


def test_a_large_fleet():
    nodes = {f"n{i}": f"rack{i // 32}" for i in range(12_500)}
    chosen = choose(nodes, 2)
    assert set(loads(chosen).values()) == {2}
    assert all(len({nodes[owner], *(nodes[h] for h in holders)}) == 3 for owner, holders in chosen.items())
