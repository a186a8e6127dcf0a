"""Seating: who sits where in the next round, decided from what all living nodes reported after the fence.

Think of the minute before the curtain rises again: the director looks at every chair once, sends home who must go, says who plays with
which score, and writes it all on one sheet.

Contract: `seat` is a pure function from reports to a `Seating`; the coordinator calls it once per round, also for the first one.
There are two ways to go on:
- **replace**: emptied chairs get newcomers, everybody else keeps process and state. The usual way. A chair that moves (moves.py) is
  emptied, too; where its old node lives, its copies are fetched from there. Who need not move does not where that would cost a step.
- **again**: the whole group is started again, with the newest state that all ranks have a copy of. For a group that does not use this
  library, where nobody lives who could go on, and where a newcomer could not repeat the set-up alone. Workers that wait in `init` for
  their first seat have nothing to undo and keep their process.
A fault while some ranks are in their set-up is no other case: they keep what they have (train/rehearsal.py).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from collections.abc import Set as AbstractSet

import msgspec

from resilient.core import rebuild
from resilient.core.ledger import Account, Choice, Copy, Poison, best_copy, choose
from resilient.core.messages import NONE, Chair, Elder, Fetch, Holding, Msg, Plan, Rebuild, Report
from resilient.core.moves import Closed, Moves, find
from resilient.core.placement import Place
from resilient.core.rebuild import Sources

WHY_MAX = 64  # lines of reasons kept per round


class Seating(Msg):
    """One sheet: everything that the assignments of a round are made of."""

    places: dict[int, Place]
    plan: Plan = Plan()
    again: bool = False  # the whole group starts again
    emptied: tuple[int, ...] = ()
    put_down: dict[str, tuple[str, ...]] = {}  # node -> workers
    fetch: dict[str, tuple[Fetch, ...]] = {}  # node -> copies to bring
    elders: tuple[Elder, ...] = ()  # plan.origin: where the snapshots are from which every rank's is cut
    homeless: tuple[int, ...] = ()  # ranks for which no node has room: there is no round then
    reached: int = NONE  # the newest step that every rank is known to have completed
    why: tuple[str, ...] = ()
    error: str = ""  # there is no way to go on


class Hall(Msg):
    """What `seat` looks at."""

    round: int  # the one to be seated
    places: dict[int, Place]  # of the last round
    reports: dict[str, Report]  # of living nodes
    condemned: AbstractSet[str] = frozenset()  # workers that a verdict removed
    activated: AbstractSet[int] = frozenset()  # ranks that finished the set-up since the group was last started
    managed: bool = False
    again: bool = False  # somebody asked for a restart of the whole group
    committed: AbstractSet[int] = frozenset()
    poison: AbstractSet[Poison] = frozenset()
    doubted: AbstractSet[int] = frozenset()  # ranks whose replicas' majority holds something else
    closed: Closed = Closed()  # where nobody may come, and who should leave


def seat(hall: Hall) -> Seating:
    """The next round."""
    chairs = {rank: chair for rank, place in hall.places.items() if (chair := _chair(hall, rank, place)) is not None}
    over = {r for r, c in chairs.items() if c.state == "finished" and (not hall.managed or (c.record and c.record.phase == "done"))}
    gone = {r for r in hall.places if r not in over and not _sits(chairs.get(r), hall.condemned)}
    copies = _copies(hall)
    sources = rebuild.sources(hall.places, {node: report.parities for node, report in hall.reports.items()}, copies)
    for rank, steps in sources.items():
        copies[rank] = (*copies.get(rank, ()), Copy(node="", snapshots=tuple(sorted(steps)), rebuilt=True))
    starting = not set(hall.places) <= hall.activated

    def moving(staying: Collection[int] = ()) -> Moves:
        return find(hall.places, hall.reports, hall.closed, copies, gone=gone, over=over, starting=starting, staying=staying)

    moves = moving()
    if moves.homeless:
        return Seating(places=hall.places, homeless=moves.homeless)
    if not moves.optional:
        return _seat(hall, moves, chairs, gone, over, copies, sources, starting=starting)
    settled = _seat(hall, moving(moves.optional), chairs, gone, over, copies, sources, starting=starting)
    for staying in _fewer(moves, hall.closed.leaving):
        bolder = _seat(hall, moving(staying), chairs, gone, over, copies, sources, starting=starting)
        if not _worse(bolder, settled):
            return bolder
    return settled


def _fewer(moves: Moves, leaving: Collection[int]) -> list[tuple[int, ...]]:
    """Who stays behind: nobody; or one, whose state all others can be given; or those who might go; or of those who should, all but one."""
    should = [rank for rank in moves.optional if rank in leaving]
    might = tuple(rank for rank in moves.optional if rank not in leaving)
    ways: list[tuple[int, ...]] = [(), moves.optional[-1:]]
    if might and should:
        ways += [might, (*might, should[-1])]
    return ways


def _worse(seating: Seating, than: Seating) -> bool:
    """Whether it costs a step, or a start of the whole group, that the other one does not."""
    if than.error or than.plan.step == NONE:
        return bool(seating.error) and not than.error
    return bool(seating.error) or seating.plan.step < than.plan.step or (seating.again and not than.again)


def _seat(
    hall: Hall,
    moves: Moves,
    every: Mapping[int, Chair],
    gone: AbstractSet[int],
    over: AbstractSet[int],
    known: Mapping[int, tuple[Copy, ...]],
    sources: Mapping[int, Mapping[int, Sources]],
    *,
    starting: bool,
) -> Seating:
    """The next round, if these move. every: the chairs as they are; known: all copies."""
    places, moved, why = moves.places, moves.moved, list(moves.why)
    gone = gone | moved
    chairs = {rank: chair for rank, chair in every.items() if rank not in moved}  # also where the node lives: as though it were lost ...
    copies = {**known, **{rank: _away(known.get(rank, ()), hall.places[rank].node) for rank in moved}}  # ... but for what its memory holds

    accounts = [_account(r, chairs, copies, gone, over, starting=starting, doubted=r in hall.doubted) for r in sorted(places)]
    elders = _elders(hall)
    elder = max(((step, world) for step, world, _ in elders), default=(NONE, 0))
    choice = choose(accounts, hall.committed, hall.poison, elder)
    reached = choice.reached
    emptied = gone | (over & set(choice.plan.receivers))
    again = hall.again or not hall.managed or (starting and len(gone) == len(places))
    if not again and (
        stranded := _stranded(
            emptied, chairs, copies, _fetches(hall, choice, places, chairs, emptied, copies, sources), _left(hall, places)
        )
    ):
        why.append(f"nobody would bring the minutes of the set-up of rank {stranded[0]}: the group starts again")
        again = True
    if again:
        choice = choose([msgspec.structs.replace(a, record=None, finished=False) for a in accounts], hall.committed, hall.poison, elder)
    if choice.error:
        return Seating(places=places, error=choice.error)
    again = again or choice.fresh
    if again:
        kept = {r for r in places if starting and hall.managed and r not in gone and r not in moved and _unseated(chairs[r])}
        emptied = set(places) - kept
    fetch = _fetches(hall, choice, places, chairs, emptied, copies, sources)
    if again:  # nobody asks for the minutes of a set-up that is made anew
        fetch = {node: tuple(f for f in items if f.tier != "memory") for node, items in fetch.items()}
    plan = msgspec.structs.replace(choice.plan, starting=starting or again)
    old = next((ranks for step, world, ranks in elders if (step, world) == (plan.step, plan.origin)), {})
    apart = any(place.node not in nodes for place in places.values() for nodes in old.values())
    if plan.tier == "memory" and (apart or any(f.tier == "peer" for fs in fetch.values() for f in fs)):
        plan = msgspec.structs.replace(plan, tier="peer")
    return Seating(
        places=places,
        plan=plan,
        again=again,
        emptied=tuple(sorted(emptied)),
        put_down=_put_down(hall, emptied),
        fetch=fetch,
        elders=tuple(Elder(rank=rank, vaults=tuple(hall.reports[node].vault for node in nodes)) for rank, nodes in sorted(old.items())),
        reached=reached,
        why=(choice.why, *why)[:WHY_MAX],
    )


def _chair(hall: Hall, rank: int, place: Place) -> Chair | None:
    report = hall.reports.get(place.node)
    return next((c for c in report.chairs if c.rank == rank), None) if report else None


def _sits(chair: Chair | None, condemned: AbstractSet[str]) -> bool:
    """Whether somebody holds the chair who can go on, or is on the way to it."""
    return chair is not None and chair.state in ("starting", "joined", "active") and chair.worker not in condemned


def _unseated(chair: Chair) -> bool:
    return chair.state in ("starting", "joined") and (chair.record is None or chair.record.round == 0)


def _put_down(hall: Hall, emptied: AbstractSet[int]) -> dict[str, tuple[str, ...]]:
    """Whoever holds a chair that is emptied, or that is not his node's any more (it was silent when the chair moved)."""
    found: dict[str, list[str]] = {}
    for node, report in hall.reports.items():
        for chair in report.chairs:
            stays = chair.rank in hall.places and hall.places[chair.rank].node == node and chair.rank not in emptied
            if chair.worker and not stays:
                found.setdefault(node, []).append(chair.worker)
    return {node: tuple(workers) for node, workers in found.items()}


def _stranded(
    emptied: AbstractSet[int],
    chairs: Mapping[int, Chair],
    copies: Mapping[int, tuple[Copy, ...]],
    fetch: Mapping[str, tuple[Fetch, ...]],
    left: AbstractSet[int],
) -> list[int]:
    """Newcomers whose agent has never had the minutes of their set-up, and is brought none: they come with a peer's copies.

    left: ranks whose minutes a predecessor of their agent left there.
    """
    newcomers = emptied | {rank for rank, chair in chairs.items() if chair.state in ("starting", "joined")}
    brought = {f.rank for items in fetch.values() for f in items if f.tier == "peer"}
    had = {rank for rank, chair in chairs.items() if chair.minuted} | left
    return sorted(r for r in newcomers - brought - had if not any(c.seated for c in copies.get(r, ())))


def _left(hall: Hall, places: Mapping[int, Place]) -> frozenset[int]:
    held = {(node, h.rank) for node, report in hall.reports.items() for h in report.holdings if h.native}
    return frozenset(rank for rank, place in places.items() if (place.node, rank) in held)


def _copies(hall: Hall) -> dict[int, tuple[Copy, ...]]:
    """Everything that living nodes' memories hold, by rank."""
    found: dict[int, list[Copy]] = {}
    for node, report in hall.reports.items():
        for chair in report.chairs:
            if chair.rank in hall.places and hall.places[chair.rank].node == node:
                found.setdefault(chair.rank, []).append(_copy(node, chair, seated=True))
        for held in (h for h in report.holdings if h.world_size in (0, len(hall.places))):
            found.setdefault(held.rank, []).append(_copy(node, held, seated=False))
    return {rank: tuple(c for c in cs if c.own_steps or c.snapshots) for rank, cs in found.items()}


def _elders(hall: Hall) -> list[tuple[int, int, dict[int, tuple[str, ...]]]]:
    """(step, world size, rank -> nodes) of every step of a world of another size of which all ranks' snapshots lie in some memory."""
    found: dict[tuple[int, int], dict[int, tuple[str, ...]]] = {}
    for node, report in hall.reports.items():
        for held in report.holdings:
            if held.world_size not in (0, len(hall.places)):
                for step in held.snapshots:
                    nodes = found.setdefault((step, held.world_size), {})
                    nodes[held.rank] = (*nodes.get(held.rank, ()), node)
    bad = {step for tier, step, _ in hall.poison if tier in ("memory", "peer")}
    return [(step, world, ranks) for (step, world), ranks in found.items() if len(ranks) == world and step > 0 and step not in bad]


def _copy(node: str, held: Chair | Holding, *, seated: bool) -> Copy:
    own = held.own_steps or ((held.own_step,) if held.own_step != NONE else ())
    native = isinstance(held, Holding) and held.native
    return Copy(node=node, seated=seated, native=native, own_steps=own, gate_step=held.gate_step, snapshots=held.snapshots)


def _away(copies: tuple[Copy, ...], node: str) -> tuple[Copy, ...]:
    """A rank has moved: what lies in the segments of its old chair has to be fetched from there."""
    return tuple(msgspec.structs.replace(c, seated=False) if c.node == node else c for c in copies)


def _account(
    rank: int,
    chairs: Mapping[int, Chair],
    copies: Mapping[int, tuple[Copy, ...]],
    gone: AbstractSet[int],
    over: AbstractSet[int],
    *,
    starting: bool,
    doubted: bool,
) -> Account:
    chair = chairs.get(rank)
    keeps = chair is not None and rank not in gone
    return Account(
        rank=rank,
        record=chair.record if chair is not None and keeps else None,
        replicated=chair.replicated if chair is not None and chair.layout else _any_replicated(chairs),
        initial=starting and (chair is None or not keeps or chair.state in ("starting", "joined")),
        finished=rank in over,
        doubted=doubted,
        copies=copies.get(rank, ()),
    )


def _any_replicated(chairs: Mapping[int, Chair]) -> bool:
    """Whether shared state is replicated, as the living ranks say: it is the same for all."""
    return next((c.replicated for c in chairs.values() if c.layout), False)


def _fetches(
    hall: Hall,
    choice: Choice,
    places: Mapping[int, Place],
    chairs: Mapping[int, Chair],
    emptied: AbstractSet[int],
    copies: Mapping[int, tuple[Copy, ...]],
    sources: Mapping[int, Mapping[int, Sources]],
) -> dict[str, tuple[Fetch, ...]]:
    """What each node has to bring into its memory before its ranks can be seated."""
    plan = choice.plan
    fetch: dict[str, list[Fetch]] = {}
    for rank in () if plan.origin else plan.receivers:
        node, chair = places[rank].node, chairs.get(rank)
        if plan.tier == "persistent":
            fetch.setdefault(node, []).append(Fetch(rank=rank, step=plan.step, tier="persistent", round=hall.round))
            continue
        torn_only = plan.tier == "live" and rank not in emptied and chair is not None and chair.state == "active"
        copy = best_copy(Account(rank=rank, copies=copies.get(rank, ())), plan, node)
        if torn_only or copy is None or copy.seated:
            continue
        if copy.rebuilt:
            fetch.setdefault(node, []).append(_from_parity(hall, rank, plan.step, sources[rank][plan.step], copies[rank]))
        elif copy.native and copy.node == node:
            fetch.setdefault(node, []).append(Fetch(rank=rank, step=plan.step, tier="memory", round=hall.round))
        else:
            fetch.setdefault(node, []).append(_from_peer(hall, copy.node, rank, plan.step))
    if plan.lender != NONE:
        lent = [c for c in copies.get(plan.lender, ()) if plan.step in c.snapshots]
        for node in sorted({places[rank].node for rank in plan.receivers} - {c.node for c in lent}):
            fetch.setdefault(node, []).append(_from_peer(hall, lent[0].node, plan.lender, plan.step))
    return {node: tuple(items) for node, items in fetch.items()}


def _from_parity(hall: Hall, rank: int, step: int, sources: Sources, copies: tuple[Copy, ...]) -> Fetch:
    """Its own state, and the minutes of its set-up, lie whole on another node."""
    whole = max((c for c in copies if not c.rebuilt), key=lambda c: max(c.own_steps, default=NONE), default=None)
    put_together = Rebuild(
        stripes=tuple((hall.reports[node].vault, kept_as) for node, kept_as in sources.stripes),
        others=tuple((other, hall.reports[node].vault) for other, node in sources.others),
    )
    source = hall.reports[whole.node].vault if whole is not None else ""
    return Fetch(rank=rank, step=step, tier="peer", source=source, round=hall.round, rebuild=put_together)


def _from_peer(hall: Hall, node: str, rank: int, step: int) -> Fetch:
    return Fetch(rank=rank, step=step, tier="peer", source=hall.reports[node].vault, round=hall.round)
