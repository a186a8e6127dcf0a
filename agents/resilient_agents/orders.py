"""Orders: what the agent asks of its zygote, and what the zygote answers.

Think of the pass between a restaurant and its kitchen: slips go in, plates come out, and the slip's number is on the plate.

Contract: frames (wire/frames.py) over a socketpair that only these two processes hold, so there is no handshake. The zygote first
says what the command line means (Launch or Misused), then answers each Spawn exactly once, in order.
"""

from __future__ import annotations

from typing import Literal

from resilient.core.messages import Msg, WorkerUp


class Program(Msg):
    """The user's program, as torchrun would have started it."""

    kind: Literal["script", "module", "run_path", "exec"]
    target: str  # file, module name, or program
    arguments: tuple[str, ...] = ()  # may hold ${local_rank}, as in torchrun
    command: tuple[str, ...] = ()  # kind="exec": the whole command line


class Launch(Msg):
    """zygote -> agent, unasked and first: torchrun's flags, parsed and checked by torchrun's own code."""

    program: Program
    nodes_min: int
    nodes_max: int
    slots: int  # nproc-per-node
    run_id: str
    standalone: bool
    backend: str  # "c10d" or "static"
    host: str  # --rdzv-endpoint or --master-addr:--master-port, taken apart
    port: int  # 0 = any
    is_here: bool  # torchrun thinks that `host` is this machine
    endpoint_conf: dict[str, str]  # --rdzv-conf
    node_rank: int
    local_addr: str
    role: str
    max_restarts: int
    log_dir: str  # "" = under the run directory
    redirects: tuple[int, ...]  # per local rank: 0 none, 1 stdout, 2 stderr, 3 both
    tee: tuple[int, ...]
    local_ranks_shown: tuple[int, ...]  # () = all
    stdout_filters: tuple[str, ...]
    stderr_filters: tuple[str, ...]
    prefix_template: str  # TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE
    signals: tuple[str, ...]
    shutdown_timeout_s: float
    virtual_local_rank: bool
    numa_binding: str  # "" = none
    ours: dict[str, str]  # our own flags that were given (resilient/config.py)
    config: str  # --config, "" = none
    warnings: tuple[str, ...] = ()


class Misused(Msg):
    """zygote -> agent: the command line asks for help (exit_code 0) or is wrong (2)."""

    text: str
    exit_code: int


class Spawn(Msg):
    """agent -> zygote: make one process. Answered by Spawned."""

    kind: Literal["worker", "store"]
    program: Program | None  # None for the store
    env: dict[str, str]  # added to the zygote's own environment
    stdout: str = ""  # file to append to; "" = the launcher's own
    stderr: str = ""
    stacks: str = ""  # file for all threads' stacks on SIGUSR2
    local_rank: int = 0
    numa_binding: str = ""


class Spawned(Msg):
    """zygote -> agent: its pid, now a child of the agent; or why there is none."""

    pid: int = 0
    error: str = ""


class StoreOpen(Msg):
    """store -> agent (Unix socket): one more empty store listens; they are used in the order of these messages."""

    worker: str
    token: str
    port: int


class StoreTurn(Msg):
    """agent -> store: the oldest store is not needed any more; open another one ahead."""


Answer = Launch | Misused | Spawned
Up = WorkerUp | StoreOpen
