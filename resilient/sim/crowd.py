"""Crowd: a very large fleet, whose nodes are only as real as the coordinator can tell.

Think of a crowd scene: twelve thousand extras who know three gestures each (report, fence, take your seats) and one actor.

Contract: nodes answer assignments within a millisecond and report as often as they are told, spread over the time. A killed node is
silent from then on. What is measured is the coordinator: everything else here is kept as cheap as it can be. Same seed, same minute.
"""

from __future__ import annotations

import heapq
import random
from dataclasses import dataclass, field

import msgspec

from resilient.core.coordinator import Coordinator
from resilient.core.lines import IncidentClosed
from resilient.core.machine import Announce, Assign, CoordinatorEvent, CoordinatorSettings, Finish, NodeLost, Tick
from resilient.core.messages import NONE, Assignment, Audit, Chair, Finding, Holding, Record, Report, Sum

WARM_UP_S = 0.5  # fork to commit, for everybody: the step of such a fleet is long


@dataclass(slots=True)
class Extra:
    """One node."""

    name: str
    report: Report
    acted: int = 0
    report_s: float = 1.0
    dead: bool = False
    faults: list[Finding] = field(default_factory=list)


class Crowd:
    """`nodes` nodes of `slots` ranks each, `spare` more without chairs."""

    def __init__(self, nodes: int, slots: int, *, spare: int = 0, seed: int = 0) -> None:
        """Everybody is there; nothing was said yet."""
        self.random = random.Random(seed)  # noqa: S311  a seed decides all, nothing is secret
        self.now = 1.0
        self.reports = 0
        self.closed: list[IncidentClosed] = []
        self.finish: Finish | None = None
        settings = CoordinatorSettings(run="run", leader="n0", nodes_min=nodes + spare, nodes_max=nodes, last_call_s=0.0)
        self.coordinator = Coordinator(settings)
        self._queue: list[tuple[float, int, CoordinatorEvent | str]] = []
        self._count = 0
        self._tick = 0.0
        self.extras: dict[str, Extra] = {}
        for i in range(nodes + spare):
            name = f"n{i}"
            store = "n0:1" if i == 0 else ""
            report = Report(run="run", node=name, boot=1, seq=0, host=name, slots=slots, available=(), store=store, managed=True)
            self.extras[name] = Extra(name, report)
            self._at(self.now + i / (nodes + spare), name)

    def _at(self, when: float, what: CoordinatorEvent | str) -> None:
        self._count += 1
        heapq.heappush(self._queue, (when, self._count, what))

    def run(self, seconds: float) -> None:
        """Play."""
        end = self.now + seconds
        while True:
            deadline = self.coordinator.deadline()
            if deadline is not None and deadline <= min(end, self._queue[0][0]):
                self.now = max(self.now, deadline)
                self._decide(Tick())
                continue
            if self._queue[0][0] > end:
                break
            self.now, _, what = heapq.heappop(self._queue)
            if isinstance(what, str):
                self._speak(self.extras[what], again=True)
            else:
                self._decide(what)
        self.now = end

    def kill_rank(self, rank: int) -> None:
        """A worker dies; its node says so."""
        place = self.coordinator.round.seating.places[rank]
        extra = self.extras[place.node]
        chairs = tuple(msgspec.structs.replace(c, state="dead", exit_code=-9) if c.rank == rank else c for c in extra.report.chairs)
        fault = Finding(seq=len(extra.faults) + 1, kind="exit", rank=rank, worker=f"{rank}.{extra.acted}", round=extra.acted, exit_code=-9)
        extra.faults.append(fault)
        extra.report = msgspec.structs.replace(extra.report, chairs=chairs, fenced=extra.acted)
        self._speak(extra)

    def kill_node(self, name: str) -> None:
        """A node dies, and its connection is reset."""
        self.extras[name].dead = True
        self._at(self.now, NodeLost(node=name))

    def audit(self, step: int, *, odd: int = NONE) -> None:
        """Every node has hashed what its ranks sealed at that step; rank `odd` holds something else."""
        world = len(self.coordinator.round.seating.places)
        for extra in self.extras.values():
            ranks = [chair.rank for chair in extra.report.chairs]
            alike = [("same", tuple(rank for rank in ranks if rank != odd)), ("other", tuple(rank for rank in ranks if rank == odd))]
            sums = tuple(Sum(twins=(0, world, 1), digest=digest, ranks=held) for digest, held in alike if held)
            extra.report = msgspec.structs.replace(extra.report, audit=Audit(step=step, round=extra.acted, sums=sums) if sums else None)

    def _speak(self, extra: Extra, *, again: bool = False) -> None:
        if extra.dead:
            return
        findings = tuple(f for f in extra.faults if f.round >= extra.acted)
        extra.report = msgspec.structs.replace(extra.report, seq=extra.report.seq + 1, findings=findings)
        self.reports += 1
        self._decide(extra.report)
        if again:
            self._at(self.now + extra.report_s, extra.name)

    def _decide(self, event: CoordinatorEvent) -> None:
        for action in self.coordinator.step(event, self.now):
            match action:
                case Assign():
                    self._obey(self.extras[action.node], action.assignment)
                case Announce(line=IncidentClosed()):
                    self.closed.append(action.line)  # type: ignore[arg-type]
                case Finish():
                    self.finish = action

    def _obey(self, extra: Extra, new: Assignment) -> None:
        if extra.dead:
            return
        extra.report_s = new.report_s
        changes: dict[str, object] = {"assigned": new.seq}
        later = 0.001
        if new.fence > extra.report.fenced:
            changes["fenced"] = new.fence
        if new.round > max(new.fence, extra.acted):
            extra.acted = new.round
            step = max(new.plan.step, 0) + 1
            record = Record(round=new.round, step=step, phase="running", regrouped_s=0.1, restored_s=0.2, committed_s=0.4)
            changes["round"] = new.round
            held = {c.rank: c for c in extra.report.chairs}
            changes["chairs"] = tuple(self._chair(new, s.rank, s.local_rank, record, held.get(s.rank)) for s in new.seats)
            neighbour = self.extras[f"n{(int(extra.name[1:]) + 1) % len(self.extras)}"]
            changes["holdings"] = tuple(Holding(rank=c.rank, own_step=step, own_steps=(step - 1, step)) for c in neighbour.report.chairs)
            later = WARM_UP_S
        if len(changes) > 1:
            changes["seq"] = extra.report.seq + 1
        extra.report = msgspec.structs.replace(extra.report, **changes)
        if len(changes) > 1:
            self._at(self.now + later, extra.report)

    def _chair(self, new: Assignment, rank: int, local_rank: int, record: Record, before: Chair | None) -> Chair:
        keeps = before is not None and before.worker not in new.put_down and before.state == "active"
        worker = before.worker if keeps and before is not None else f"{rank}.{new.round}"
        steps = (record.step - 1, record.step)
        return Chair(
            rank=rank,
            local_rank=local_rank,
            state="active",
            worker=worker,
            pid=1 + rank,
            record=record,
            replicated=True,
            layout="net",
            own_step=record.step,
            own_steps=steps,
            gate_step=NONE,
        )
