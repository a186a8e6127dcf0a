"""Wherever nodes stand and whichever come and go: groups are even, no two of one domain are together where that can be, few move."""

from __future__ import annotations

import time
from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from resilient.core.groups import choose

DOMAINS = st.sampled_from(["", "a", "b", "c", "d"])


@st.composite
def fleets(draw):
    return {f"n{i}": draw(DOMAINS) for i in range(draw(st.integers(0, 16)))}


def sound(nodes, size, groups) -> None:
    assert sorted(node for group in groups for node in group) == sorted(nodes)
    lengths = [len(group) for group in groups]
    assert max(lengths, default=0) - min(lengths, default=0) <= 1
    if len(nodes) >= size:
        assert min(lengths) >= size and max(lengths) < 2 * size
    else:
        assert len(groups) <= 1
    of = {node: domain or f"alone {node}" for node, domain in nodes.items()}
    if max(Counter(of.values()).values(), default=0) <= len(groups):
        for group in groups:
            assert len({of[node] for node in group}) == len(group), groups


@given(nodes=fleets(), size=st.integers(2, 5))
@settings(max_examples=300, deadline=None)
def test_even_and_in_different_domains_where_there_are_enough(nodes, size):
    groups = choose(nodes, size)
    sound(nodes, size, groups)
    assert groups == choose(dict(nodes), size)
    assert groups == choose(nodes, size, groups), "what is right stays"


@given(nodes=fleets(), size=st.integers(2, 4), changes=st.lists(st.one_of(DOMAINS, st.integers(0, 50)), max_size=12))
@settings(max_examples=300, deadline=None)
def test_through_losses_and_arrivals(nodes, size, changes):
    groups = choose(nodes, size)
    for number, change in enumerate(changes):
        if isinstance(change, str):
            nodes = {**nodes, f"new{number}": change}
        elif nodes:
            nodes = {node: domain for i, (node, domain) in enumerate(nodes.items()) if i != change % len(nodes)}
        groups = choose(nodes, size, groups)
        sound(nodes, size, groups)


@given(count=st.integers(2, 16), size=st.integers(2, 4), at=st.integers(0, 50))
@settings(max_examples=200, deadline=None)
def test_one_that_joins_moves_nobody_and_one_that_is_lost_moves_few(count, size, at):
    nodes = {f"n{i}": "" for i in range(count)}
    before = choose(nodes, size)
    after = choose({**nodes, "new": ""}, size, before)
    if len(after) == len(before):
        assert [tuple(node for node in group if node != "new") for group in after] == [*before]
    lost = f"n{at % count}"
    rest = {node: domain for node, domain in nodes.items() if node != lost}
    after = choose(rest, size, before)
    if len(after) == len(before):
        stayed = sum(any(set(old) - {lost} <= set(new) for new in after) for old in before)
        assert stayed >= len(before) - 1  # one gives a member to the group that has become too small
    replaced = choose({**rest, "new": ""}, size, before)
    assert {frozenset(group) for group in replaced} == {frozenset("new" if n == lost else n for n in group) for group in before}


def test_a_large_fleet_takes_no_time():
    racks = {f"n{i}": f"rack {i // 32}" for i in range(12_500)}
    for nodes in (racks, dict.fromkeys(racks, ""), {node: f"hall {i % 2}" for i, node in enumerate(racks)}):
        begin = time.process_time()
        groups = choose(nodes, 8)
        rest = {node: domain for node, domain in nodes.items() if node != "n77"} | {"new": nodes["n77"]}
        after = choose(rest, 8, groups)
        taken = time.process_time() - begin
        sound(nodes, 8, groups)
        sound(rest, 8, after)
        assert len(set(groups) - set(after)) <= 2
        assert taken < 5, "a limit for a pass over all pairs, not for this machine"
