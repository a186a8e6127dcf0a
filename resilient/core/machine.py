"""What goes into the two machines and what comes out: every event, every action, and the settings of both.

Think of two chess players who move only when spoken to. The host tells one what happened (an event) and what time it is; the answer
is a list of things to do (actions). The player has no clock, no hands and no luck: the same game always gets the same moves.

Contract (the whole of it): `step(event, now) -> [action]`; the host performs the actions in list order, and hands the result of each,
where it has one, back as an event; `deadline()` says when to `step(Tick(), now)` if nothing else happens, None = never.
`now` is CLOCK_MONOTONIC of the machine's own node in seconds and never goes back; clocks of two nodes are never compared.

Events and actions never leave their process: what is sent to another one is in messages.py. A host that is new here should read
`AgentSettings`, then the agent's events and actions in the order of this file; the docstring of each says what the host must do.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

from resilient.core.lines import EventLine
from resilient.core.messages import (
    NONE,
    Assignment,
    Audit,
    Compared,
    Comparison,
    Elder,
    Fetch,
    Finding,
    Holding,
    Layout,
    Marked,
    Member,
    Msg,
    Pace,
    Parity,
    Persisted,
    Record,
    Recorded,
    Refused,
    Report,
    Segments,
    WorkerDown,
    WorkerUp,
)
from resilient.core.rules import Rules

# --------------------------------------------------------------------------- both machines

Hang = Literal["act", "report", "off"]  # what is done about ranks that do not move; report: it is told, and nothing else


class Tick(Msg):
    """`deadline()` is reached. Harmless at any other time."""


class Stop(Msg):
    """This process got SIGTERM or SIGINT (agent), or is to end the run in order (coordinator)."""

    signal: int = 15


# --------------------------------------------------------------------------- agent: settings


class AgentSettings(Msg):
    """What an agent is told once, at its start."""

    run: str
    node: str  # name, unique in the run, such as "n0"
    boot: int = 1  # which start of this agent on this node
    slots: int = 1  # --nproc-per-node
    standbys: int = 0  # --standbys K; for --shadows all: the same number as `slots`
    host: str = "127.0.0.1"  # address at which other nodes reach this one
    data_port: int = 0  # the vault's port for peers
    data_host: str = ""  # the vault's address, where it is not `host`
    failure_domain: str = ""  # --failure-domain
    node_rank: int = NONE  # --node-rank if given
    hosts_store: bool = False  # this node runs the store process
    managed: bool = False  # the script's source names `resilient`; otherwise the first Join tells
    first_step_timeout_s: float = 600.0  # --first-step-timeout; a compile takes minutes
    shutdown_timeout_s: float = 30.0  # torchrun's --shutdown-timeout: SIGTERM, this long, SIGKILL
    join_timeout_s: float = 600.0  # without any Assignment at the start: torchrun's rendezvous timeout
    orphan_s: float = 30.0  # without any Assignment later: three leases; then the coordinator is gone for good
    grace_s: float = 0.0  # --grace-s, where there is a checkpoint URL: from SIGTERM until everything here has ended
    gated: bool = False  # no ranks come here before `Admitted` says that the pre-flight checks have passed
    devices: dict[str, int] = {}  # "pci:0000:1a:00", "gpu:3" -> local rank that uses it; a later `Devices` replaces it
    hang: Hang = "act"  # --hang


# --------------------------------------------------------------------------- agent: events


class Look(Msg):
    """One worker, as seen through its page and /proc."""

    record: Record
    parked: bool = False
    os_state: str = "R"  # third field of /proc/<pid>/stat: R S T t D Z
    cpu_s: float = 0.0  # user + system time it has used
    pace: Pace | None = None  # of whoever holds a chair


class Seals(Msg):
    """What one chair's segments on this node hold, read from their headers."""

    own: str = ""  # path of the own segment, "" before there is one
    own_bytes: int = 0
    own_steps: tuple[int, ...] = ()  # own states sealed at the start of a step, ascending
    gate_step: int = NONE  # own state sealed at the gate of the step that would make it `gate_step`
    snapshots: dict[int, str] = {}  # sealed step -> path of the slot


class Looked(Msg):
    """The host looked at all pages: every `Agent.look_every_s()` seconds, and at once after `Fence`.

    `workers` has every worker whose page exists, the dead ones (whose pages are kept until `Forget`) included.
    `seals` has every rank with segments here.
    """

    workers: dict[str, Look]
    seals: dict[int, Seals] = {}
    fence: int = 0  # the answer to Fence(round=fence): everything here was read after all fences were set. 0 = just a look


class Forked(Msg):
    """`Fork` worked. Comes before anything else of this worker."""

    worker: str
    pid: int


class ForkFailed(Msg):
    """`Fork` did not work (no page, no pid ...). Not for a zygote that died: that is ZygoteDown."""

    worker: str
    reason: str


class Exited(Msg):
    """The worker is gone and reaped. Its last `Said` comes before."""

    worker: str
    exit_code: int  # Python's convention: -9 = killed by signal 9
    text: str = ""  # what its error file says, if it left one


class Said(Msg):
    """A frame from a worker's socket whose token was right. `worker=""`: the vault brings a Recorded back with a Fetch."""

    worker: str
    message: WorkerUp


class Assigned(Msg):
    """The coordinator's word for this node."""

    assignment: Assignment


class LinkUp(Msg):
    """The connection to the coordinator stands (again). Answered by a report."""


class LinkDown(Msg):
    """The connection to the coordinator broke; the host goes on trying."""

    reason: str = ""


class Allocated(Msg):
    """`Allocate` is done; `segments.error` tells if it failed."""

    worker: str
    segments: Segments


class Vaulted(Msg):
    """All that the vault knows besides `Seals`. Given whole, at every change, the first time at start."""

    holdings: tuple[Holding, ...] = ()  # copies kept here for ranks seated elsewhere
    persisted: tuple[Persisted, ...] = ()  # complete on the persistent tier, not yet in a committed checkpoint
    refused: tuple[Refused, ...] = ()  # copies that were read and found wrong
    available: tuple[int, ...] | None = None  # committed steps at the checkpoint URL; () if there is no URL; None = not listed yet
    fetched: tuple[Fetch, ...] = ()  # those of `VaultDo.fetch` that lie verified in this node's memory tier
    committed: int = NONE  # newest step whose commit marker this node wrote
    parities: tuple[Parity, ...] = ()  # kept here
    past: int = 0  # newest round of what was taken over from a dead agent
    audit: Audit | None = None  # the newest step that was audited on all ranks here
    compared: Compared | None = None  # what came of the last `VaultDo.compare`


class Warned(Msg):
    """This node was told that trouble may be coming (a scheduler's SIGUSR1). Told on as a finding."""

    text: str


class Probed(Msg):
    """What the probes of this node have seen since the last time, not numbered yet."""

    findings: tuple[Finding, ...]


class Devices(Msg):
    """Which local rank uses which device of this node, in the forms of `Finding.device`; replaces what was known."""

    local_ranks: dict[str, int]


class Admitted(Msg):
    """The pre-flight checks of this node have passed, or `why` not (yet)."""

    passed: bool
    why: str = ""


class StoreUp(Msg):
    """The store process listens."""

    addr: str  # "host:port" as other nodes reach it


class StoreDown(Msg):
    """The store process died, or could not be started. Answered by `StartStore`."""

    reason: str = ""


class ZygoteUp(Msg):
    """The zygote can fork. Nothing is forked before."""


class ZygoteDown(Msg):
    """The zygote died; the host starts another by itself. `Fork`s without `Forked` are void."""

    reason: str = ""


AgentEvent: TypeAlias = (
    Looked
    | Forked
    | ForkFailed
    | Exited
    | Said
    | Assigned
    | LinkUp
    | LinkDown
    | Allocated
    | Vaulted
    | StoreUp
    | StoreDown
    | ZygoteUp
    | ZygoteDown
    | Warned
    | Probed
    | Devices
    | Admitted
    | Stop
    | Tick
)

# --------------------------------------------------------------------------- agent: actions


class Fork(Msg):
    """Make the worker's page and socket entry, then have the zygote fork it; answer Forked or ForkFailed.

    role "rank" blocks in `resilient.init()` until it is seated; role "standby" goes on in loopback as `rank`. All that torchrun's
    environment variables need is here: GROUP_RANK = node_rank, GROUP_WORLD_SIZE = nodes, MASTER_ADDR:PORT = store,
    TORCHELASTIC_RESTART_COUNT = restart.
    """

    worker: str
    role: str  # "rank" | "standby"
    rank: int  # the chair it takes, or the one it shadows
    local_rank: int
    world_size: int
    local_world_size: int
    node_rank: int
    nodes: int
    store: str
    restart: int  # how many times the whole group was started again
    round: int


class Kill(Msg):
    """Send a signal. Unknown and dead workers are no error."""

    worker: str
    signal: int


class Forget(Msg):
    """This dead worker's page is needed no more: unmap and unlink it."""

    worker: str


class Evidence(Msg):
    """Have these workers write their stacks (SIGUSR2) and save them and all pages under evidence/<incident>/.

    Do not wait for it: only the signals have to be sent before the next action.
    """

    incident: int
    workers: tuple[str, ...]
    why: str


class Fence(Msg):
    """Set this fence in every page, then at once, before any other event, hand back Looked(fence=round).

    If the vault knows more than the last Vaulted said, a Vaulted comes before that Looked: the next plan is made of both.
    """

    round: int


class Tell(Msg):
    """Send one frame to a worker. One that has no connection (any more) is no error."""

    worker: str
    message: WorkerDown


class SendReport(Msg):
    """Send this to the coordinator; drop it if there is no connection."""

    report: Report


class StartStore(Msg):
    """Start (another) store process; answer StoreUp or StoreDown."""


class Allocate(Msg):
    """Allocate the segments of this chair for real, or take those that it has; answer Allocated."""

    worker: str
    layout: Layout


class Keep(Msg):
    """The vault copies this to the peers, beside the rank's own state; a peer Fetch of the rank brings it back (see Said).

    One with a greater `recorded.restart` voids all that was kept of its rank before.
    """

    recorded: Recorded


class VaultDo(Msg):
    """All that the vault should be doing; a later one replaces an earlier one whole."""

    peers: tuple[str, ...] = ()  # "host:port" of the vaults that copies from here go to
    fetch: tuple[Fetch, ...] = ()  # bring these into this node's memory tier; say so in Vaulted.fetched or .refused
    commit: int = NONE  # write the commit marker of this step
    manifest: tuple[Persisted, ...] = ()  # what that marker lists
    world_size: int = 0
    ranks: tuple[int, ...] = ()  # chairs of this node: segments of others may be dropped
    checkpoint: int = NONE  # the pages ask their workers to seal this step (or the first after it) for the persistent tier
    rescue: int = NONE  # what is sealed of this step goes to the persistent tier now
    distrusted: tuple[int, ...] = ()  # committed steps that are damaged: not counted when old ones are removed, and written anew
    group: tuple[Member, ...] = ()  # keep parity of snapshots with these, instead of whole copies at `peers`
    round: int = 0  # in force
    step: int = NONE  # at which it begins: of later steps nothing counts that was sealed before
    node_rank: int = NONE  # position of this node in it
    compare: Comparison | None = None  # bring these sheets together; say in Vaulted.compared what they show
    elders: tuple[Elder, ...] = ()  # who has what of a world of another size, for ranks that ask to have it cut for them


class Log(Msg):
    """Something a worker wants in events.jsonl."""

    rank: int
    message: Marked


class Finished(Msg):
    """All workers are gone and the last report is out: clean up and exit. The last action ever."""

    exit_code: int
    message: str = ""
    over: bool = True  # the run is; else only this agent is, and what its run holds in memory is left to a successor


AgentAction: TypeAlias = (
    Fork | Kill | Forget | Evidence | Fence | Tell | SendReport | StartStore | Allocate | Keep | VaultDo | Log | Finished
)

# --------------------------------------------------------------------------- coordinator: settings and events


class CoordinatorSettings(Msg):
    """What the coordinator is told once, at its start."""

    run: str
    leader: str  # the node that hosts it: there the commit markers are written
    nodes_min: int = 1  # --nnodes MIN:MAX
    nodes_max: int = 1
    max_restarts: int = 0  # torchrun's: user failures of an unmanaged group
    last_call_s: float = 30.0  # with MIN nodes there, wait this long for MAX (torchrun's last_call_timeout)
    join_timeout_s: float = 600.0  # wait this long for MIN nodes, or for room for an emptied chair
    lease_s: float = 10.0  # ten missed reports
    link_grace_s: float = 1.0  # a reset connection may come back this long
    settle_s: float = 0.005  # faults this close together make one round: two SIGKILLs sent together are seen 1 to 3 ms apart
    suspect_s: float = 0.2  # a survivor complains and nobody is dead: the death report may be on its way
    culprit_s: float = 5.0  # all stalled ranks wait in a collective: a culprit's report may be on its way
    fruitless_max: int = 10  # rounds without a committed step before giving up
    farewell_s: float = 5.0  # at the end: wait this long for the agents to have heard it
    checkpoints: bool = False  # there is a checkpoint URL
    checkpoint_every: int = 0  # steps between two checkpoints; 0 = none by themselves
    checkpoint_auto: bool = False  # instead: as often as is worth it (core/cadence.py)
    checkpoint_budget: float = 0.01  # share of the time that checkpoints may cost
    copies: int = 1  # on how many other nodes the copies of each node's ranks are kept
    parity: int = 0  # so many nodes keep parity of their snapshots together, instead of whole copies; 0 = whole copies
    grace_s: float = 0.0  # --grace-s: from a signal until everything has ended; 0 = nothing is brought to safety before
    term: int = 0  # when it was started
    rules: Rules = Rules()  # what is made of what probes see (resilient/policy.toml, --policy); empty: all is watched
    hang: Hang = "act"  # --hang
    alone_s: float = 600.0  # nobody moves, but nobody waits for anybody either: --first-step-timeout


class Asked(Msg):
    """Somebody wants a checkpoint, soon."""


class NodeUp(Msg):
    """A connection of this node stands (again)."""

    node: str


class NodeLost(Msg):
    """The connection of this node was reset."""

    node: str


CoordinatorEvent: TypeAlias = Report | NodeUp | NodeLost | Asked | Stop | Tick

# --------------------------------------------------------------------------- coordinator: actions (lines.py has what is announced)


class Assign(Msg):
    """Send this to the node; drop it if there is no connection (it is sent again when the node reports)."""

    node: str
    assignment: Assignment


class Announce(Msg):
    """Append this line to events.jsonl."""

    line: EventLine


class StatusDue(Msg):
    """Write `Coordinator.status()` to status.json; comes at every change and each second.

    A query and not the status itself: with 100k ranks it is worth its second only where somebody writes it.
    """


class Finish(Msg):
    """The run is over and the agents know, or had their time to. The last action ever."""

    exit_code: int
    message: str = ""


CoordinatorAction: TypeAlias = Assign | Announce | StatusDue | Finish
