"""Cause: of all that was seen around a fault, what came first and explains it.

Think of a power cut: every house reports a dark lamp, one reports a bang at the transformer. The lamps are counted, the bang is written
down as the cause, also when its report came last.

Contract: `pick` is pure. What can be a cause: a finding of role "cause" whose class is not "ignore", about a rank that failed, or its
node. What proof says is broken (gpu-reset, replace) explains a failure anywhere in the run, for one lost device breaks collectives on
other nodes first. What is the program's explains only the failure of its own rank. Of several: what is broken and proven, then what is
nearest, then the gravest, then the earliest. `Casebook` keeps what was seen lately, says each thing once, and notices what is seen on so
many nodes at once that none of them is to blame. What has explained one incident explains no other, but for a device that is broken to
those who still sit on it; what one worker met explains nothing of the next one in its chair.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final

from resilient.core.messages import NONE, Class, Finding, VerdictName
from resilient.core.rules import Limits

SEEN_MAX: Final = 512
TOLD_MAX: Final = 4096
KINDS_MAX: Final = 256
GRAVITY: Final[dict[Class, int]] = {"replace": 5, "gpu-reset": 4, "cordon": 3, "app-restart": 2, "user": 1}
BROKEN: Final = ("gpu-reset", "replace")

WORKERS: Final = ("user", "app-restart")  # one process met it, and the next one is another matter

Failure = tuple[str, int]  # node, rank; NONE: the whole node


@dataclass(slots=True)
class Seen:
    """One finding that may be a cause, as the policy reads it."""

    at: float  # when it happened, by the coordinator's clock
    node: str  # that it is about
    finding: Finding
    class_: Class
    verdict: VerdictName
    why: str
    proof: bool
    shared: bool = False
    spent: bool = False  # it has explained something

    @property
    def name(self) -> str:
        """In short."""
        return f"{self.finding.kind} {self.finding.code}".rstrip() + (f" on {self.finding.device}" if self.finding.device else "")

    def near(self, failures: Iterable[Failure]) -> int:
        """2: it is about a rank that failed; 1: about its node; 0: about something else."""
        ranks, nearest = self.finding.ranks, 0
        anybody = ranks is None or (not ranks and self.finding.device.startswith("pid:"))  # a child of a worker, as like as not
        for node, rank in failures:
            if node == self.node:
                nearest = max(nearest, 2 if ranks and (rank in ranks or rank == NONE) else 1 if anybody else 0)
        return nearest


def pick(failures: Sequence[Failure], seen: Iterable[Seen]) -> Seen | None:
    """What explains these failures, if anything does."""
    best: Seen | None = None
    most: tuple[float, ...] = ()
    for it in seen:
        near = it.near(failures)
        broken = it.proof and it.class_ in BROKEN
        if near < (2 if it.class_ == "user" else 0 if broken else 1):
            continue
        order = (broken, near, GRAVITY.get(it.class_, 0), it.proof, -it.at)
        if order > most:
            best, most = it, order
    return best


@dataclass(slots=True)
class Casebook:
    """What was seen lately."""

    limits: Limits
    seen: deque[Seen] = field(default_factory=lambda: deque(maxlen=SEEN_MAX))
    failures: deque[tuple[float, Failure]] = field(default_factory=lambda: deque(maxlen=SEEN_MAX))
    _told: dict[tuple[str, ...], float] = field(default_factory=dict)
    _nodes: dict[tuple[str, str], dict[str, float]] = field(default_factory=dict)  # (kind, code) -> node -> when
    _shared: dict[tuple[str, str], float] = field(default_factory=dict)  # until when it is

    def lately(self, now: float, failures: Sequence[Failure]) -> list[Seen]:
        """What was seen in the window before a fault, and has not explained another one."""
        recent = (it for it in self.seen if now - it.at <= self.limits.before_s)
        return [it for it in recent if not it.spent or (it.proof and it.class_ in BROKEN and it.near(failures) == 2)]

    def note(self, seen: Seen) -> bool:
        """Write it down; False if it is there already, and nobody has failed of it since."""
        for it in reversed(self.seen):
            if it.node == seen.node and it.name == seen.name and it.class_ == seen.class_:
                fresh = it.spent or seen.at - it.at > self.limits.before_s
                if not fresh and not any(at >= it.at and it.near((failure,)) for at, failure in self.failures):
                    return False
                break
        self.seen.append(seen)
        return True

    def failed(self, failure: Failure, now: float) -> None:
        """A worker failed, or a node."""
        self.failures.append((now, failure))

    def explain(self, failure: Failure, worker: str, now: float) -> Seen | None:
        """What explains that this worker fails now."""
        before = max((at for at, other in self.failures if other == failure and at < now), default=-math.inf)

        def its_own(it: Seen) -> bool:
            return it.class_ not in WORKERS or (it.at > before and (it.finding.worker or worker) == worker)

        return pick((failure,), (it for it in self.lately(now, (failure,)) if it.near((failure,)) and its_own(it)))

    def news(self, finding: Finding, node: str, now: float) -> bool:
        """Whether it has to be told: not if the same was, a moment ago."""
        key: tuple[str, ...] = (node, finding.kind, finding.role)  # what follows from something comes in a hundred forms
        if finding.role in ("cause", "context") or finding.clears:
            key = (*key, finding.code, finding.device, finding.class_, finding.probe, str(finding.clears))
        if now - self._told.get(key, -math.inf) <= self.limits.before_s:
            return False
        self._told.pop(key, None)  # those that were told last stand last
        self._told[key] = now
        if len(self._told) > TOLD_MAX:
            del self._told[next(iter(self._told))]
        return True

    def shared(self, finding: Finding, node: str, now: float, alive: int) -> int:
        """On how many nodes it is, if these are so many that it is nobody's own; else 0."""
        key, limits = (finding.kind, finding.code), self.limits
        nodes = self._nodes.get(key, {})
        if now > self._shared.get(key, -math.inf):  # else it is known, and of thousands of nodes each need not look at all
            nodes = {n: at for n, at in nodes.items() if now - at <= limits.shared_window_s}
        nodes[node] = now
        self._nodes[key] = nodes
        if len(self._nodes) > KINDS_MAX:
            del self._nodes[next(iter(self._nodes))]
        if len(nodes) >= max(limits.shared_nodes, math.ceil(limits.shared_share * alive)):
            self._shared[key] = now + limits.shared_window_s
        return len(nodes) if now <= self._shared.get(key, -math.inf) else 0
