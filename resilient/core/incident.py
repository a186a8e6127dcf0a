"""Incident: from the fault until every rank has committed a step again.

Think of the report of a fire brigade: when it burned, when the call came, when the crew left, when the fire was out. Each entry is made
by the clock of the house where it happened, and only differences within one house are used.

Contract: an incident is named by the round that broke; later faults before it is closed belong to it. The phases follow each other, so
`downtime_s` is their sum:
detect   fault -> its agent saw it             (agent's clock: the finding's age in the first report)
decide   first report -> the last round is out (coordinator's clock; attempts that broke again count here)
regroup, restore, replay                       (each node's clock, since its agent acted on the round; the last rank counts)
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from resilient.core.lines import IncidentClosed
from resilient.core.messages import NONE, Finding, Plan, Report, VerdictName
from resilient.core.policy import Verdict

_WEIGHT = {"ignore": 0, "watch": 1, "restart": 2, "replace": 3, "halt": 4}  # which of several findings is called the cause


@dataclass(slots=True)
class Incident:
    """An open incident."""

    number: int  # the round that broke
    opened: float  # coordinator's clock
    cause: str = "suspect"
    rank: int = NONE
    node: str = ""
    pid: int = 0
    verdict: VerdictName = "watch"
    detect_s: float = 0.0
    decided: float = 0.0  # coordinator's clock: when the newest round was sent out
    reached: int = NONE  # the newest step that every rank was known to have completed
    plan: Plan = field(default_factory=Plan)  # of the newest round
    known: bool = True  # steps are known (the group uses this library)
    _weight: int = -1

    def take(self, finding: Finding, verdict: Verdict, node: str) -> None:
        """A finding that belongs to it; the first one of the greatest weight is the cause."""
        weight = 0 if finding.consequence else _WEIGHT[verdict.verdict]
        if weight > self._weight:
            self._weight = weight
            self.cause, self.rank, self.node, self.pid = finding.kind, finding.rank, node, finding.pid
            self.verdict, self.detect_s = verdict.verdict, max(0.0, finding.age_s)

    def decide(self, plan: Plan, reached: int, now: float) -> None:
        """A round is out."""
        self.plan, self.decided = plan, now
        self.reached = max(self.reached, reached)

    def close(self, reports: Iterable[Report], round: int, now: float) -> IncidentClosed:
        """Every rank has committed in `round`."""
        decide = max(0.0, self.decided - self.opened)
        regroup, restore, replay = phases(reports, round) if self.known else (max(0.0, now - self.decided), 0.0, 0.0)
        return IncidentClosed(
            incident=self.number,
            cause=self.cause,
            rank=self.rank,
            node=self.node,
            pid=self.pid,
            verdict=self.verdict,
            restored_from=self.plan.tier,
            steps_lost=max(0, self.reached - max(self.plan.step, 0)) if self.known else NONE,
            downtime_s=round_ms(self.detect_s + decide + regroup + restore + replay),
            detect=round_ms(self.detect_s),
            decide=round_ms(decide),
            regroup=round_ms(regroup),
            restore=round_ms(restore),
            replay=round_ms(replay),
        )


def phases(reports: Iterable[Report], round: int) -> tuple[float, float, float]:
    """Seconds of regroup, restore and replay of `round`. Each node's marks are compared with its own clock only."""
    grouped = restored = committed = 0.0
    for report in reports:
        for chair in report.chairs:
            record = chair.record
            if record is None or record.round != round or report.round != round:
                continue
            grouped = max(grouped, record.regrouped_s - report.acted_s)
            restored = max(restored, record.restored_s - report.acted_s)
            committed = max(committed, record.committed_s - report.acted_s)
    restored = max(grouped, restored)
    return grouped, restored - grouped, max(restored, committed) - restored


def round_ms(seconds: float) -> float:
    """Tenths of a millisecond are enough for a log."""
    return round(seconds, 4)
