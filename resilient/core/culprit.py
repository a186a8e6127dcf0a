"""Culprit: of all ranks that stand still, which one keeps the others waiting.

Think of a queue of cars before a crossing: each driver can say for whom he waits; ask the one he names, and so on, until you come to
somebody who waits for nobody. If you come back to where you began, two streets have each blocked the other.

Every page counts, group by group, the operations that its rank has begun and ended in this round. Where some ranks are in operation n of a
group, the members that have not begun n are those who did not arrive; a rank that waits in another group itself has its own reason there,
and the chain is followed to its end. Which backend it is, and whether a process is stopped or dead, makes no difference: pages are read.
What two ranks send to each other is counted apart, and matched in the same way. Where counters are missing (a group that the culprit
has not made yet, more groups than fit into a page), whoever stands still outside of all collectives while others wait inside is to blame.

Contract: `blame` is pure. Two witnesses are needed: the one who does not come was found to stand still, and somebody waits for it.
Nobody is to blame while
- nobody waits in a collective: all evaluate, compile, read or save at once (until `alone_s` is over);
- the one who is missing moves, is in a section or in a debugger, or has not yet taken `PATIENCE` times as long as the longest pause of
  those who did arrive in the same step: what the others took says what it takes;
- a newcomer is not in place.
`Standstill` remembers the findings of kind "stalled" until a round is seated, and forgets those whose worker has moved since. Where all
that stand still wait and no one is missing, it gives a culprit's report `culprit_s` to arrive; then the round is formed again with the
same people. Ranks that wait for each other in a ring are the program's mistake: both are named, nobody is replaced, and at the second
time in the same step the run ends.
Rejected: comparing sums over all groups (with tensor or pipeline parallel groups the ranks rightly differ); asking the library (only
NCCL keeps such a record, and a stopped process does not answer).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

from resilient.core.messages import Chair, Finding, Msg, Record, VerdictName, pair_of

PATIENCE: Final = 3.0  # as in hang.py: a pause three times as long as one that was seen

LATE_MAX: Final = 64  # of those who are missing in one operation, looked at at a time: of the others the next round tells
WAITED_S: Final = 3.0  # inside an operation, until it counts as waiting in vain: a waiter's own bound may be that of a compile
MOVING_S: Final = 1.0  # whose page has moved since then
Edges = dict[int, dict[int, str]]  # rank -> rank it waits for -> in what


class Blame(Msg):
    """Why nothing moves."""

    ranks: tuple[int, ...] = ()  # they keep the others waiting
    why: str = ""
    wait: bool = False  # there is a good reason: nobody is to blame
    alone: bool = False  # ... but not for ever: nobody waits for anybody, or for somebody who does other things
    crossed: bool = False  # the ranks wait for each other: the program's mistake
    verdict: VerdictName = "replace"  # on them


def blame(chairs: Iterable[Chair], stalled: Collection[int]) -> Blame:
    """Who is to blame when the ranks `stalled` do not move."""
    chairs = tuple(sorted(chairs, key=lambda c: c.rank))
    active = {c.rank: c.record for c in chairs if c.state == "active" and c.record is not None}
    pauses = {c.rank: c.pause_s for c in chairs}
    newest = max((record.round for record in active.values()), default=0)
    behind = tuple(rank for rank, record in active.items() if rank in stalled and record.round < newest)
    if behind:
        return Blame(ranks=behind, why="it hangs in a round that is over")
    edges = _edges(active, stalled)
    if edges:
        return _follow(edges, active, stalled, pauses)
    return _by_place(chairs, active, stalled, pauses)


def _edges(active: Mapping[int, Record], stalled: Collection[int]) -> Edges:
    """Who waits for whom, beginning at those who stand still, as far as their pages show it."""
    counters = {rank: {t.name: t for t in record.groups} for rank, record in active.items()}
    members: dict[int, list[int]] = {}
    for rank, mine in counters.items():
        for name in mine:
            if name > 0:
                members.setdefault(name, []).append(rank)
    edges: Edges = {}
    late: dict[tuple[int, int], list[int]] = {}  # (group, operation) -> who has not begun it
    known = [rank for rank, record in active.items() if rank in stalled or _waits(record)]
    met = set(known)
    for rank in known:  # grows while it is walked
        for name, tally in counters[rank].items():
            if tally.entered <= tally.completed:
                continue
            wanted = tally.completed + 1
            others = members[name] if name > 0 else [other for other in pair_of(name) if other in active and counters[other]]
            if (missing := late.get((name, wanted))) is None:
                missing = [o for o in others if name not in counters[o] or counters[o][name].entered < wanted][:LATE_MAX]
                late[name, wanted] = missing
            if missing:
                where = f"operation {wanted} of {_named(name, others)}"
                edges.setdefault(rank, {}).update(dict.fromkeys(missing, where))
                known += [other for other in missing if other not in met]
                met.update(missing)
    return edges


def _waits(record: Record) -> bool:
    return record.entered > record.completed and record.idle_s >= WAITED_S


def _named(name: int, members: Collection[int]) -> str:
    if name < 0:
        return "what ranks {} and {} send to each other".format(*pair_of(name))
    return f"the group of ranks {listed(members)}"


def _follow(edges: Edges, active: Mapping[int, Record], stalled: Collection[int], pauses: Mapping[int, float]) -> Blame:
    """To the end of every chain."""
    waited_for: dict[int, list[int]] = {}
    for rank, others in edges.items():
        for other in others:
            waited_for.setdefault(other, []).append(rank)
    ends = sorted(waited_for.keys() - edges.keys())
    if not ends:
        return _ring(edges, active, stalled)
    guilty = [rank for rank in ends if rank in stalled]
    moving = [rank for rank in ends if rank not in stalled and not (guilty and active[rank].section)]
    if moving:
        return Blame(wait=True, why=f"rank {moving[0]} has not arrived yet, and there is a reason or time for that")
    ends, arrived = guilty, list(edges)
    if any(_inside(active[rank]) and not _alone_inside(rank, active) for rank in ends):
        return Blame(why=f"ranks {listed(ends)} and all that they wait for are in one operation that does not end: a link, or a library")
    if _early(ends, arrived, active, pauses):
        return Blame(wait=True, why=f"rank {ends[0]} has not taken much longer yet than those who wait for it")
    waiters = waited_for[ends[0]]
    return Blame(
        ranks=tuple(ends),
        why=f"did not arrive in {edges[waiters[0]][ends[0]]} that ranks {listed(sorted(waiters))} wait in",
    )


def _inside(record: Record) -> bool:
    return any(t.entered > t.completed for t in record.groups)


def _alone_inside(rank: int, active: Mapping[int, Record]) -> bool:
    """Whether what it has not ended yet has ended for somebody else: it was begun and is not being waited for."""
    pending = {t.name: t.completed for t in active[rank].groups if t.entered > t.completed}
    others = [t for other, record in active.items() if other != rank for t in record.groups]
    return all(any(t.name == name and t.completed > done for t in others) for name, done in pending.items())


def _ring(edges: Edges, active: Mapping[int, Record], stalled: Collection[int]) -> Blame:
    """All chains end in ranks that wait for each other."""
    known: dict[frozenset[int], set[int]] = {}  # all who wait in one operation wait for the same ranks
    reach: dict[int, set[int]] = {}
    for rank, others in edges.items():
        key = frozenset(others)
        if key not in known:
            known[key] = _reach(rank, edges)
        reach[rank] = known[key]
    ring = sorted(rank for rank, seen in reach.items() if rank in seen and all(rank in reach[other] for other in seen))
    if any(rank not in stalled for rank in ring):
        return Blame(wait=True, why=f"ranks {listed(ring)} wait for each other, and have not done so for long")
    what = "; ".join(f"rank {rank} waits for rank {min(edges[rank])} in {edges[rank][min(edges[rank])]}" for rank in ring[:4])
    odd = _odd(ring, active)
    who = f"rank {odd} has begun another number of operations than its neighbours; " if odd is not None else ""
    why = f"ranks enter collectives in a different order, or one of them leaves one out: {who}{what}"
    return Blame(ranks=(odd,) if odd is not None else tuple(ring), why=why, crossed=True, verdict="watch")


def _reach(rank: int, edges: Edges) -> set[int]:
    seen: set[int] = set()
    todo = list(edges.get(rank, ()))
    while todo:
        other = todo.pop()
        if other not in seen:
            seen.add(other)
            todo += [further for further in edges.get(other, ()) if further not in seen]
    return seen


def _odd(ring: Collection[int], active: Mapping[int, Record]) -> int | None:
    """The one rank of the ring that differs from most of those who wait in the same operation, all groups counted together."""
    looked: set[tuple[int, int, int]] = set()
    for rank in ring:
        for mine in active[rank].groups:
            place = (mine.name, mine.entered, mine.completed)
            if mine.entered <= mine.completed or place in looked:
                continue
            looked.add(place)
            here = {
                other: sum(t.entered for t in record.groups)
                for other, record in active.items()
                if any(t.name == mine.name and t.entered == mine.entered and t.completed == mine.completed for t in record.groups)
            }
            usual, times = Counter(here.values()).most_common(1)[0]
            different = [other for other, count in here.items() if count != usual]
            if len(different) == 1 and times >= 2 and different[0] in ring:
                return different[0]
    return None


def _by_place(chairs: tuple[Chair, ...], active: Mapping[int, Record], stalled: Collection[int], pauses: Mapping[int, float]) -> Blame:
    """Where the counters do not tell: by who is inside of a collective, and who outside."""
    outside = tuple(rank for rank, record in active.items() if rank in stalled and record.entered == record.completed)
    inside = [rank for rank, record in active.items() if record.entered > record.completed]
    if outside and inside:
        if not any(rank in stalled or _waits(active[rank]) for rank in inside) or _early(outside, inside, active, pauses):
            return Blame(wait=True, why=f"rank {outside[0]} has not taken much longer yet than those who wait for it")
        return Blame(ranks=outside, why="did not arrive in the collective that the others wait in")
    late = [c.rank for c in chairs if c.state in ("starting", "joined")]
    if late and outside:
        return Blame(ranks=outside, why=f"it stands still, and rank {late[0]} waits for the others to take its place")
    if late:
        return Blame(wait=True, why=f"rank {late[0]} is not in place yet, the others wait for it")
    sections = [rank for rank, record in active.items() if record.section]
    if sections:
        return Blame(wait=True, why=f"rank {sections[0]} is in a section, the others wait for it")
    moving = [rank for rank, record in active.items() if rank not in stalled and record.idle_s < MOVING_S]
    if moving and not outside:
        return Blame(why=f"rank {moving[0]} moves, the others wait for it", wait=True, alone=True)
    if outside:
        return Blame(ranks=outside, why="nobody moves, and nobody waits in a collective", wait=True, alone=True)
    return Blame(why="all that stand still wait inside a collective")


def _early(ends: Iterable[int], arrived: Iterable[int], active: Mapping[int, Record], pauses: Mapping[int, float]) -> bool:
    usual = max((pauses.get(rank, 0.0) for rank in arrived), default=0.0)
    return min(active[rank].idle_s for rank in ends) < PATIENCE * usual


def listed(ranks: Collection[int]) -> str:
    """The first few, for people."""
    ranks = list(ranks)
    return ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")


@dataclass(slots=True)
class Standstill:
    """The ranks that were reported as stalled."""

    culprit_s: float
    alone_s: float = 600.0
    found: dict[int, tuple[Finding, Chair]] = field(default_factory=dict)  # with the chair as it was then
    since: float = 0.0  # when somebody was found first, or when there was last a good reason to wait
    began: float = 0.0  # when somebody was found first
    _rings: Counter[int] = field(default_factory=Counter)  # step -> how often ranks waited for each other there

    def add(self, finding: Finding, chair: Chair, now: float) -> None:
        """A rank does not move."""
        if not self.found:
            self.since = self.began = now
        self.found[finding.rank] = (finding, chair)

    def look(self, chairs: Iterable[Chair], now: float) -> Blame:
        """Who is to blame now. chairs: as they were last reported."""
        current = {c.rank: c for c in chairs}
        self.found = {r: (f, c) for r, (f, c) in self.found.items() if r in current and not _moved(c, current[r])}
        if not self.found:
            return Blame(wait=True)
        found = blame(current.values(), self.found)
        if found.alone:
            return Blame(ranks=found.ranks, why=f"{found.why} for {self.alone_s:.0f} s") if now - self.began >= self.alone_s else found
        return found

    def judge(self, found: Blame) -> Blame:
        """What a ring is worth, now that it is acted upon: the second time in the same step another try would not help."""
        if not found.crossed:
            return found
        step = max(self.found[rank][0].step for rank in found.ranks)
        self._rings[step] += 1
        again = self._rings[step] > 1
        return Blame(ranks=found.ranks, why=found.why, crossed=True, verdict="halt" if again else "watch")

    def due(self) -> float | None:
        """When waiting for a culprit's report is over."""
        return self.since + self.culprit_s if self.found else None


def _moved(before: Chair, after: Chair) -> bool:
    """Whether its worker has made progress since, or is another one."""
    return before.worker != after.worker or _marks(before) != _marks(after)


def _marks(chair: Chair) -> object:
    record = chair.record
    return None if record is None else (record.step, record.phase, record.entered, record.completed)
