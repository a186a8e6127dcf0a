"""Where chairs stand."""

from __future__ import annotations

from resilient.core.placement import Place, Room, seat_all, seat_emptied


def nodes(places):
    return [place.node for _, place in sorted(places.items())]


def test_nodes_are_seated_in_order_of_arrival():
    places = seat_all([Room(node="b", slots=2, joined=0), Room(node="a", slots=1, joined=1)])
    assert nodes(places) == ["b", "b", "a"]
    assert [p.local_rank for p in places.values()] == [0, 1, 0]
    assert "joined" in places[0].why


def test_a_given_node_rank_wins_and_gaps_are_filled():
    rooms = [Room(node="a", slots=1, joined=0), Room(node="b", slots=1, joined=1, node_rank=0), Room(node="c", slots=1, joined=2)]
    assert nodes(seat_all(rooms)) == ["b", "a", "c"]


def test_two_nodes_with_the_same_rank_are_both_seated():
    rooms = [Room(node="a", slots=1, joined=0, node_rank=0), Room(node="b", slots=1, joined=1, node_rank=0)]
    assert sorted(nodes(seat_all(rooms))) == ["a", "b"]


def place(node, local_rank=0):
    return Place(node=node, local_rank=local_rank, why="")


def test_an_emptied_chair_stays_where_its_node_lives():
    found, homeless = seat_emptied({3: place("a", 1)}, [Room(node="a", slots=2, taken=frozenset({0, 1}))])
    assert (found[3].node, found[3].local_rank, found[3].why, homeless) == ("a", 1, "same node", ())


def test_chairs_of_a_lost_node_go_where_a_standby_shadows_them_or_copies_lie_or_room_is():
    rooms = [
        Room(node="b", slots=1, spares=3, taken=frozenset({0})),
        Room(node="c", slots=1, spares=1, taken=frozenset({0}), copies=frozenset({1})),
        Room(node="d", slots=1, spares=1, taken=frozenset({0}), shadows=frozenset({2})),
        Room(node="e", slots=1, taken=frozenset({0})),
    ]
    found, homeless = seat_emptied({0: place("a"), 1: place("a", 1), 2: place("a", 2)}, rooms)
    assert nodes(found) == ["b", "c", "d"]
    assert [found[r].local_rank for r in range(3)] == [1, 1, 1]
    assert not homeless
    assert "holds its copies" in found[1].why
    assert "shadows" in found[2].why


def test_who_finds_no_room_is_named():
    found, homeless = seat_emptied({0: place("a"), 1: place("a", 1)}, [Room(node="b", slots=1, spares=1, taken=frozenset({0}))])
    assert nodes(found) == ["b"]
    assert homeless == (1,)
