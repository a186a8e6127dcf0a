"""Culprit: of all ranks that stand still, which one keeps the others waiting.

Think of a dance in which everybody has stopped: those with their hands out are waiting, the one with his hands in his pockets is why.
A rank inside a collective (entered, not completed) waits; one that is outside of all and does not move did not arrive.

Contract: `blame` is pure. `Standstill` remembers the findings of kind "stalled" until a round is seated, and forgets those whose worker
has moved since. When all that stand still wait inside a collective, it gives a culprit's report `culprit_s` to arrive; then the round is
formed again with the same people.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

from resilient.core.messages import Chair, Finding, Msg


class Blame(Msg):
    """Why nothing moves."""

    ranks: tuple[int, ...] = ()  # they keep the others waiting
    why: str = ""
    wait: bool = False  # there is a good reason: nobody is to blame


def blame(chairs: Iterable[Chair], stalled: Collection[int]) -> Blame:
    """Who is to blame when the ranks `stalled` do not move."""
    chairs = tuple(chairs)
    active = [(c.rank, c.record) for c in chairs if c.state == "active" and c.record is not None]
    outside = tuple(rank for rank, record in active if rank in stalled and record.entered == record.completed)
    newest = max((record.round for _, record in active), default=0)
    behind = tuple(rank for rank, record in active if rank in stalled and record.round < newest)
    if behind:
        return Blame(ranks=behind, why="it hangs in a round that is over")
    if outside:
        return Blame(ranks=outside, why="did not arrive in the collective that the others wait in")
    late = [c.rank for c in chairs if c.state in ("starting", "joined")]
    if late:
        return Blame(wait=True, why=f"rank {late[0]} is not in place yet, the others wait for it")
    sections = [rank for rank, record in active if record.section]
    if sections:
        return Blame(wait=True, why=f"rank {sections[0]} is in a section, the others wait for it")
    return Blame(why="all that stand still wait inside a collective")


@dataclass(slots=True)
class Standstill:
    """The ranks that were reported as stalled."""

    culprit_s: float
    found: dict[int, tuple[Finding, Chair]] = field(default_factory=dict)  # with the chair as it was then
    since: float = 0.0

    def add(self, finding: Finding, chair: Chair, now: float) -> None:
        """A rank does not move."""
        self.since = self.since if self.found else now
        self.found[finding.rank] = (finding, chair)

    def look(self, chairs: Iterable[Chair]) -> Blame:
        """Who is to blame now. chairs: as they were last reported."""
        current = {c.rank: c for c in chairs}
        self.found = {r: (f, c) for r, (f, c) in self.found.items() if r in current and not _moved(c, current[r])}
        return blame(current.values(), self.found) if self.found else Blame(wait=True)

    def due(self) -> float | None:
        """When waiting for a culprit's report is over."""
        return self.since + self.culprit_s if self.found else None


def _moved(before: Chair, after: Chair) -> bool:
    """Whether its worker has made progress since, or is another one."""
    return before.worker != after.worker or _marks(before) != _marks(after)


def _marks(chair: Chair) -> object:
    record = chair.record
    return None if record is None else (record.step, record.phase, record.entered, record.completed)
