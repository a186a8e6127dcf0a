"""Fleet: the nodes, as the coordinator knows them.

Think of the wall of photographs in a head office: one per house, with the newest letter pinned below it and a copy of the last answer.

Contract: plain data, written by coordinator.py alone, and two readings of it that decide nothing: what is new about a node's workers
(for events.jsonl), and the whole fleet for status.json.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from resilient.core import lines
from resilient.core.messages import NONE, Assignment, Chair, Report, RunState, Standby
from resilient.core.placement import Place
from resilient.core.straggler import Stragglers


@dataclass(slots=True)
class Node:
    """One agent."""

    name: str
    joined: int  # order of arrival
    report: Report
    heard: float  # when it was last known to live
    assignment: Assignment | None = None  # what was last sent
    sent: float = float("-inf")
    alive: bool = True
    stale: bool = False  # it was lost: its assignment may be old
    past: tuple[int, ...] = ()  # boots that a later one has followed, the last ones: a clock may go back, so their order says nothing
    since: dict[int, float] = field(default_factory=dict)  # boots that are not past, the last ones -> when they were first heard
    _names: list[str] = field(default_factory=list)  # of those who sat here when this was last asked
    _standbys: tuple[Standby, ...] = ()
    _known: frozenset[str] = frozenset()  # workers told of
    _ready: frozenset[str] = frozenset()  # standbys told of as parked

    def chair(self, rank: int) -> Chair | None:
        """As last reported."""
        return next((c for c in self.report.chairs if c.rank == rank), None)

    def news(self) -> list[lines.EventLine]:
        """Workers that were not there, or standbys not ready, when this was last asked."""
        names = [c.worker for c in self.report.chairs if c.pid]
        if names == self._names and self.report.standbys == self._standbys:
            return []
        self._names, self._standbys = names, self.report.standbys
        chairs = {c.worker: ("rank", c.pid, c.rank) for c in self.report.chairs if c.pid}
        present = {**{s.worker: ("standby", s.pid, s.shadow) for s in self.report.standbys if s.pid}, **chairs}
        ready = frozenset(s.worker for s in self.report.standbys if s.state == "parked")
        told: list[lines.EventLine] = []
        for worker in sorted(present.keys() - self._known):
            role, pid, rank = present[worker]
            told.append(lines.WorkerStarted(worker=worker, role=role, pid=pid, rank=rank, node=self.name))
        for worker in sorted(ready - self._ready):
            _, pid, rank = present[worker]
            told.append(lines.StandbyReady(worker=worker, pid=pid, shadow=rank, node=self.name))
        self._known, self._ready = frozenset(present), ready
        return told


def status(
    run: str,
    state: RunState,
    round: int,
    nodes: Collection[Node],
    places: Mapping[int, Place],
    checkpoint: lines.CheckpointStatus | None,
    replicas: lines.ReplicasStatus | None,
    stragglers: Stragglers,
    cordoned: Collection[str] = (),
) -> lines.Status:
    """What status.json says. O(ranks)."""
    chairs = {(n.name, c.rank): c for n in nodes for c in n.report.chairs}
    ranks = []
    for rank, place in sorted(places.items()):
        chair = chairs.get((place.node, rank))
        step = chair.record.step if chair and chair.record else NONE
        waits, score = stragglers.shares.get(rank), stragglers.scores.get(rank)
        ranks.append(lines.RankStatus(rank, place.node, place.local_rank, chair.pid if chair else 0, step, waits, score))
    standbys = [lines.StandbyStatus(n.name, s.pid, s.shadow, s.state == "parked") for n in nodes if n.alive for s in n.report.standbys]
    return lines.Status(
        run_id=run,
        state=state,
        round=round,
        world_size=len(ranks),
        ranks=tuple(ranks),
        standbys=tuple(standbys),
        checkpoint=checkpoint,
        replicas=replicas,
        cordoned=tuple(sorted(cordoned)),
    )
