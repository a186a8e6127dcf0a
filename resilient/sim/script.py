"""Script: a training process of the simulated fleet, as far as its agent can tell.

Think of an understudy who only mimes: it keeps a page, joins, sets up, votes and commits as train/ does, but its whole state is the
number of the step. What would be a wrong weight there is a wrong number here, and the checks at the bottom of `_take_plan` find it.

Contract: everything happens through `world.after`, so a seed decides all. A collective (`Barrier`) completes on each rank at its own
moment: a kill may come after it completed on one rank and before it does on another, which is the hard case of the vote.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import msgspec

from resilient.core.messages import (
    NONE,
    Fenced,
    Join,
    Layout,
    Leave,
    Pace,
    Phase,
    Raised,
    Recall,
    Record,
    Recorded,
    Seated,
    Suspect,
    Unrecorded,
    WorkerDown,
)

if TYPE_CHECKING:
    from resilient.sim.world import Host

SETUP_COLLECTIVES = 2


@dataclass(slots=True)
class Segment:
    """One chair's copies in its node's memory."""

    own: list[int] = field(default_factory=list)  # two slots
    gate: int = NONE
    snapshots: list[int] = field(default_factory=list)  # two slots
    marked: int = NONE  # newest one for the persistent tier

    def seal_own(self, step: int) -> None:
        """Sealing a step ends every future."""
        self.own = [*[s for s in self.own if s < step][-1:], step]
        self.gate = NONE if self.gate > step else self.gate

    def seal_snapshot(self, step: int) -> None:
        """The same for the snapshot of a whole rank."""
        self.snapshots = [*[s for s in self.snapshots if s < step][-1:], step]


class Script:
    """One process."""

    def __init__(self, host: Host, name: str, role: str, rank: int, pid: int, restart: int) -> None:
        """Forked just now."""
        self.host, self.world, self.name, self.role, self.rank, self.pid = host, host.world, name, role, rank, pid
        self.restart = restart
        self.alive, self.os_state, self.parked, self.fence = True, "R", False, 0
        self.round, self.step, self.entered, self.completed = 0, NONE, 0, 0
        self.phase: Phase = "setup"
        self.torn = self.section = False
        self.marks = [0.0, 0.0, 0.0, 0.0]  # broken, regrouped, restored, committed
        self.beat = self.started = self.world.now
        self.seated: Seated | None = None
        self.recalled = 0  # of the set-up: results that were told, collectives that are here, and that are behind all members
        self.held = self.settled = 0
        self.minutes: set[int] = set()  # starts of the group in which what was recalled was agreed
        self._set_up = False
        self._broken_s = 0.0
        self._pace = Pace(rank=rank, step=NONE, at_s=0.0)
        self._asked = 1 << 62  # as in train/loop.py
        self._checkpoint = False  # the vote of this step said so
        self._act = 0  # a newer act voids everything scheduled before
        self._late: list[Callable[[], None]] = []  # what came due while the process was stopped
        self._then(self.world.spec.boot_s, self._join if self.world.spec.managed else lambda: self._foreign(0))

    # ------------------------------------------------------------------ seen from outside

    def record(self) -> Record:
        """The page."""
        broken, regrouped, restored, committed = self.marks
        return Record(
            round=self.round,
            step=self.step,
            phase=self.phase,
            torn=self.torn,
            section=self.section,
            entered=self.entered,
            completed=self.completed,
            idle_s=self.world.now - self.beat,
            broken_s=broken,
            regrouped_s=regrouped,
            restored_s=restored,
            committed_s=committed,
        )

    def pace(self) -> Pace | None:
        """The page's other half."""
        return self._pace if self.round else None

    def cpu_s(self) -> float:
        """A process that computes uses its CPU, one that waits does not."""
        computes = self.role == "spinning" or (self.phase in ("running", "committing") and self.fence < self.round)
        return self.world.now - self.started if computes else 0.0

    def hear(self, message: WorkerDown) -> None:
        """A frame from the agent; the control thread takes it also while the script works."""
        if not self.alive:
            return
        if self.os_state == "T":
            self._late.append(lambda: self.hear(message))
            return
        match message:
            case Seated():
                if self.seated is None or message.round > self.seated.round:
                    self.seated = message
                    if self.role == "rank" or self.parked or self._set_up:
                        self._take_chair()
            case Fenced():
                if self.round and self.round <= message.round and self.phase in ("running", "voted", "clean"):
                    self._act += 1  # waits for its next seat where it is
                    self.completed = self.entered
            case Recorded():
                self.recalled += 1
                self.minutes.add(int(message.payload))
                self.held, self.settled = self.recalled, self.recalled - message.last
                if message.last:
                    self._enlist()
                else:
                    self._recall()
            case Unrecorded():
                self._enlist()
            case Leave():
                self._then(0.001, lambda: self.exit(0))
            case _:
                pass

    def stop(self) -> None:
        """SIGSTOP."""
        self.os_state = "T"

    def go_on(self) -> None:
        """SIGCONT."""
        self.os_state = "R"
        late, self._late = self._late, []
        for act in late:
            act()

    def spin(self) -> None:
        """An endless loop outside every collective."""
        self._act += 1
        self.role = "spinning"

    def throw(self, fingerprint: str, text: str) -> None:
        """An uncaught exception."""
        if not self.alive:
            return
        if not self.world.spec.managed:
            self.exit(1, text)
            return
        self._act += 1
        consequence = self.fence >= self.round > 0
        self.host.said(self, Raised(step=self.step, round=self.round, fingerprint=fingerprint, text=text, consequence=consequence))
        self.world.after(0.002, lambda: self.exit(1))

    def exit(self, code: int, text: str = "") -> None:
        """The process is gone; its agent sees it a moment later."""
        if self.alive:
            self.alive = False
            self._act += 1
            self.world.died(self)
            self.world.after(0.001, lambda: self.host.exited(self, code, text))

    @property
    def meeting_place(self) -> int:
        """What keeps collectives of different rounds (of a foreign script: of different starts) apart."""
        return self.restart if not self.world.spec.managed else self.seated.round if self.seated else 0

    # ------------------------------------------------------------------ the life of a rank

    def _then(self, seconds: float, act: Callable[[], None]) -> None:
        number = self._act

        def due() -> None:
            if not self.alive or number != self._act:
                return
            if self.os_state == "T":
                self._late.append(due)
            else:
                self.beat = self.world.now
                act()

        self.world.after(seconds, due)

    def _meet(self, key: str, act: Callable[[], None]) -> None:
        """A collective of this round."""
        self.entered += 1
        self.beat = self.world.now

        def done() -> None:
            self.completed += 1
            act()

        self.world.meet((self.meeting_place, key), self, len(self.world.ranks), lambda seconds: self._then(seconds, done))

    def broken(self, place: int) -> None:
        """A neighbour in a collective at this meeting place died and its sockets were reset."""
        if place != self.meeting_place:
            return  # that round is over for this worker
        if not self.world.spec.managed:
            self.exit(1, "RuntimeError: [gloo] Connection closed by peer [127.0.0.1]:1")
        elif self.alive and self.seated is not None and self.os_state == "R" and self.role != "spinning":
            self.completed = self.entered
            self.host.said(self, Suspect(round=self.seated.round, text="connection closed by peer"))

    def _foreign(self, step: int) -> None:
        """The life of a script that does not use this library."""
        if step < self.world.spec.steps:
            self._then(self.world.spec.step_s, lambda: self._meet(f"work {step}", lambda: self._foreign(step + 1)))
        else:
            self.exit(0)

    def _join(self) -> None:
        self.host.said(self, Join(worker=self.name, pid=self.pid, token=""))
        if self.role == "standby":
            self._then(self.world.spec.setup_s, self._recall)

    def _recall(self) -> None:
        if self.recalled < SETUP_COLLECTIVES:
            self.host.said(self, Recall(rank=self.rank, index=self.recalled))
        elif not self._set_up:
            self._set_up = True
            self.host.said(self, self._layout())
            self.parked = self.seated is None
            if self.seated is not None:
                self._take_chair()

    def _enlist(self) -> None:
        """The minutes end: this process is the rank from here on."""
        self.role = "rank"
        if self.seated is not None:
            self._take_chair()

    def _layout(self) -> Layout:
        spec = self.world.spec
        return Layout(rank=self.rank, digest="net", replicated=spec.replicated, own_bytes=1, snapshot_bytes=int(spec.snapshots))

    def _take_chair(self) -> None:
        assert self.seated is not None
        self.world.check(
            self.seated.rank == self.rank, f"{self.name} ran the script as rank {self.rank} and is seated as {self.seated.rank}"
        )
        self._act += 1
        if self.role == "spinning":
            return
        self.completed = self.entered
        if self.seated.store != self.world.store:
            place = self.meeting_place
            self.world.after(0.01, lambda: self.broken(place))
            return
        self._broken_s = self.world.now if self.round else 0.0
        self.world.tell_settled(self.meeting_place, self.settled)
        if self.seated.plan.over:
            self._then(0.001, self._grouped)
        else:
            self._meet("group", self._grouped)

    def _grouped(self) -> None:
        assert self.seated is not None
        self.round = self.seated.round
        self.marks = [self._broken_s, self.world.now, 0.0, 0.0]
        start = {self.host.agent.restart}
        self.world.check(self.minutes <= start, f"{self.name} was told the minutes of another start: {self.minutes}, not {start}")
        if self._set_up:
            self._restore()
        else:
            settled = self.world.settled(self.meeting_place)
            self.world.check(self.settled <= settled <= self.held, f"{self.name}: {settled} settled, {self.settled} to {self.held} here")
            self.settled = self.held = settled
            self._then(self.world.spec.setup_s, self._rehearse)

    def _rehearse(self) -> None:
        """The next collective of the set-up, and the barrier behind it (train/rehearsal.py)."""
        index = self.settled
        if index < SETUP_COLLECTIVES:
            self._meet(f"setup {index}", lambda: self._recorded(index))
        else:
            self._set_up = True
            self.host.said(self, self._layout())
            self._restore()

    def _recorded(self, index: int) -> None:
        self.held = index + 1
        self.host.said(self, Recorded(rank=self.rank, index=index, key="seed", payload=str(self.host.agent.restart).encode()))
        self._meet(f"settle {index}", self._passed)

    def _passed(self) -> None:
        self.settled = self.held
        self._rehearse()

    def _restore(self) -> None:
        assert self.seated is not None
        meets = self.seated.plan.tier == "live"
        self._then(self.world.spec.restore_s, lambda: self._meet("restore", self._take_plan) if meets else self._take_plan())

    def _take_plan(self) -> None:
        """Have what the plan says, or find out that it cannot be had."""
        assert self.seated is not None
        plan, copies = self.seated.plan, self.host.segment(self.rank)
        want = max(plan.step, 0)
        if self.rank not in plan.receivers:
            held = {self.step, self.step + (self.phase in ("voted", "committing")), 0 if self.phase == "setup" else self.step}
            self.world.check(want in held, f"{self.name} (rank {self.rank}) holds {self.step} {self.phase}, no receiver of {plan}")
            if self.torn:
                self.host.said(self, Suspect(round=self.round, text="torn"))
                return
        elif plan.tier == "live":
            repeats = self.rank in plan.repeat and want - 1 in copies.own
            known = want in copies.own or repeats or self.phase != "setup" or want == 0
            self.world.check(known, f"rank {self.rank} has no own state of {want}: {copies}")
            self.world.check(bool(plan.sources), "live, and no source")
        elif plan.tier != "none":
            there = want in copies.snapshots and self.seated.snapshot
            self.world.check(there, f"rank {self.rank} has no snapshot of {want}: {copies}")
        if self.phase == "setup" and self.seated.plan.starting:
            self.host.segment(self.rank).seal_own(want)
            if self.world.spec.snapshots:
                self.host.segment(self.rank).seal_snapshot(want)
        self.step, self.phase, self.torn = want, "clean", False
        self._asked = min(self._asked, want)
        sealed = self._pace.sealed if self._pace.sealed <= want else NONE
        self._pace = msgspec.structs.replace(self._pace, step=want, at_s=self.world.now, sealed=sealed)
        self.marks[2] = self.world.now
        self._begin()

    def _begin(self) -> None:
        assert self.seated is not None
        if self.step >= self.world.spec.steps:
            self.host.segment(self.rank).seal_own(self.step)
            self.host.segment(self.rank).seal_snapshot(self.step)
            self.host.sealed(self.rank)
            if self.seated.plan.over:
                self._finish()
            else:
                self._meet("end", self._finish)
            return
        if self.fence >= self.round:
            return
        self.host.segment(self.rank).seal_own(self.step)
        self.host.sealed(self.rank)
        self.phase = "running"
        self._then(self.world.spec.step_s * self.world.random.uniform(0.8, 1.2), self._vote)

    def _vote(self) -> None:
        self.host.segment(self.rank).gate = self.step + 1
        self.host.sealed(self.rank)
        self.phase = "voted"
        if self.fence < self.round:
            if self._wants(self.step + 1):
                self.world.wishes.add((self.meeting_place, self.step))
            self._meet(f"vote {self.step}", self._voted)

    def _wants(self, step: int) -> bool:
        return self._asked < self.host.orders.checkpoint <= step

    def _voted(self) -> None:
        if self.fence < self.round:
            self.phase = "committing"
            self._checkpoint = (self.meeting_place, self.step) in self.world.wishes
            self._then(self.world.spec.commit_s, self._commit)

    def _commit(self) -> None:
        self.step, self.phase = self.step + 1, "clean"
        self.marks[3] = self.marks[3] or self.world.now
        self.world.committed(self)
        due = self._checkpoint or self._wants(self.step)
        self._pace = msgspec.structs.replace(self._pace, step=self.step, at_s=self.world.now)
        if due:
            self._asked = self.host.segment(self.rank).marked = self.step
            self._pace = msgspec.structs.replace(self._pace, sealed=self.step, sealed_s=self.world.now, stall_s=0.001)
        if self.world.spec.snapshots or due:
            self.host.segment(self.rank).seal_snapshot(self.step)
            self.host.sealed(self.rank)
        self._begin()

    def _finish(self) -> None:
        self.phase = "done"
        self._then(0.02, lambda: self.exit(0))
