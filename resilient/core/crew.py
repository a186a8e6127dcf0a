"""Crew: the workers and chairs of one node, as its agent keeps them.

Think of the stage manager's clipboard: one line per person (where from, what doing), one per chair (who sits there), and a list of what
went wrong. Nothing is decided here; agent.py decides, and the report is read off this clipboard.

Contract: plain mutable data, written by agent.py alone. A worker is added when its fork is wished for and removed when it is dead and
nobody needs its page any more. A chair outlives its workers: layout and seals belong to it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import msgspec

from resilient.core.hang import Watch
from resilient.core.machine import Seals
from resilient.core.messages import NONE, Chair, ChairState, Finding, Layout, Pace, Raised, Record, Seated, Standby, StandbyState

FINDINGS_MAX = 256
GONE_MAX = 64  # processes that are gone and whose numbers are remembered: the kernel's word of them may come later
TEXT_MAX = 16 << 10
WORD_MAX = 1024  # a name that a probe gives: of a device, a kind ...
DIGITS_MAX = 10  # of a rank, a process or a device in it


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
    ended: bool = False  # exited 0, but its page's last word was not read yet
    exit_code: int | None = None
    record: Record | None = None
    pace: Pace | None = None
    raised: Raised | None = None
    seated: Seated | None = None  # the last one that was sent
    fenced: int = 0  # the last Fenced that was sent

    @property
    def alive(self) -> bool:
        """Forked, or about to be."""
        return self.exit_code is None

    def out_of_a_broken_step(self) -> bool:
        """Whether it left when its round was broken: a consequence of the fault, neither an end nor an error."""
        record = self.record
        return record is not None and record.phase not in ("setup", "done") and self.fenced >= record.round > 0

    def committed(self, round_: int) -> bool:
        """Whether it has completed a step in this round, or is past the loop."""
        record = self.record
        return record is not None and record.round == round_ and (record.committed_s > 0 or record.phase == "done")

    def chair_state(self) -> ChairState:
        """The one word for what its chair shows."""
        if self.raised is not None or self.exit_code is not None:
            return "finished" if self.exit_code == 0 and self.raised is None and not self.out_of_a_broken_step() else "dead"
        if self.record is not None and self.record.round > 0 and self.record.phase != "setup":
            return "active"
        return "joined" if self.joined else "starting"

    def standby(self) -> Standby:
        """As it is reported while it has no chair."""
        state: StandbyState = "parked" if self.parked else "joined" if self.joined else "starting"
        return Standby(worker=self.name, pid=self.pid, shadow=self.rank, state=state, any_rank=self.any_rank)


@dataclass(slots=True)
class Place:
    """One chair of this node."""

    rank: int
    local_rank: int
    worker: Worker | None = None
    layout: Layout | None = None
    native: bool = False  # the group's start was made here: the agent has the minutes of it

    @property
    def setting_up(self) -> bool:
        """Its rank has not come to the first step yet, and all that it did until then was minuted here."""
        return self.native and self.layout is None

    def chair(self, seals: Seals) -> Chair:
        """As it is reported."""
        worker = self.worker
        return Chair(
            rank=self.rank,
            local_rank=self.local_rank,
            state=worker.chair_state() if worker else "empty",
            worker=worker.name if worker else "",
            pid=worker.pid if worker else 0,
            exit_code=worker.exit_code if worker else None,
            record=worker.record if worker else None,
            replicated=self.layout.replicated if self.layout else False,
            layout=self.layout.digest if self.layout else "",
            own_step=max(seals.own_steps, default=NONE),
            own_steps=seals.own_steps,
            gate_step=seals.gate_step,
            snapshots=tuple(sorted(seals.snapshots)),
            minuted=self.native or self.layout is not None,
            pause_s=worker.watch.pause_s if worker else 0.0,
        )


@dataclass(slots=True)
class Crew:
    """Everybody, and all chairs."""

    prefix: str  # of the workers' names
    first_step_timeout_s: float
    workers: dict[str, Worker] = field(default_factory=dict)
    places: dict[int, Place] = field(default_factory=dict)  # by rank
    gone: dict[int, tuple[str, int]] = field(default_factory=dict)  # pid -> worker and its rank, the last ones
    _count: int = 0

    def hire(self, role: str, rank: int, local_rank: int) -> Worker:
        """Wish for a worker; names are never used twice."""
        self._count += 1
        name = f"{self.prefix}{self._count}"
        self.workers[name] = worker = Worker(name, role, rank, local_rank, Watch(self.first_step_timeout_s))
        return worker

    def forget(self, worker: Worker) -> None:
        """It is dead, and nobody needs its page."""
        self.workers.pop(worker.name, None)
        if worker.pid:
            self.gone[worker.pid] = (worker.name, worker.rank)
            while len(self.gone) > GONE_MAX:
                del self.gone[next(iter(self.gone))]

    def on(self, device: str, devices: Mapping[str, int]) -> tuple[int, ...] | None:
        """Ranks that sit on this device; () = nobody of the run does; None = it is no one's in particular, or not known whose.

        devices: those whose local rank is known. Before anybody sits here nobody can say who will sit on it.
        """
        if not self.places:
            return None
        ranks: set[int] = set()
        known = False
        for part in filter(None, device.split(",")):
            form, _, name = part.partition(":")
            number = int(name) if name.isdecimal() and len(name) < DIGITS_MAX else NONE
            local_rank = devices.get(part, number if form in ("gpu", "npu", "local_rank") else NONE)
            if form == "rank" and number != NONE:
                found = {number} if number in self.places or any(r == number for _, r in self.gone.values()) else set()
            elif form == "pid" and number != NONE:
                found = {w.rank for w in self.workers.values() if w.pid == number and self.place_of(w) is not None}
                found |= {self.gone[number][1]} if number in self.gone else set()
            elif local_rank != NONE:
                found = {p.rank for p in self.places.values() if p.local_rank == local_rank}
            else:
                continue
            known = True
            ranks |= found
        return tuple(sorted(ranks)) if known else None

    def place_of(self, worker: Worker) -> Place | None:
        """The chair it holds."""
        place = self.places.get(worker.rank)
        return place if place is not None and place.worker is worker else None

    def seated(self) -> list[Worker]:
        """Those who hold a chair and live."""
        return [p.worker for p in self.places.values() if p.worker is not None and p.worker.alive]

    def standbys(self) -> list[Worker]:
        """Those without a chair who are wanted, best first."""
        free = [w for w in self.workers.values() if w.alive and not w.unwanted and not w.raised and self.place_of(w) is None]
        return sorted(free, key=lambda w: (not w.parked, not w.joined, w.name))


@dataclass(slots=True)
class Findings:
    """What went wrong and was not yet heard by the coordinator."""

    last: int = 0  # seq of the newest
    unheard: list[Finding] = field(default_factory=list)

    def add(self, kind: str, now: float, worker: Worker | None, round_: int, **more: object) -> None:
        """Note a fact about a worker; `more`: further fields of Finding."""
        self.last += 1
        record = worker.record if worker else None
        about = {"rank": worker.rank, "worker": worker.name, "pid": worker.pid} if worker else {}
        fields = {"t": now, "step": record.step if record else NONE, "round": round_, **about, **more}
        fields["text"] = str(fields.get("text", ""))[:TEXT_MAX]
        self.unheard.append(Finding(seq=self.last, kind=kind, **fields))  # type: ignore[arg-type]
        self._trim()

    def take(self, findings: Iterable[Finding], now: float, round_: int) -> None:
        """Note what probes saw: what is the same counts as one. One that does not know when it was is of now."""
        alike: dict[tuple[object, ...], Finding] = {}
        for finding in map(_shortened, findings):
            key = (finding.probe, finding.kind, finding.code, finding.device, finding.class_, finding.role, finding.clears, finding.worker)
            before = alike.get(key)
            alike[key] = finding if before is None else msgspec.structs.replace(before, count=before.count + finding.count)
        for finding in alike.values():
            self.last += 1
            about = {"seq": self.last, "round": round_, "t": finding.t or now}
            self.unheard.append(msgspec.structs.replace(finding, **about))
        self._trim()

    def _trim(self) -> None:
        """Too many: what explains nothing goes first, then what probes saw; what happened to workers stays longest."""
        while len(self.unheard) > FINDINGS_MAX:
            worth = [(not f.probe) * 2 + (f.role == "cause") for f in self.unheard]
            del self.unheard[worth.index(min(worth))]

    def heard(self, seq: int) -> None:
        """The coordinator took in everything up to this one."""
        self.unheard = [f for f in self.unheard if f.seq > seq]

    def aged(self, now: float) -> tuple[Finding, ...]:
        """As they are reported: with their age, since clocks are never compared."""
        return tuple(msgspec.structs.replace(f, age_s=max(0.0, now - f.t)) for f in self.unheard)


def _shortened(finding: Finding) -> Finding:
    """As much as fits into a report, whatever a probe gives."""
    words = {"probe", "kind", "layer", "code", "device", "worker", "fingerprint"}
    cut = {name: value[:WORD_MAX] for name in words if len(value := getattr(finding, name)) > WORD_MAX}
    cut |= {"text": finding.text[:TEXT_MAX]} if len(finding.text) > TEXT_MAX else {}
    return msgspec.structs.replace(finding, **cut) if cut else finding
