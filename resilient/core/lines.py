"""What the world outside is told: the lines of events.jsonl and the content of status.json.

Think of a ship's log and the board on the bridge: the log is only ever appended to, the board shows now. Tools that are not ours read
both, so names and meanings here are promises: fields are added, never renamed.

Contract: a line is a struct whose tag is its "event"; the host adds "t" (unix seconds), and "updated_at" to the status. All durations
are seconds, steps are steps completed, -1 means "not known" or "none".
"""

from __future__ import annotations

from typing import TypeAlias

import msgspec

from resilient.core.messages import NONE, Class, Finding, RunState, TierName, VerdictName


def _snake(name: str) -> str:
    return "".join("_" + c.lower() if c.isupper() else c for c in name).lstrip("_")


class Line(msgspec.Struct, frozen=True, kw_only=True, tag_field="event", tag=_snake):
    """One line of events.jsonl; the host adds "t", unix seconds."""


class RunStarted(Line):
    """All nodes that are needed are there."""

    run_id: str
    world_size: int
    nodes: tuple[str, ...]


class WorkerStarted(Line):
    """A process was forked."""

    worker: str
    role: str  # "rank" | "standby"
    pid: int
    rank: int  # its chair, or the one it shadows
    node: str


class StandbyReady(Line):
    """A standby has finished its warm-up."""

    worker: str
    pid: int
    shadow: int
    node: str


class FindingLine(Line, tag="finding"):
    """A fact that somebody saw."""

    kind: str
    node: str
    rank: int = NONE
    worker: str = ""
    pid: int = 0
    step: int = NONE
    round: int = 0
    exit_code: int | None = None
    text: str = ""
    probe: str = ""  # which one saw it; "" = the agent or the worker itself
    layer: str = ""
    code: str = ""
    device: str = ""
    class_: Class = msgspec.field(default="", name="class")
    role: str = "cause"
    count: int = 1  # so many like it
    clears: bool = False  # a recovery


class VerdictLine(Line, tag="verdict"):
    """What the policy makes of it."""

    verdict: VerdictName
    kind: str
    node: str
    rank: int
    worker: str
    why: str


class RoundStarted(Line):
    """A seating plan is out."""

    round: int
    reason: str
    step: int = NONE
    tier: TierName = "none"
    receivers: int = 0  # how many ranks are given state
    emptied: tuple[int, ...] = ()  # chairs that get another worker (at most 64 are listed)
    why: tuple[str, ...] = ()  # plan and placement, in words (at most 64 lines)


class CheckpointCommitted(Line):
    """The commit marker of this step is written."""

    step: int
    tier: TierName = "persistent"


class IncidentClosed(Line):
    """Every rank has committed a step again. All times in seconds."""

    incident: int  # the round that broke
    cause: str
    rank: int
    node: str
    pid: int
    verdict: VerdictName
    restored_from: TierName
    steps_lost: int  # -1 = not known (a group that does not use this library)
    downtime_s: float  # the sum of the phases
    detect: float  # from the fault until its node had seen it
    decide: float  # until the round that held was sent out; broken attempts in between count here
    regroup: float  # until the last rank had its groups
    restore: float  # until the last rank had its state
    replay: float  # until the last rank had committed a step
    device: str = ""  # that is to blame
    class_: Class = msgspec.field(default="", name="class")  # of the finding that is the cause; "" where no probe saw one
    why: str = ""  # what the policy made of it
    consequences: int = 0  # findings that followed from it, counted
    evidence: tuple[str, ...] = ()  # what was seen around it, the cause first (at most 16)


class IncidentExplained(Line):
    """After an incident was closed its cause became known."""

    incident: int
    cause: str
    rank: int
    node: str
    device: str
    class_: Class = msgspec.field(default="", name="class")
    why: str = ""
    evidence: tuple[str, ...] = ()


class NodeCordoned(Line):
    """This node takes no newcomers from here on."""

    node: str
    kind: str
    device: str
    verdict: VerdictName  # "evict": and who sits on the device has to leave it
    why: str


class NodeOpened(Line):
    """What a node was cordoned for is over."""

    node: str
    kind: str
    device: str


class RunFinished(Line):
    """The last line."""

    exit_code: int
    message: str = ""


EventLine: TypeAlias = (
    RunStarted
    | WorkerStarted
    | StandbyReady
    | FindingLine
    | VerdictLine
    | RoundStarted
    | CheckpointCommitted
    | IncidentClosed
    | IncidentExplained
    | NodeCordoned
    | NodeOpened
    | RunFinished
)


class RankStatus(msgspec.Struct, frozen=True):
    """One element of status.json's `ranks`."""

    rank: int
    node: str
    local_rank: int
    pid: int
    step: int
    waits: float | None = None  # share of a step that it is inside collectives; null before some steps are measured
    slower: float | None = None  # by what share of a step the others wait longer than it: who makes them wait (core/straggler.py)


class StandbyStatus(msgspec.Struct, frozen=True):
    """One element of status.json's `standbys`."""

    node: str
    pid: int
    shadow: int
    ready: bool


class CheckpointStatus(msgspec.Struct, frozen=True, kw_only=True):
    """status.json's `checkpoint`: how often, what one costs, and what that was chosen for (core/cadence.py)."""

    every: int  # steps from one to the next; 0 = none by themselves, or (auto) not known before the first one is measured
    auto: bool
    next: int  # the step that was named last, NONE where the interval is fixed and nobody asked
    committed: int  # newest step with a commit marker
    cost_s: float | None  # of one, stall and slow-down together; null before one is measured
    stall_s: float | None  # of that, how long the training thread stood still
    step_s: float  # of an undisturbed step
    failures: int  # of this run that its memory did not survive
    failures_per_day: float  # expected, of the whole fleet


class ReplicasStatus(msgspec.Struct, frozen=True, kw_only=True):
    """status.json's `replicas`: whether they are equal, as far as was looked (core/audits.py)."""

    audits: int  # how many steps were compared
    step: int  # the newest of them
    differ: tuple[int, ...]  # ranks in the minority, or all where there is no majority (at most 64 are listed); none if all are equal
    since: int  # the step at which that was found first


class Status(msgspec.Struct, frozen=True, kw_only=True):
    """status.json without `updated_at`, which the host adds."""

    run_id: str
    state: RunState
    round: int
    world_size: int
    ranks: tuple[RankStatus, ...]
    standbys: tuple[StandbyStatus, ...]
    checkpoint: CheckpointStatus | None = None  # null without --checkpoint
    replicas: ReplicasStatus | None = None  # null before the first audit, and where nothing is replicated
    cordoned: tuple[str, ...] = ()  # nodes that take no newcomers


def finding(fact: Finding, node: str) -> FindingLine:
    """The line for a finding."""
    return FindingLine(
        kind=fact.kind,
        node=node,
        rank=fact.rank,
        worker=fact.worker,
        pid=fact.pid,
        step=fact.step,
        round=fact.round,
        exit_code=fact.exit_code,
        text=fact.text,
        probe=fact.probe,
        layer=fact.layer,
        code=fact.code,
        device=fact.device,
        class_=fact.class_,
        role=fact.role,
        count=fact.count,
        clears=fact.clears,
    )


def judged(fact: Finding, verdict: VerdictName, why: str, node: str) -> VerdictLine:
    """The line for the verdict on it."""
    return VerdictLine(verdict=verdict, why=why, kind=fact.kind, node=node, rank=fact.rank, worker=fact.worker)
