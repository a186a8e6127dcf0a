"""Invariants: what must hold after every step of the simulated fleet, whatever happens to it.

Contract: each method looks at what just changed and calls `world.check`. They are independent of the machines' own reasoning: they
count commits and look at seats, not at plans.
I1 a step is committed in a round by all of its ranks or, of the last one before a fence, by some; never two steps at once.
I4 rounds only grow, on the coordinator and on every agent.
I5 no rank is held by two unfenced workers.
I7 a step that was completed by all ranks is lost only if a plan said so, and only to the newest copy that all have.
Of moves: a chair leaves a node that lives only where that is closed or not admitted; it comes to an admitted node, and to a closed one only
where no other has room; only a lost node leaves the run without a place. No node is closed for what is the program's.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from resilient.core.lines import (
    EventLine,
    FindingLine,
    IncidentClosed,
    IncidentExplained,
    NodeCordoned,
    NodeOpened,
    RoundStarted,
    VerdictLine,
)
from resilient.core.rules import HARMLESS

if TYPE_CHECKING:
    from resilient.core.coordinator import Coordinator
    from resilient.sim.script import Script
    from resilient.sim.world import Host, World


class Invariants:
    """One per world."""

    def __init__(self, world: World) -> None:
        """Nothing has happened yet."""
        self._world = world
        self._round = self._fence = 0
        self._acted: dict[tuple[str, int], int] = {}
        self._commits: dict[tuple[int, int], set[int]] = {}  # (round, step completed) -> ranks
        self._last: dict[int, tuple[int, int]] = {}  # rank -> (round, step)
        self._places: dict[int, str] = {}
        self.cordoned: set[str] = set()
        self._program = False  # the last finding was the program's
        self.moves = 0
        self.explained: list[IncidentExplained] = []
        self.closed: list[IncidentClosed] = []
        self.rounds: list[RoundStarted] = []

    def line(self, line: EventLine) -> None:
        """Something was announced."""
        if isinstance(line, IncidentClosed):
            self.closed.append(line)
            phases = (line.detect, line.decide, line.regroup, line.restore, line.replay)
            self._world.check(min(phases) >= 0 and abs(sum(phases) - line.downtime_s) < 1e-2, f"wrong times: {line}")
        if isinstance(line, RoundStarted):
            self.rounds.append(line)
        if isinstance(line, IncidentExplained):
            self.explained.append(line)
        if isinstance(line, NodeCordoned):
            self.cordoned.add(line.node)
        if isinstance(line, NodeOpened):
            self.cordoned.discard(line.node)
        if isinstance(line, FindingLine):
            self._program = line.class_ in ("user", "ignore") or (bool(line.probe) and line.role != "cause")
        if isinstance(line, VerdictLine) and self._program:
            self._world.check(line.verdict in HARMLESS or "workers met it" in line.why, f"a node is blamed for nothing: {line}")

    def coordinator(self, it: Coordinator) -> None:
        """After each of its steps."""
        number, fence = it.round.number, it.round.fence
        self._world.check(number >= self._round and fence >= self._fence, "I4: a round went back")
        self._world.check(fence <= number <= fence + 1, f"round {number} and fence {fence}")
        if number > self._round:
            self._seated(it)
        self._round, self._fence = number, fence

    def _seated(self, it: Coordinator) -> None:
        """A round is out: who moved, from where, and where to."""
        places = {rank: place.node for rank, place in it.round.seating.places.items()}
        counts = Counter(places.values())
        reports = {n.name: n.report for n in it.nodes.values() if n.alive}
        free = {n for n, r in reports.items() if n not in self.cordoned and r.admitted and counts[n] < r.slots + r.spares}
        for rank, node in places.items():
            self._world.check(node in reports, f"rank {rank} sits on {node}, which is lost")
            before = self._places.get(rank, node)
            if before == node:
                continue
            self.moves += 1
            why = before not in reports or before in self.cordoned or not reports[before].admitted
            self._world.check(why, f"rank {rank} moved from {before} to {node} for no reason")
            self._world.check(reports[node].admitted, f"rank {rank} came to {node}, which is not admitted")
            self._world.check(node not in self.cordoned or not free, f"rank {rank} came to {node}, which is closed, and {free} had room")
        self._places = places

    def agent(self, host: Host) -> None:
        """After each of its steps."""
        key = (host.name, host.boot)
        self._world.check(host.agent.acted >= self._acted.get(key, 0), f"I4: {host.name} went back to round {host.agent.acted}")
        self._acted[key] = host.agent.acted

    def committed(self, script: Script) -> None:
        """A rank completed a step.

        One whose node is cut off, and whose chair has moved, may yet complete the step that it had voted for: nobody can tell it.
        """
        place = self._world.coordinator.round.seating.places.get(script.rank)
        if place is None or place.node != script.host.name:
            return
        ranks = self._commits.setdefault((script.round, script.step), set())
        self._world.check(script.rank not in ranks, f"I5: rank {script.rank} completed step {script.step} twice in round {script.round}")
        ranks.add(script.rank)
        before = self._commits.get((script.round, script.step - 1))
        whole = before is None or len(before) == len(self._world.ranks)
        self._world.check(whole, f"I1: step {script.step} of round {script.round} was completed before all had completed the one before")
        round_, step = self._last.get(script.rank, (0, 0))
        self._world.check(script.round >= round_, f"I4: rank {script.rank} went back from round {round_} to {script.round}")
        if script.round == round_:
            self._world.check(script.step == step + 1, f"I1: rank {script.rank} went from step {step} to {script.step}")
        self._last[script.rank] = (script.round, script.step)
