"""Placement: on which node a chair stands.

Think of a landlord with guests and rooms: a guest who has to change rooms stays in the house as long as it stands; if it burned down,
the house that already has the guest's luggage is asked first, then the one with most empty rooms.

Contract: pure functions; equal input, equal output; every choice says why. A node has room for `slots + spares` workers.
Nothing moves that does not have to: only emptied chairs of lost nodes get another place.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from resilient.core.messages import NONE, Msg


class Room(Msg):
    """A node that can take chairs."""

    node: str
    slots: int
    spares: int = 0
    node_rank: int = NONE  # --node-rank if given
    joined: int = 0  # order of arrival
    taken: frozenset[int] = frozenset()  # local ranks of the chairs that stand there
    copies: frozenset[int] = frozenset()  # ranks of which it holds a copy
    shadows: frozenset[int] = frozenset()  # ranks that a standby there shadows


class Place(Msg):
    """Where one chair stands, and why there."""

    node: str
    local_rank: int
    why: str


def seat_all(rooms: Sequence[Room]) -> dict[int, Place]:
    """The first seating: nodes in order of --node-rank where given, else of arrival; ranks in that order, `slots` on each."""
    places: dict[int, Place] = {}
    for room in in_order(rooms):
        why = f"node rank {room.node_rank}" if room.node_rank != NONE else f"joined as number {room.joined}"
        for local_rank in range(room.slots):
            places[len(places)] = Place(node=room.node, local_rank=local_rank, why=why)
    return places


def in_order(rooms: Sequence[Room]) -> list[Room]:
    """Nodes with a --node-rank take that position, the others fill the gaps in order of arrival."""
    named = {room.node_rank: room for room in sorted(rooms, key=lambda r: (r.joined, r.node)) if room.node_rank != NONE}
    others = iter(sorted((r for r in rooms if r not in named.values()), key=lambda r: (r.joined, r.node)))
    ordered: list[Room] = []
    for position in range(max([len(rooms), *(n + 1 for n in named)])):
        room = named.get(position) or next(others, None)
        if room is not None:
            ordered.append(room)
    return ordered


def seat_emptied(
    emptied: Mapping[int, Place], rooms: Sequence[Room], because: Mapping[int, str] | None = None
) -> tuple[dict[int, Place], tuple[int, ...]]:
    """Another place for each emptied chair: the same where its node lives, else a node with room.

    emptied: rank -> where it stood. rooms: the nodes that live, and take newcomers. because: rank -> why it leaves, where its node is not
    lost. Returns the places, and the ranks for which there is no room.
    """
    because = because or {}
    alive = {room.node for room in rooms}
    places = {rank: Place(node=old.node, local_rank=old.local_rank, why="same node") for rank, old in emptied.items() if old.node in alive}
    taken = {room.node: set(room.taken) for room in rooms}
    able = [room for room in rooms if room.slots + room.spares > len(room.taken)]
    homeless: list[int] = []
    for rank in sorted(emptied.keys() - places.keys()):
        if not able:
            homeless.append(rank)
            continue
        chosen = min(able, key=lambda room: _order(rank, room, taken[room.node]))
        used = taken[chosen.node]
        local_rank = next(i for i in range(len(used) + 1) if i not in used)
        free = _free(chosen, used)
        reason = because.get(rank) or f"{emptied[rank].node} is lost"
        places[rank] = Place(node=chosen.node, local_rank=local_rank, why=f"{reason}; {_reason(rank, chosen, free)}")
        used.add(local_rank)
        if free == 1:
            able.remove(chosen)
    return places, tuple(homeless)


def _free(room: Room, used: Collection[int]) -> int:
    return room.slots + room.spares - len(used)


def _order(rank: int, room: Room, used: Collection[int]) -> tuple[bool, bool, int, str]:
    """The best room comes first: a standby for this rank, its copies, most space."""
    return (rank not in room.shadows, rank not in room.copies, -_free(room, used), room.node)


def _reason(rank: int, room: Room, free: int) -> str:
    if rank in room.shadows:
        return f"a standby on {room.node} shadows the rank"
    if rank in room.copies:
        return f"{room.node} holds its copies"
    return f"{room.node} has room for {free}"
