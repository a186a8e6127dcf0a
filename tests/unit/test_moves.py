"""Which chairs go to another node, and where nobody may come."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from resilient.core.messages import Report
from resilient.core.moves import Closed, find
from resilient.core.placement import Place


def places(**ranks):
    """n0=2: two ranks there."""
    made = {}
    for node, count in ranks.items():
        for i in range(count):
            made[len(made)] = Place(node=node, local_rank=i, why="")
    return made


def reports(*nodes, slots=2, spares=0):
    return {n: Report(run="r", node=n, boot=1, seq=1, slots=slots, spares=spares) for n in nodes}


def at(moves):
    return {rank: place.node for rank, place in moves.places.items()}


def test_nobody_moves_without_a_reason():
    now = places(n0=2, n1=2)
    moves = find(now, reports("n0", "n1", "n2"), Closed(), {})
    assert moves.places is now


def test_who_sits_on_a_broken_device_goes_if_there_is_room():
    closed = Closed(broken=frozenset({"n1"}), cordoned=frozenset({"n1"}), leaving={2: "n1 has xid 79"})
    moves = find(places(n0=2, n1=2), reports("n0", "n1", "n2"), closed, {}, starting=True)
    assert at(moves) == {0: "n0", 1: "n0", 2: "n2", 3: "n1"}
    assert moves.optional == (2,)
    assert "n1 has xid 79; n2 has room" in moves.why[0]
    assert find(places(n0=2, n1=2), reports("n0", "n1"), closed, {}).moved == frozenset()


def test_those_of_a_cordoned_node_come_along_but_not_in_the_set_up():
    closed = Closed(cordoned=frozenset({"n1"}))
    assert find(places(n0=2, n1=2), reports("n0", "n1", "n2"), closed, {}).moved == {2, 3}
    assert find(places(n0=2, n1=2), reports("n0", "n1", "n2"), closed, {}, starting=True).moved == frozenset()
    assert find(places(n0=2, n1=2), reports("n0", "n1", "n2"), closed, {}, staying=[2]).moved == {3}
    assert find(places(n0=2, n1=2), reports("n0", "n1", "n2"), closed, {}, over=[3]).moved == {2}


def test_who_must_go_is_first_and_a_cordoned_node_is_its_last_resort():
    closed = Closed(cordoned=frozenset({"n1"}))
    moves = find(places(n0=2, n1=1), reports("n1", "n2", slots=2), closed, {})
    assert at(moves) == {0: "n2", 1: "n2", 2: "n1"}, "no room is left for whom might go"
    moves = find(places(n0=2, n1=1), reports("n1", slots=3), closed, {})
    assert at(moves) == {0: "n1", 1: "n1", 2: "n1"}
    broken = Closed(broken=frozenset({"n1"}), cordoned=frozenset({"n1"}))
    assert find(places(n0=2, n1=1), reports("n1", slots=3), broken, {}).homeless == (0, 1)


def test_nobody_comes_to_a_node_that_is_not_admitted_and_the_dead_leave_it():
    closed = Closed(unfit=frozenset({"n1"}))
    assert find(places(n0=2, n2=1), reports("n1", "n2", slots=3), closed, {}).moved == {0, 1}
    assert find(places(n0=2), reports("n1"), closed, {}).homeless == (0, 1)
    moves = find(places(n0=1, n1=2), reports("n0", "n1", slots=2), closed, {}, gone=[1])
    assert at(moves) == {0: "n0", 1: "n0", 2: "n1"}, "who works there goes on"
    assert "n1 is not admitted" in moves.why[0]


nodes = st.sampled_from(["n0", "n1", "n2", "n3"])
some = st.frozensets(nodes)


@given(st.lists(nodes, min_size=1, max_size=8), some, some, some, some, st.integers(1, 4), st.frozensets(st.integers(0, 7)), st.booleans())
def test_always(seats, alive, unfit, broken, care, slots, gone, starting):
    taken = dict.fromkeys(["n0", "n1", "n2", "n3"], 0)
    now = {}
    for rank, node in enumerate(seats):
        now[rank] = Place(node=node, local_rank=taken[node], why="")
        taken[node] += 1
    closed = Closed(
        unfit=unfit, broken=broken, cordoned=broken | care, leaving={r: "why" for r, p in now.items() if p.node in broken and r % 2 == 0}
    )
    told = reports(*sorted(alive), slots=slots, spares=1)
    moves = find(now, told, closed, {}, gone=gone, starting=starting)
    if moves.homeless:
        assert moves.places is now
        assert all(now[r].node not in alive or now[r].node in unfit for r in moves.homeless)
        return
    assert moves.places.keys() == now.keys()
    assert all(p.node in alive for p in moves.places.values()), "everybody has a place on a node that lives"
    sits = [(p.node, p.local_rank) for p in moves.places.values()]
    assert len(set(sits)) == len(sits), "two ranks on one chair"
    counts = {n: sum(p.node == n for p in moves.places.values()) for n in alive}
    assert all(counts[n] <= max(slots + 1, taken[n]) for n in alive), "more than there is room for"
    free = [n for n in alive - unfit - broken - care if counts[n] < slots + 1]
    for rank in moves.moved:
        before, after = now[rank].node, moves.places[rank].node
        assert after not in unfit | broken
        assert after not in care or (not free and before not in alive - unfit)
        assert before not in alive or before in unfit | broken | care
