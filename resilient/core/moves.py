"""Moves: which chairs go to another node in the next round, and where they stand then.

Think of moving people out of a house: whose room burned down must go; who was told by the inspector to leave goes if there is a bed
elsewhere; and since the bus is there anyway, those from the house that will be closed come along while seats are left.

Contract: a pure function. In this order, each with the room that those before it have left:
- must: the node is lost, or may not take ranks and nobody who could go on sits there. Without a room there is no round.
- should: the rank sits on a device that is broken. Without a room it stays where it is.
- might: its node is cordoned. The same; and not while the group sets up, when a move would start everybody again.
Whether a move costs a step is seen only by the plan: seating.py leaves out those that would (`staying`).
Nobody comes to a node that is not admitted or that has a broken device, and to a cordoned one only who must move and finds no other.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import msgspec

from resilient.core.ledger import Copy
from resilient.core.messages import Msg, Report
from resilient.core.placement import Place, Room, seat_emptied


class Closed(Msg):
    """Where nobody may come, and who should leave."""

    unfit: frozenset[str] = frozenset()  # nodes that are not admitted
    broken: frozenset[str] = frozenset()  # nodes with a broken device
    cordoned: frozenset[str] = frozenset()  # nodes, the broken ones included
    leaving: dict[int, str] = {}  # rank that sits on a broken device -> which


class Moves(Msg):
    """What comes of it."""

    places: dict[int, Place]
    moved: frozenset[int] = frozenset()
    homeless: tuple[int, ...] = ()
    why: tuple[str, ...] = ()
    optional: tuple[int, ...] = ()  # of those that moved, who need not have: first those that should


def find(
    places: dict[int, Place],
    reports: Mapping[str, Report],
    closed: Closed,
    copies: Mapping[int, tuple[Copy, ...]],
    *,
    gone: Collection[int] = (),
    over: Collection[int] = (),
    starting: bool = False,
    staying: Collection[int] = (),
) -> Moves:
    """See the head of this file.

    gone: chairs that need somebody else; over: those that need nobody any more; staying: those that do not leave a node that lives.
    """
    must = {r: p for r, p in places.items() if p.node not in reports or (p.node in closed.unfit and r in gone)}
    never = {*must, *over, *staying}
    should = {r: places[r] for r in sorted(closed.leaving) if r in places and r not in never}
    might = {}
    if closed.cordoned and not starting:
        might = {r: p for r, p in places.items() if p.node in closed.cordoned and r not in never and r not in should}
    if not must and not should and not might:
        return Moves(places=places)
    rooms = _rooms(places, reports, copies, {**must, **should, **might})
    because = {r: f"{p.node} is not admitted" for r, p in must.items() if p.node in reports}
    free = [room for node, room in rooms.items() if node not in closed.unfit | closed.cordoned]
    found, homeless = seat_emptied(must, free, because)
    if homeless:
        last = [room for node, room in rooms.items() if node in closed.cordoned - closed.broken - closed.unfit]
        more, homeless = seat_emptied({r: must[r] for r in homeless}, last, because)
        found |= more
    if homeless:
        return Moves(places=places, homeless=homeless)
    for group, reasons in ((should, closed.leaving), (might, {r: f"{p.node} is cordoned" for r, p in might.items()})):
        if group:
            free = [_fuller(room, found) for room in free]
            found |= seat_emptied(group, free, reasons)[0]
    why = tuple(f"rank {rank} to {place.node}: {place.why}" for rank, place in sorted(found.items()))
    optional = tuple(rank for rank in (*should, *sorted(might)) if rank in found)
    return Moves(places={**places, **found}, moved=frozenset(found), why=why, optional=optional)


def _rooms(
    places: Mapping[int, Place], reports: Mapping[str, Report], copies: Mapping[int, tuple[Copy, ...]], movers: Collection[int]
) -> dict[str, Room]:
    taken: dict[str, set[int]] = {}
    for place in places.values():
        taken.setdefault(place.node, set()).add(place.local_rank)
    held: dict[str, set[int]] = {}
    for rank in movers:
        for copy in copies.get(rank, ()):
            held.setdefault(copy.node, set()).add(rank)
    return {
        node: Room(
            node=node,
            slots=report.slots,
            spares=report.spares,
            taken=frozenset(taken.get(node, ())),
            copies=frozenset(held.get(node, ())),
            shadows=frozenset(s.shadow for s in report.standbys if s.state != "dead"),
        )
        for node, report in reports.items()
    }


def _fuller(room: Room, found: Mapping[int, Place]) -> Room:
    came = {place.local_rank for place in found.values() if place.node == room.node}
    return msgspec.structs.replace(room, taken=room.taken | came) if came else room
