"""Incident: from the fault until every rank has committed a step again.

Think of the report of a fire brigade: when it burned, when the call came, when the crew left, when the fire was out. Each entry is made
by the clock of the house where it happened, and only differences within one house are used.

Contract: an incident is named by the round that broke; later faults before it is closed belong to it. The phases follow each other, so
`downtime_s` is their sum. The cause is what a probe saw around the fault and what explains it (cause.py), also when that is heard last;
where no probe saw anything, the gravest of the faults themselves. Everything else is a consequence, and counted.
detect   fault -> its agent saw it             (agent's clock: the finding's age in the first report)
decide   first report -> the last round is out (coordinator's clock; attempts that broke again count here)
regroup, restore, replay                       (each node's clock, since its agent acted on the round; the last rank counts)
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from resilient.core.cause import BROKEN, GRAVITY, Failure, Seen, pick
from resilient.core.lines import IncidentClosed, IncidentExplained
from resilient.core.messages import NONE, Finding, Plan, Report, VerdictName
from resilient.core.policy import Verdict, users_fault

_WEIGHT = {"ignore": 0, "watch": 1, "cordon": 2, "restart": 3, "replace": 4, "evict": 5, "halt": 6}  # which of several is the cause
COMPLAINTS = ("suspect", "stalled")  # of those that wait for somebody else, as like as not
EVIDENCE_MAX, SEEN_MAX, FAILURES_MAX = 16, 64, 32  # a storm is looked through with every fault that it brings
TEXT_MAX = 160


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
    symptom: str = "suspect"  # what it opened with, or the gravest fault since
    culprit: Seen | None = None  # what explains it
    consequences: int = 0
    heard: bool = False  # what was seen before it
    closed: float | None = None
    _weight: int = -1
    failures: list[Failure] = field(default_factory=list)
    _complaints: list[Failure] = field(default_factory=list)
    _ends: dict[Failure, Finding] = field(default_factory=dict)  # what was seen of each of them
    _seen: list[Seen] = field(default_factory=list)

    def take(self, finding: Finding, verdict: Verdict, node: str) -> None:
        """A finding that belongs to it; the first one of the greatest weight is the cause."""
        self.consequences += finding.count
        failures = self._complaints if finding.consequence or finding.kind in COMPLAINTS else self.failures
        if len(failures) < FAILURES_MAX:
            failures.append(failure := (node, NONE if finding.kind == "node_lost" else finding.rank))
            self._ends[failure] = finding
        weight = 0 if finding.consequence else _WEIGHT[verdict.verdict]
        if weight > self._weight:
            self._weight = weight
            self.symptom, self.rank, self.node, self.pid = finding.kind, finding.rank, node, finding.pid
            self.cause, self.verdict, self.detect_s = finding.kind, verdict.verdict, max(0.0, finding.age_s)
        self._explain()

    def explain(self, seen: Iterable[Seen]) -> bool:
        """What probes saw, before it or since; True if that changes the cause."""
        before = self.culprit
        for it in seen:
            self.consequences += it.finding.count
            self._seen.append(it)
            if len(self._seen) > SEEN_MAX:  # a storm: what is broken comes last as often as first
                self._seen.remove(min(self._seen, key=lambda it: (it is before, it.proof, GRAVITY.get(it.class_, 0), -it.at)))
        self._explain()
        return self.culprit is not before

    def _explain(self) -> None:
        self.culprit = pick(self.failures or self._complaints, (it for it in self._seen if it.class_ != "user" or self._users(it)))
        if self.closed is not None:
            self._spend()
        if (it := self.culprit) is not None:
            if it.finding.rank != NONE or it.node != self.node:
                self.rank, self.pid = it.finding.rank, it.finding.pid
            self.cause, self.node = it.finding.kind, it.node
            self.verdict = max(self.verdict, it.verdict, key=_WEIGHT.__getitem__)

    def _users(self, seen: Seen) -> bool:
        """Whether somebody ended as one does of this fault of the program's."""
        return any(seen.near((failure,)) == 2 and users_fault(end, seen) for failure, end in self._ends.items())

    def _spend(self) -> None:
        """What explains this explains nothing else."""
        for it in self._seen:
            it.spent = it.spent or it is self.culprit or it.near(self.failures) > 0

    def late(self, seen: Iterable[Seen], now: float, after_s: float) -> list[Seen]:
        """It is closed: of what is heard now, that which may have been its cause, for it happened before or says what is broken."""
        if self.closed is None or now - self.closed > after_s:
            return []
        return [it for it in seen if it.at <= self.closed or (it.proof and it.class_ in BROKEN)]

    def explained(self) -> IncidentExplained:
        """The cause, as it is known after all."""
        it = self.culprit
        assert it is not None, "somebody explained it"
        return IncidentExplained(
            incident=self.number,
            cause=it.finding.kind,
            rank=it.finding.rank,
            node=it.node,
            device=it.finding.device,
            class_=it.class_,
            why=it.why,
            evidence=self._evidence(),
        )

    def _evidence(self) -> tuple[str, ...]:
        order = sorted(self._seen, key=lambda it: (it is not self.culprit, it.at))
        return tuple(f"{it.node}: {it.name}: {it.finding.text}"[:TEXT_MAX] for it in order[:EVIDENCE_MAX])

    def decide(self, plan: Plan, reached: int, now: float) -> None:
        """A round is out."""
        self.plan, self.decided = plan, now
        self.reached = max(self.reached, reached)

    def close(self, reports: Iterable[Report], round: int, now: float) -> IncidentClosed:
        """Every rank has committed in `round`."""
        self.closed = now
        self._spend()
        it = self.culprit
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
            device=it.finding.device if it else "",
            class_=it.class_ if it else "",
            why=it.why if it else "",
            consequences=max(0, self.consequences - 1),
            evidence=self._evidence(),
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
