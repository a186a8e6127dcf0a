"""Crew: the workers and chairs of one node, as its agent keeps them.

Think of the stage manager's clipboard: one line per person (where from, what doing), one per chair (who sits there). Nothing is decided
here; agent.py decides, and the report is read off this clipboard.

Contract: plain mutable data, written by agent.py alone. A worker is added when its fork is asked for and removed when it is dead and
nobody needs its page any more. A chair outlives its workers: recorded layout and seals belong to it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from resilient.core.hang import Watch
from resilient.core.machine import Seals
from resilient.core.messages import NONE, Chair, ChairState, Layout, Raised, Record, Recorded, Seated, Standby

MINUTES_BYTES = 16 << 20  # kept results of set-up collectives, per rank
MINUTES_COUNT = 10_000


@dataclass(slots=True)
class Worker:
    """One process, from the wish to fork it until its page is forgotten."""

    name: str
    role: str  # "rank" | "standby"
    rank: int  # its chair, or the one it shadows
    local_rank: int
    watch: Watch
    pid: int = 0  # 0 = not forked yet
    asked: bool = False  # Fork is out
    joined: bool = False
    any_rank: bool = False
    parked: bool = False
    unwanted: bool = False  # we ended it ourselves: its exit is no fault
    kill_at: float | None = None  # SIGKILL then, if it is still there
    exit_code: int | None = None
    record: Record | None = None
    raised: Raised | None = None
    seated: Seated | None = None  # the last one that was sent
    fenced: int = 0  # the last Fenced that was sent

    @property
    def alive(self) -> bool:
        """Forked, or about to be."""
        return self.exit_code is None


@dataclass(slots=True)
class Place:
    """One chair of this node."""

    rank: int
    local_rank: int
    worker: Worker | None = None
    filled: int = 0  # the round that last put somebody here
    layout: Layout | None = None


@dataclass(slots=True)
class Minutes:
    """The results of one rank's set-up collectives, for newcomers that repeat them."""

    entries: dict[int, Recorded] = field(default_factory=dict)
    num_bytes: int = 0
    overflow: bool = False
    waiting: dict[int, list[str]] = field(default_factory=dict)  # index -> workers that asked for it

    def add(self, item: Recorded) -> bool:
        """Keep it. False: there is no room, and no newcomer can be served any more."""
        if item.index not in self.entries:
            self.num_bytes += len(item.payload) + len(item.key)
            self.overflow = self.overflow or self.num_bytes > MINUTES_BYTES or len(self.entries) >= MINUTES_COUNT
        if self.overflow:
            self.entries.clear()
            return False
        self.entries[item.index] = item
        return True


def chair_state(worker: Worker | None) -> ChairState:
    """The one word for what a chair's worker does."""
    if worker is None:
        return "empty"
    if worker.raised is not None or worker.exit_code is not None:
        return "finished" if worker.exit_code == 0 and worker.raised is None and not left_early(worker) else "dead"
    if worker.record is not None and worker.record.round > 0 and worker.record.phase != "setup":
        return "active"
    return "joined" if worker.joined else "starting"


def left_early(worker: Worker) -> bool:
    """Whether it exited 0 out of a broken step: a consequence of the fault, not an end."""
    record = worker.record
    return record is not None and record.phase not in ("setup", "done") and worker.fenced >= record.round > 0


def chair(place: Place, seals: Seals | None) -> Chair:
    """A chair, as it is reported."""
    w, s = place.worker, seals or Seals()
    return Chair(
        rank=place.rank,
        local_rank=place.local_rank,
        state=chair_state(w),
        worker=w.name if w else "",
        pid=w.pid if w else 0,
        exit_code=w.exit_code if w else None,
        record=w.record if w else None,
        replicated=place.layout.replicated if place.layout else False,
        layout=place.layout.digest if place.layout else "",
        own_step=max(s.own_steps, default=NONE),
        own_steps=s.own_steps,
        gate_step=s.gate_step,
        snapshots=tuple(sorted(s.snapshots)),
    )


def standby(worker: Worker) -> Standby:
    """A standby, as it is reported."""
    state = "dead" if not worker.alive else "parked" if worker.parked else "joined" if worker.joined else "starting"
    return Standby(worker=worker.name, pid=worker.pid, shadow=worker.rank, state=state, any_rank=worker.any_rank)  # type: ignore[arg-type]
