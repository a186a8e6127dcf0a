"""Messages: what the processes of a run tell each other.

Think of a theatre's pinboard: each house pins up all it knows (`Report`), the director pins up the whole seating plan
(`Assignment`). Nobody sends changes, so a lost sheet costs one interval and never correctness.

Contract: one frozen msgspec struct is wire form, log form and value. New fields go last, with a default; golden bytes in
tests/golden notice a broken format. Every message carries what fences it: a round, or the worker's id.
Words (rank, chair, round, step, snapshot ...) have the one meaning given in docs/glossary.md.

`step` is always the number of optimizer steps *completed*: a rank whose record says step=7 has done steps 0..6 and works on, or is
about to begin, the step that `run.steps` yields as 7. `NONE` (-1) means "no such step".
"""

from __future__ import annotations

from typing import Literal

import msgspec

NONE = -1  # "no step", "no rank": never a valid value of either

Phase = Literal["setup", "clean", "running", "voted", "committing", "done"]
# setup       before the loop's first step is known: holds no state that anybody could use
# clean       between steps, or parked at the boundary: holds exactly `step`
# running     inside the body of step `step`, nothing tracked has been changed yet
# voted       at the first gate; every collective before it has completed on this rank; waits for the others' votes
# committing  the vote passed: optimizers may have run; ends at the boundary, where `step` grows by one
# done        the loop is over and every rank is known to be clean at the last step

ChairState = Literal["empty", "starting", "joined", "active", "finished", "dead"]
# empty: no process yet; starting: forked; joined: called resilient.init(); active: inside run.steps, restored and running;
# finished: exited 0 after the loop; dead: gone in any other way (its record and its seals stay readable)

StandbyState = Literal["starting", "joined", "parked", "dead"]

TierName = Literal["none", "live", "memory", "peer", "persistent"]
VerdictName = Literal["ignore", "watch", "restart", "replace", "halt", "evict", "cordon"]
# evict: whoever sits on the device goes to another node, as soon as one has room, and nobody comes to this one;
# cordon: nobody comes to this node any more, and who sits there leaves with the next fault, if another node has room
Class = Literal["", "ignore", "user", "app-restart", "gpu-reset", "replace", "cordon"]
# What a fact asks for, whoever saw it; docs/probes.md tells each in a line. "": nobody has said
Role = Literal["cause", "symptom", "context", "cascade"]
# cause; symptom: something else failed first; context: a detail of another line, or a recovery; cascade: the runtime itself did it
RunState = Literal["forming", "running", "finished", "failed"]


class Msg(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """Base of everything on a wire: frozen, tagged with its class name, compared by value."""


# --------------------------------------------------------------------------- agent -> coordinator


class Tally(msgspec.Struct, frozen=True, array_like=True):
    """What one worker did on one group in the round in force."""

    name: int  # of a group: equal on all its members (wire/page.py); of two ranks that send to each other: `pair_name`
    entered: int  # operations begun
    completed: int  # and ended


class Record(Msg):
    """The ledger record of one worker's page, as its agent read it (see wire/page.py)."""

    round: int = 0  # the round whose groups this worker uses; 0 = none yet
    step: int = NONE  # steps completed
    phase: Phase = "setup"
    torn: bool = False  # tracked shared state changed outside a gate: this rank must be restored
    section: bool = False  # inside `run.section(...)`: not a hang
    entered: int = 0  # collectives entered since start, all groups
    completed: int = 0  # collectives completed since start, all groups
    idle_s: float = 0.0  # seconds since the page last moved, by the agent's clock
    broken_s: float = 0.0  # CLOCK_MONOTONIC seconds of this worker's node, 0 = not yet in this round:
    regrouped_s: float = 0.0  # groups of `round` were built
    restored_s: float = 0.0  # state was in place
    committed_s: float = 0.0  # first step completed in `round`
    waited_s: float = 0.0  # inside collectives, since its start
    loaded_s: float = 0.0  # between the beginning of a step and its first forward, since its start: mostly for data
    sections: int = 0  # how many it has opened, since its start
    begun: int = 0  # `entered`, when `step` was reached
    groups: tuple[Tally, ...] = ()  # where it has not moved for a moment


def pair_name(one: int, other: int) -> int:
    """In a `Tally`: what these two ranks send to each other."""
    return -((min(one, other) << 31 | max(one, other)) + 1)


def pair_of(name: int) -> tuple[int, int]:
    """The two ranks of a `pair_name`; it is below zero, a group's is not."""
    return (-name - 1) >> 31, (-name - 1) & (2**31 - 1)


class Chair(Msg):
    """One rank of this node: who sits there, what its page says, what its segments hold."""

    rank: int
    local_rank: int
    state: ChairState = "empty"
    worker: str = ""  # "" while empty
    pid: int = 0
    exit_code: int | None = None  # Python's convention: -9 = killed by signal 9
    record: Record | None = None
    replicated: bool = False  # its shared state is equal on every rank (DDP); False: a shard of its own
    layout: str = ""  # digest of names, dtypes, shapes, offsets of its shared state; "" before it is known
    own_step: int = NONE  # newest own state sealed at the start of a step
    gate_step: int = NONE  # own state sealed at the gate of the step that would make it `gate_step`
    snapshots: tuple[int, ...] = ()  # steps sealed in this node's memory tier for this rank, ascending
    own_steps: tuple[int, ...] = ()  # all own states sealed at the start of a step (two slots), ascending
    minuted: bool = False  # its agent has the results of all collectives that this rank made in its set-up so far
    pause_s: float = 0.0  # the longest pause of its page in the step under way, where it went on


class Standby(Msg):
    """A warm worker without a chair."""

    worker: str
    pid: int
    shadow: int  # the rank it ran the script as
    state: StandbyState = "starting"
    any_rank: bool = False


class Finding(Msg):
    """A fact that a probe, or a worker itself, saw. Repeated in every report until `Assignment.seen` covers it."""

    seq: int  # per agent boot, from 1; 0 = not numbered yet
    kind: str  # "exit", "stopped", "stalled", "exception", "suspect", "store_lost", ...; of probes: "xid", "ib-link", "oom-host", ...
    rank: int = NONE
    worker: str = ""
    pid: int = 0
    t: float = 0.0  # agent's CLOCK_MONOTONIC, seconds, of the fault itself where known
    age_s: float = 0.0  # how long before this report that was (clocks of two nodes are never compared)
    step: int = NONE
    round: int = 0
    text: str = ""  # one line for people; a traceback for kind="exception" (at most 16 KiB)
    fingerprint: str = ""  # kind="exception": type, message with numbers removed, innermost user frame
    consequence: bool = False  # kind="exception": it left a broken step, so it is nobody's fault
    exit_code: int | None = None
    probe: str = ""  # which one saw it; "" = the agent or the worker itself
    layer: str = ""  # where: "gpu", "driver", "nvlink", "nvswitch", "pcie", "nic", "nccl", "torch", "host-mem", "storage", ...
    code: str = ""  # the number or word that the layer itself gives it: "79", "SIGBUS", "UE"
    device: str = ""  # pci:dddd:bb:dd, gpu:N, rank:N, local_rank:N, pid:N, peer:X, npu:N, cpu:N, dev:NAME; several joined by commas
    class_: Class = msgspec.field(default="", name="class")
    role: Role = "cause"
    count: int = 1  # so many like it are told by this one
    clears: bool = False  # a recovery: what the same kind and device were found to have is over
    ranks: tuple[int, ...] | None = None  # that sit on `device`, as its agent knows; None = not known, or the whole node


class Holding(Msg):
    """A copy that this node keeps for a rank seated elsewhere (peer tier)."""

    rank: int
    own_step: int = NONE
    gate_step: int = NONE
    snapshots: tuple[int, ...] = ()
    own_steps: tuple[int, ...] = ()  # as in Chair
    native: bool = False  # left by a predecessor of this agent: by the rank's own worker, with the minutes of its set-up
    world_size: int = 0  # of the world that the snapshots are of; 0 = that of the run now


class Parity(Msg):
    """What this node keeps to give back one of several lost snapshots: stripes of them, laid over each other (checkpoint/parity.py)."""

    rank: int  # under which its vault keeps it; nobody's
    step: int
    stripes: int  # into how many a snapshot is cut
    parts: tuple[tuple[int, int], ...]  # (rank, number of the stripe), of each snapshot that is in it


class Persisted(Msg):
    """One rank's snapshot that lies complete on the persistent tier; not yet a checkpoint."""

    rank: int
    step: int
    num_bytes: int
    round: int = 0  # in which it was sealed; 0 = not known
    tail_at: int = 0  # where the file's tail begins (checkpoint/rankfile.py)
    digest: str = ""  # xxh3_128 of the tail, hex: from there every byte is under a digest


class Refused(Msg):
    """A copy that was read and found wrong: poisoned for all ranks."""

    tier: TierName
    step: int
    rank: int
    reason: str
    kind: str = "refused"  # or "replicas_differ"
    damaged: bool = False  # it was read; else its place may only not have answered


class Sum(Msg):
    """What some ranks sealed, equal to the last bit, as one digest; and who should have sealed the same."""

    twins: tuple[int, int, int]  # first rank, count, stride (checkpoint/layout.py)
    digest: str  # of their sheet (checkpoint/replicas.py), hex; "" where they have no twins
    ranks: tuple[int, ...]  # of this node, ascending


class Audit(Msg):
    """One step, which the workers' vote has named, as all ranks of a node sealed it."""

    step: int
    round: int  # in which it was sealed
    sums: tuple[Sum, ...]


class Difference(Msg):
    """Tensors that some replicas hold otherwise than the others."""

    ranks: tuple[int, ...]  # in the minority; all of them where there is no majority
    twins: int  # how many were compared
    text: str  # names the tensors


class Compared(Msg):
    """What came of a `Comparison`."""

    step: int
    round: int
    differences: tuple[Difference, ...] = ()
    void: str = ""  # not empty: why nothing can be said


class Pace(Msg):
    """How far one rank has come, when, and what its newest checkpoint cost it. Times: CLOCK_MONOTONIC of its node, seconds."""

    rank: int
    step: int  # completed
    at_s: float  # when that was, or (later) when a recovery had put it back there
    sealed: int = NONE  # newest step that it sealed for the persistent tier
    sealed_s: float = 0.0  # when that step was complete, the seal included
    stall_s: float = 0.0  # how long its training thread stood still for that seal; 0 where it would have sealed the step anyway


class Report(Msg):
    """Everything one node knows. Sent every second, and at once on any change."""

    run: str
    node: str
    boot: int  # which start of this agent; what comes later need not be larger, for clocks are set back
    seq: int  # counts reports of this boot; an older one is ignored
    host: str = ""  # address at which other nodes reach this one
    data_port: int = 0  # vault's port for peers
    store: str = ""  # "host:port" of the store process, on the node that hosts it
    slots: int = 0  # nproc-per-node: chairs at the start
    spares: int = 0  # further workers this node has room for (--standbys)
    node_rank: int = NONE  # --node-rank if given
    round: int = 0  # newest round this agent has acted on
    fenced: int = 0  # every page here says that rounds <= fenced are broken
    chairs: tuple[Chair, ...] = ()
    standbys: tuple[Standby, ...] = ()
    findings: tuple[Finding, ...] = ()
    holdings: tuple[Holding, ...] = ()
    persisted: tuple[Persisted, ...] = ()
    refused: tuple[Refused, ...] = ()
    available: tuple[int, ...] | None = None  # committed steps at the checkpoint URL; None = not listed yet
    fetched: tuple[int, ...] = ()  # ranks whose `Assignment.fetch` is in the local memory tier, verified
    committed: int = NONE  # newest step whose commit marker this node wrote
    leaving: bool = False  # SIGTERM/SIGINT arrived here
    assigned: int = 0  # seq of the newest Assignment that arrived here
    acted_s: float = 0.0  # CLOCK_MONOTONIC of this node when it acted on `round`; to be compared with its records' marks only
    managed: bool = False  # known here that the script uses this library (it joined, or its source names it)
    pace: Pace | None = None  # of rank 0, where it sits here: all ranks keep step
    data_host: str = ""  # address at which other nodes reach its vault; "": that of `host`
    failure_domain: str = ""  # what it shares with others that would be lost with it (rack, switch); "" = nothing that is known
    parities: tuple[Parity, ...] = ()
    past: int = 0  # newest round of what a predecessor of this agent left here: the run's next one is a later one
    audit: Audit | None = None  # the newest that is complete here
    compared: Compared | None = None  # leader only: the newest
    admitted: bool = True  # it may take ranks: False until its pre-flight checks have passed
    admission: str = ""  # admitted=False: which check has not passed, or is under way

    @property
    def vault(self) -> str:
        """Where its vault is reached."""
        return f"{self.data_host or self.host}:{self.data_port}"


# --------------------------------------------------------------------------- coordinator -> agent


class Seat(Msg):
    """One chair of the round in force, on the node that gets this."""

    rank: int
    local_rank: int
    fresh: bool = False  # True: the group (re)starts; False: a newcomer warms up in loopback, then takes the chair


class Plan(Msg):
    """Where everybody's state comes from at the start of a round."""

    step: int = NONE  # what every rank holds when the round's first step begins; NONE = the script's own initial state
    tier: TierName = "none"  # where those who need it get their shared state
    receivers: tuple[int, ...] = ()  # ranks that must be given shared state; everybody else keeps its own
    sources: tuple[int, ...] = ()  # tier="live": ranks that hold `step`
    repeat: tuple[int, ...] = ()  # receivers whose own state is one step old: they repeat it with the gate shut
    lender: int = NONE  # a rank whose snapshot of `step` serves every receiver for its shared state, which is replicated
    over: bool = False  # everybody else is past the end of the loop: a newcomer finishes alone, without groups
    starting: bool = False  # not every rank has come to the first step: groups are agreed upon, collectives perhaps repeated
    origin: int = 0  # tier memory, peer: the step was sealed in a world of so many ranks, and is cut for every rank of this one
    kept: int = NONE  # the newest step that every rank will have a snapshot of, if it is sharded: they overwrite it last


class Member(Msg):
    """A node of a group that keeps parity together."""

    vault: str  # "host:port"
    ranks: tuple[int, ...]  # that sit there, ascending


class Rebuild(Msg):
    """Where a lost snapshot's stripes are to be had, in order, and the other snapshots that are in there with them."""

    stripes: tuple[tuple[str, int], ...]  # (vault, rank under which it keeps the parity)
    others: tuple[tuple[int, str], ...]  # (rank, vault that has its snapshot of that step)


class Fetch(Msg):
    """A copy that must be brought into this node's memory tier before `rank` can be seated here."""

    rank: int
    step: int
    tier: TierName  # "peer" or "persistent"; "memory": it lies here, left by a predecessor of this agent
    source: str = ""  # peer: "host:port" of the vault that holds it
    round: int = 0  # the round that needs it: the same copy may be wanted again later, when it has been overwritten
    rebuild: Rebuild | None = None  # the snapshot is to be put together from parity; what else there is of the rank lies at `source`


class Sheet(Msg):
    """Where the digests of the tensors are to be had that some replicas have sealed."""

    vault: str  # "host:port"
    digest: str  # of the sheet, hex
    ranks: tuple[int, ...]  # all those that sealed exactly this, ascending


class Comparison(Msg):
    """Replicas whose digests of a step differ: find out in which tensors, and whose."""

    step: int
    round: int
    sheets: tuple[Sheet, ...]


class Elder(Msg):
    """A rank of a world of another size, and who has its snapshot of the plan's step: what is wanted of it is read there."""

    rank: int
    vaults: tuple[str, ...]  # "host:port", ascending


class Assignment(Msg):
    """Everything one node should be. A later one replaces an earlier one whole."""

    run: str
    node: str
    seq: int  # grows with every change of anything below
    state: RunState = "forming"
    fence: int = 0  # rounds <= fence are broken
    round: int = 0  # the round in force; == fence while a new one is being decided
    world_size: int = 0
    node_rank: int = 0
    nodes: int = 0
    seats: tuple[Seat, ...] = ()
    plan: Plan = Plan()
    store: str = ""  # "host:port"
    put_down: tuple[str, ...] = ()  # workers to be killed, after their evidence is saved
    incident: int = 0  # number of the open incident, 0 = none: evidence goes under it
    peers: tuple[str, ...] = ()  # "host:port" of the vaults that copy from here goes to
    fetch: tuple[Fetch, ...] = ()
    commit: int = NONE  # leader only: write the commit marker of this step
    manifest: tuple[Persisted, ...] = ()  # leader only: what that marker lists
    seen: int = 0  # findings up to this seq were taken in
    exit_code: int = 0  # state finished/failed: what resilient-run exits with
    message: str = ""  # state failed: the reason, for people
    restart: int = 0  # how many times the whole group was started again (TORCHELASTIC_RESTART_COUNT)
    report_s: float = 1.0  # between two reports in which nothing is new that somebody waits for
    evidence: int = 0  # incident whose stacks every node saves before it fences; 0 = none
    checkpoint: int = NONE  # besides those at a fixed interval: seal this step for the persistent tier, or the first one after it
    rescue: int = NONE  # state failed: bring what is sealed of this step to the persistent tier
    wait: bool = False  # state failed: do not end yet when all workers are gone; something sealed may be brought to safety
    distrusted: tuple[int, ...] = ()  # committed steps that somebody found damaged: whoever comes past one writes it anew
    group: tuple[Member, ...] = ()  # this node and those with which it keeps parity of their snapshots; () = whole copies go to `peers`
    term: int = 0  # of the coordinator: one that was started again has another, and knows nothing of what the first one said
    compare: Comparison | None = None  # leader only
    elders: tuple[Elder, ...] = ()  # plan.origin: all of them


# --------------------------------------------------------------------------- worker <-> its agent (Unix socket)


class Join(Msg):
    """worker -> agent: first message; `resilient.init` was called."""

    worker: str
    pid: int
    token: str
    any_rank: bool = False


class Layout(Msg):
    """worker -> agent: sizes of what this chair will seal. Answered by `Segments`."""

    rank: int
    digest: str
    replicated: bool
    own_bytes: int  # room for one own state
    snapshot_bytes: int  # room for one snapshot; 0 = this rank takes none
    often: bool = False  # it seals at fixed steps, whether or not somebody reads what it sealed before
    reshape: int = NONE  # bring that step of the persistent tier, which was written in another world, into these segments
    rows: bytes = b""  # for that: what is tracked (checkpoint/layout.py)
    world_size: int = 0
    own: bytes = b""  # for that: the own state with which the script began; an imported step has none
    origin: int = 0  # for that: not of the persistent tier, but from the snapshots of a world of so many ranks in the nodes' memories


class Recorded(Msg):
    """worker -> agent, and back to a newcomer of the same rank: result of a small collective made before the first step."""

    rank: int
    index: int
    key: str  # group, operation, shapes: a newcomer that asks for something else gets a clear error
    payload: bytes
    restart: int = 0  # which start of the group it belongs to (the agent writes it); an older one is worth nothing
    last: bool = False  # the agent's: the predecessor made no further one; whether the others have this behind them is open


class Recall(Msg):
    """worker (newcomer) -> agent: send `Recorded(rank, index)`, now or as soon as it exists."""

    rank: int
    index: int


class Unrecorded(Msg):
    """agent -> worker: its predecessor's set-up ended before this collective: from here on the worker is the rank."""

    index: int


class Unrepeatable(Msg):
    """worker -> agent: the set-up that was broken cannot be gone on with here; the group has to start again."""

    reason: str


class Suspect(Msg):
    """worker -> agent: a collective of this round failed here."""

    round: int
    text: str


class Raised(Msg):
    """worker -> agent: an uncaught exception is about to end this process."""

    step: int
    round: int
    fingerprint: str
    text: str
    consequence: bool
    torn_down: bool = False  # it left because it could not be put back (see train/step.py), not by an error


class Sealed(Msg):
    """worker -> agent: a step was sealed, look now. Sent where the page says that copies are made, and for the persistent tier."""

    audit: int = NONE  # this step is to be compared with that of other ranks, which have sealed it too


class Marked(Msg):
    """worker -> agent: something for events.jsonl (`run.log` values after their commit)."""

    step: int
    scalars: dict[str, float]


class Segments(Msg):
    """agent -> worker: the shared-memory files of its chair, allocated and pre-faulted."""

    rank: int
    own: str  # path; holds three slots of own_bytes: start a, start b, gate (checkpoint/snapshot.py)
    own_bytes: int
    slots: tuple[str, ...]  # paths of the snapshot slots
    snapshot_bytes: int
    error: str = ""  # not empty: could not be had; says the bytes wanted, the bytes free, and which setting helps
    own_of: int = NONE  # a reshaped step was brought here, with this old rank's own state
    refused: str = ""  # not empty: why that step could not be brought


class Seated(Msg):
    """agent -> worker: the chair it holds in the round in force. A later one replaces an earlier one."""

    round: int
    rank: int
    local_rank: int
    world_size: int
    node_rank: int
    nodes: int
    local_world_size: int
    store: str
    plan: Plan
    snapshot: str = ""  # path of a sealed snapshot of `plan.step` for this rank, or of the lender's (tier memory, peer, persistent)
    own: str = ""  # path of this chair's own segment, "" before there is one
    own_bytes: int = 0


class Fenced(Msg):
    """agent -> worker: rounds up to this one are broken (the page's fence already says so): unblock everything."""

    round: int


class Leave(Msg):
    """agent -> worker: the run is over or this worker is not wanted: end quietly."""

    reason: str = ""


WorkerUp = Join | Layout | Recorded | Recall | Unrepeatable | Suspect | Raised | Marked | Refused | Sealed
WorkerDown = Segments | Seated | Recorded | Unrecorded | Fenced | Leave
