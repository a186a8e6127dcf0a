"""Probe: what a probe is, and what it is given.

Think of a doctor's instruments: each answers one question when it is put on, knows nothing of the others, and does not decide what is to
be done. Who calls whom when, how long one may take, and what is said only once, is the engine's business (prober.py), not theirs.

Contract: a probe has a name, a period and `check`. `check` returns what is the matter now (engine: said once while it lasts) or what has
happened since the last call; it may block and it may raise, which becomes a finding of kind "probe-hangs" or "probe-fails" and hurts
nobody else. It runs in a process of its own kind, never in the agent, on one thread that is its own, and is never called twice at a time.
A class is registered in the entry-point group `resilient.probes`, the built-in ones too; it is called with `Surroundings` and raises
`Absent` where there is nothing for it to look at.
All that is read of the host (/proc, /sys, /dev) is read below `Surroundings.root`, so that a recorded tree can stand in for a machine.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final, Literal, Protocol

from resilient.core.messages import NONE, Finding, Msg
from resilient.errors import ResilientError

GROUP: Final = "resilient.probes"
TIMEOUT_S: Final = 10.0  # for one check, where a probe names no `timeout_s` of its own

Scope = Literal["node", "run"]
# node: the machine, whoever uses it (one daemon can look for all); run: the workers of one run, their files and their memory


class Absent(ResilientError):
    """There is nothing here that this probe could look at; the message says what is missing."""


class Watched(Msg):
    """One worker, as a probe needs to know it."""

    worker: str
    rank: int = NONE
    local_rank: int = NONE
    pid: int = 0
    stdout: str = ""  # file, "" = none
    stderr: str = ""
    alive: bool = True


class Roster(Msg):
    """Who is watched now. A later one replaces an earlier one whole."""

    workers: tuple[Watched, ...] = ()
    run_dir: str = ""
    checkpoint: str = ""  # directory of the persistent checkpoints, "" = none or not a directory
    memory_dir: str = ""  # of the shared-memory segments


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What a probe is given when it is made."""

    root: str = "/"  # everything of the host is read below it
    roster: Callable[[], Roster] = Roster  # the newest; scope "run" only
    since: float = 0.0  # CLOCK_MONOTONIC: what came later is news, a prober that died was looking until then; 0 = from now on
    read: Mapping[str, int] = field(default_factory=dict)  # files that were being read then: how long they were
    lookback_s: float = 0.0  # what has happened within that time and is not over is told at the first look, where it is on record

    def path(self, absolute: str) -> str:
        """Where `absolute` ("/sys/class/net") lies below the root."""
        return self.root.rstrip("/") + absolute


class Probe(Protocol):
    """See the head of this file. Optional: `scope` ("node" if not given), `timeout_s` (TIMEOUT_S if not given)."""

    name: str
    period_s: float

    def check(self, now: float) -> list[Finding]:
        """What is the matter, or has happened. now: CLOCK_MONOTONIC seconds. Findings have seq=0 and carry class and role."""
        ...
