"""Agent: keeps the workers of one node as the newest assignment says, and reports all it knows. Deterministic.

Intuition: a stage manager. The director's sheet says who should sit where; the stage manager walks the rows, fills what is empty, sends
home who must go, and when somebody falls ill stops the scene at once (the fence) and calls the director: he never decides who plays.

Contract, besides core/machine.py:
- A fault of a chair (exit, exception, stop, suspect ...) fences the round in force before anything is reported; the report that tells
  of it carries the records read after the fence.
- A round is acted upon once, and only after its `fence` stands in all pages. Only workers named in `put_down` lose their chairs and only
  empty chairs are filled: a worker that died after the coordinator looked makes a newer round, never a quiet replacement (I3).
- A chair is taken by the worker that holds it, else by a standby that shadows its rank, else by a parked standby that may take any rank,
  else by a newcomer forked for it. `Seated` goes out when the worker has joined and its copies are fetched.
- Standbys are started when all chairs of the node have committed, so that they never slow a recovery down.
"""

from __future__ import annotations

from typing import assert_never

import msgspec

from resilient.core import machine as m
from resilient.core import sheets
from resilient.core.crew import Crew, Findings, Place, Worker
from resilient.core.messages import (
    NONE,
    Assignment,
    Fenced,
    Finding,
    Join,
    Layout,
    Leave,
    Marked,
    Raised,
    Recall,
    Recorded,
    Refused,
    Sealed,
    Suspect,
    Unrecorded,
    Unrepeatable,
    WorkerUp,
)
from resilient.core.minutes import Minutes
from resilient.core.vitals import Vitals

LOOK_S, LOOK_FORMING_S, FORMING_S = 0.05, 0.005, 30.0
SIGTERM, SIGKILL = 15, 9  # the numbers of every Linux
LEAVE_S = 2.0  # a standby that was told to leave and a worker that reported its exception end by themselves within this
STORE_RETRY_S = 1.0
WORKERS_SHARE = 1 / 3  # of the grace: workers that a signal does not end by then are killed, the rest is for what they had sealed
STANDBY_TRIES = 3  # standbys that died in a row before their warm-up was over


class Agent:
    """See the head of this file."""

    def __init__(self, settings: m.AgentSettings) -> None:
        """Nothing has happened yet."""
        self.settings = settings
        self.assignment: Assignment | None = None
        self.fenced = 0  # every page says so, and all was read after it
        self.acted = self.restart = 0  # newest round and group start that were acted upon
        self.finished = False
        boot = f"{settings.boot}." if settings.boot > 1 else ""
        self.crew = Crew(f"{settings.node}.{boot}", settings.first_step_timeout_s)
        self._findings, self._minutes, self._vitals = Findings(), Minutes(), Vitals()
        self._vault, self._vault_do = m.Vaulted(), m.VaultDo()
        self._seals: dict[int, m.Seals] = {}
        self._refused: list[Refused] = []
        self._store, self._zygote, self._managed, self._leaving = "", False, settings.managed, False
        self._asked = 0  # newest Fence that is out
        self._acted_s = 0.0
        self._evidence = 0  # newest incident whose stacks were saved
        self._standbys_lost = 0  # in a row
        self._devices = settings.devices
        self._admitted, self._admission = not settings.gated, "its checks have not passed yet" if settings.gated else ""
        self._began: float | None = None
        self._heard: float | None = None  # when the coordinator last said something
        self._store_at: float | None = None  # when to start the store
        self._end: tuple[int, str] | None = None  # winding down, with this exit code and message
        self._over = True  # the whole run, as far as is known here
        self._end_at = self._report_at = 0.0
        self._sketch: object = None  # of the last report
        self._seq = 0
        self._out: list[m.AgentAction] = []

    # ------------------------------------------------------------------ the contract

    def step(self, event: m.AgentEvent, now: float) -> list[m.AgentAction]:
        """See core/machine.py."""
        if self.finished:
            return []
        if self._began is None:
            self._began = now
            self._store_at = now if self.settings.hosts_store else None
        self._take(event, now)
        self._reconcile(now)
        self._report(now)
        out, self._out = self._out, []
        return out

    def deadline(self) -> float | None:
        """See core/machine.py."""
        if self.finished:
            return None
        times = [self._report_at, self._store_at, *(w.kill_at for w in self.crew.workers.values())]
        times.append(self._end_at if self._end else self._orphaned_at())
        return min(t for t in times if t is not None)

    def look_every_s(self) -> float:
        """How often the host should look at the pages now."""
        forming = self._managed and self.acted > self._asked and not all(w.committed(self.acted) for w in self.crew.seated())
        recent = self._report_at < self._acted_s + self._report_s() + FORMING_S
        return LOOK_FORMING_S if forming and recent else LOOK_S

    def _take(self, event: m.AgentEvent, now: float) -> None:
        match event:
            case m.Looked():
                self._on_looked(event, now)
            case m.Forked():
                self._on_forked(event)
            case m.ForkFailed():
                self._on_fork_failed(event, now)
            case m.Exited():
                self._on_exited(event, now)
            case m.Said():
                self._on_said(event, now)
            case m.Assigned():
                self._on_assigned(event.assignment, now)
            case m.Allocated():
                self._on_allocated(event, now)
            case m.Vaulted():
                self._vault = event
            case m.StoreUp():
                self._store = event.addr
            case m.StoreDown():
                self._on_store_down(event, now)
            case m.ZygoteUp():
                self._zygote = True
            case m.ZygoteDown():
                self._on_zygote_down(event, now)
            case m.LinkUp():
                self._sketch = None
            case m.Warned():
                self._findings.add("warning", now, None, self.acted, text=event.text)
            case m.Probed():
                self._findings.take([self._attribute(finding) for finding in event.findings], now, self.acted)
            case m.Devices():
                self._devices = event.local_ranks
            case m.Admitted():
                self._admitted, self._admission = event.passed, event.why
            case m.Stop():
                self._leaving = True
                self._wind_down(1, f"signal {event.signal}", now, event.signal)
            case m.LinkDown() | m.Tick():
                pass
            case _:
                assert_never(event)

    # ------------------------------------------------------------------ what the host saw

    def _on_looked(self, event: m.Looked, now: float) -> None:
        self._seals = event.seals
        for name, look in event.workers.items():
            if (worker := self.crew.workers.get(name)) is not None:
                worker.record, worker.parked, worker.pace = look.record, worker.parked or look.parked, look.pace
                self._standbys_lost = 0 if look.parked else self._standbys_lost
                if worker.ended and worker.alive:
                    self._bury(worker, 0, "", now)
        if event.fence > self.fenced:
            self.fenced = event.fence
            for worker in self.crew.seated():
                if worker.seated and worker.fenced < self.fenced:
                    worker.fenced = self.fenced
                    self._out.append(m.Tell(worker=worker.name, message=Fenced(round=self.fenced)))
        elif self._end is None and self.settings.hang != "off":
            self._watch(event.workers, now)

    def _watch(self, looks: dict[str, m.Look], now: float) -> None:
        """Look for workers that do not move."""
        seated = {w.name for w in self.crew.seated() if w.name in looks}
        running = sum(looks[name].os_state not in ("T", "t") for name in seated)
        only = len(seated) == 1 and self.assignment is not None and self.assignment.world_size > 1
        for name, look in looks.items():
            worker = self.crew.workers.get(name)
            if worker is None or not worker.alive or worker.unwanted or worker.raised or worker.ended:
                continue
            others = running > 0 or only or name not in seated
            between = look.record.round <= self._asked
            seen = worker.watch.look(look.record, look.os_state, look.cpu_s, now, neighbours_run=others, between=between)
            if seen is None:
                continue
            if name in seated:
                self._save_evidence(self.acted, seen.text)
                self._findings.add(seen.kind, now, worker, self.acted, t=seen.since, text=seen.text)
                if seen.kind == "stopped" and self._managed and self.settings.hang == "act":
                    self._fence(self.acted)
            elif seen.kind == "stopped" and self.settings.hang == "act":
                self._out.append(m.Kill(worker=name, signal=SIGKILL))

    def _on_forked(self, event: m.Forked) -> None:
        if (worker := self.crew.workers.get(event.worker)) is not None:
            worker.pid = event.pid
            if worker.unwanted or self._end is not None:  # born after the end: the signal that ended the others found no process
                self._out.append(m.Kill(worker=worker.name, signal=SIGKILL))

    def _on_fork_failed(self, event: m.ForkFailed, now: float) -> None:
        worker = self.crew.workers.get(event.worker)
        if worker is not None:
            worker.exit_code = 1
            if not self._drop_unseated(worker, now, event.reason):
                self._fault("fork_failed", now, worker, text=event.reason)

    def _on_exited(self, event: m.Exited, now: float) -> None:
        worker = self.crew.workers.get(event.worker)
        if worker is None or not worker.alive:
            return
        if event.exit_code == 0 and worker.joined and self._end is None:
            worker.ended = True  # after the loop, or out of a broken step? The next look at its page tells
        else:
            self._bury(worker, event.exit_code, event.text, now)

    def _bury(self, worker: Worker, exit_code: int, text: str, now: float) -> None:
        worker.exit_code, worker.kill_at = exit_code, None
        if self._drop_unseated(worker, now, text) or worker.raised is not None or worker.chair_state() == "finished":
            return
        text = text or (f"killed by signal {-exit_code}" if exit_code < 0 else f"exit code {exit_code}")
        consequence = exit_code >= 0 and worker.out_of_a_broken_step()
        self._fault("exit", now, worker, text=text, consequence=consequence, exit_code=exit_code)

    def _drop_unseated(self, worker: Worker, now: float, text: str) -> bool:
        """A dead worker without a chair is forgotten; a standby is missed with a finding."""
        if self._end is None and self.crew.place_of(worker) is not None:
            return False
        self._forget(worker)
        if not worker.unwanted and self._end is None:
            self._standbys_lost += not worker.parked
            text = (worker.raised.text if worker.raised else text) or f"standby for rank {worker.rank}: exit code {worker.exit_code}"
            self._findings.add("standby_lost", now, None, self.acted, text=text, exit_code=worker.exit_code)
            if self._standbys_lost == STANDBY_TRIES:
                self._findings.add("standbys_off", now, None, self.acted, text=f"{STANDBY_TRIES} standbys died during their warm-up")
        return True

    def _on_store_down(self, event: m.StoreDown, now: float) -> None:
        worked, self._store = bool(self._store), ""
        self._store_at = now if worked else now + STORE_RETRY_S
        if worked:
            self._findings.add("store_lost", now, None, self.acted, text=event.reason)
            self._fence(self.acted if self._managed else 0)

    def _on_zygote_down(self, event: m.ZygoteDown, now: float) -> None:
        self._zygote = False
        self._findings.add("zygote_lost", now, None, self.acted, text=event.reason)
        for worker in [w for w in self.crew.workers.values() if w.asked and w.pid == 0 and w.alive]:
            place = self.crew.place_of(worker)
            self._forget(worker)  # whether it was forked is unknown: its name is never used again
            if place is not None:
                place.worker = self.crew.hire(worker.role, place.rank, place.local_rank)

    # ------------------------------------------------------------------ what a worker said

    def _on_said(self, event: m.Said, now: float) -> None:
        worker, message = self.crew.workers.get(event.worker), event.message
        if isinstance(message, Recorded) and not event.worker:
            self._on_recorded(message)
        elif worker is None or not worker.alive or worker.unwanted:
            self._out.append(m.Tell(worker=event.worker, message=Leave(reason="this worker is not wanted any more")))
        else:
            self._on_message(worker, message, now)

    def _on_message(self, worker: Worker, message: WorkerUp, now: float) -> None:
        match message:
            case Join():
                worker.joined, worker.any_rank, self._managed = True, message.any_rank, True
            case Layout():
                if (place := self.crew.place_of(worker)) is not None:
                    place.layout = message
                self._out.append(m.Allocate(worker=worker.name, layout=message))
            case Recorded():
                self._on_recorded(msgspec.structs.replace(message, restart=self.restart))
            case Recall():
                self._on_recall(worker, message, now)
            case Unrepeatable():
                if self.crew.place_of(worker):
                    self._fault("unrecorded", now, worker, text=message.reason)
            case Suspect():
                if message.round == self.acted > self._asked and self.crew.place_of(worker):
                    self._fault("suspect", now, worker, text=message.text)
            case Raised():
                self._on_raised(worker, message, now)
            case Sealed():
                pass  # the host's vault has heard it
            case Marked():
                self._out.append(m.Log(rank=worker.rank, message=message))
                self._findings.take(self._vitals.take(worker.rank, message.step, message.scalars), now, self.acted)
            case Refused():
                if message not in self._refused:
                    self._refused.append(message)
                    self._fence(self.acted)
            case _:
                assert_never(message)

    def _on_recorded(self, item: Recorded) -> None:
        """From a rank that sets up, or from another node with its copies; kept here, and from here on by our peers too."""
        if item.restart != self.restart or self._minutes.has(item):
            return
        waiting = self._minutes.add(item)
        if waiting is not None:
            self._out.append(m.Keep(recorded=item))
            self._out += [m.Tell(worker=name, message=item) for name in waiting]

    def _on_recall(self, worker: Worker, message: Recall, now: float) -> None:
        place = self.crew.place_of(worker)
        answer = self._minutes.ask(worker.name, message, open_end=place is not None and place.setting_up)
        if isinstance(answer, (Recorded, Unrecorded)):
            self._out.append(m.Tell(worker=worker.name, message=answer))
        elif answer is not None:
            self._out.append(m.Tell(worker=worker.name, message=Leave(reason=answer)))
            if place is not None:
                self._fault("unrecorded", now, worker, text=answer)

    def _on_raised(self, worker: Worker, message: Raised, now: float) -> None:
        worker.raised, worker.kill_at = message, now + LEAVE_S
        if self.crew.place_of(worker):
            consequence = message.consequence or message.torn_down
            about = {"text": message.text, "fingerprint": message.fingerprint, "step": message.step, "exit_code": 1}
            self._fault("exception", now, worker, consequence=consequence, **about)

    def _on_allocated(self, event: m.Allocated, now: float) -> None:
        if (worker := self.crew.workers.get(event.worker)) is not None:
            self._out.append(m.Tell(worker=worker.name, message=event.segments))
            if event.segments.error:
                self._findings.add("allocation", now, worker, self.acted, text=event.segments.error)

    # ------------------------------------------------------------------ what the coordinator said

    def _on_assigned(self, new: Assignment, now: float) -> None:
        if self.assignment is not None and new.term != self.assignment.term:
            self._abandon("the coordinator was started again, and this node with what it holds has to be as well", now)
            return
        self._heard = now
        if self.assignment is not None and new.seq <= self.assignment.seq:
            return
        self.assignment = new
        if self._end is not None:
            if new.state == "failed" and not new.wait and new.message:
                self._end = (1, new.message)
            return
        self._findings.heard(new.seen)
        self._save_evidence(new.evidence, "a rank does not move")
        if new.state in ("finished", "failed"):
            self._wind_down(new.exit_code, new.message, now, SIGTERM)
        else:
            self._fence(new.fence)

    def _reconcile(self, now: float) -> None:
        """Make the node what it should be."""
        for worker in self.crew.workers.values():
            if worker.kill_at is not None and now >= worker.kill_at:
                worker.kill_at = None
                self._out.append(m.Kill(worker=worker.name, signal=SIGKILL))
        if self._store_at is not None and now >= self._store_at:
            self._store_at = None
            self._out.append(m.StartStore())
        if self._end is None and now >= self._orphaned_at():
            silent_s = now - (self._heard or self._began or 0.0)
            self._abandon(f"no word from the coordinator for {silent_s:.0f} s", now)
        new = self.assignment
        if new is None:
            return
        if self._end is not None:
            self._order_vault(new)
            return
        if new.round > max(new.fence, self.acted) and self.fenced >= new.fence:
            self._act(new, now)
        if new.round == self.acted > self._asked:
            self._keep_standbys()
            self._seat_workers(new)
        self._instruct(new)

    def _act(self, new: Assignment, now: float) -> None:
        """Walk the rows for a new round."""
        self.acted, self._acted_s = new.round, now
        places, seats = self.crew.places, {seat.rank: seat for seat in new.seats}
        void: set[int] = set()  # chairs whose workers repeat a set-up that does not count any more
        if new.restart > self.restart:
            self.restart = new.restart
            self._minutes.clear()
            for place in places.values():
                place.layout, place.native = None, True  # who keeps its chair waits for its first seat: all will be minuted here
                if place.worker is not None and place.worker.role == "standby":
                    self._dismiss(place.worker)
                    place.worker = None
                    void.add(place.rank)
            for worker in self.crew.standbys():
                self._dismiss(worker)
        for rank, place in list(places.items()):
            if place.worker is not None and (place.worker.name in new.put_down or rank not in seats):
                self._dismiss(place.worker)
                place.worker = None
            if rank not in seats:
                del places[rank]
        for seat in new.seats:
            place = places.setdefault(seat.rank, Place(seat.rank, seat.local_rank))
            if place.worker is None:
                place.native = place.native or seat.fresh
                self._fill(place, fresh=seat.fresh or seat.rank in void)
        if any(p.worker is not None and p.worker.chair_state() == "dead" for p in places.values()):
            self._fence(new.round)

    def _fill(self, place: Place, *, fresh: bool) -> None:
        able = [w for w in self.crew.standbys() if w.rank == place.rank or (w.any_rank and w.parked)] if not fresh else []
        chosen = min(able, key=lambda w: (w.rank != place.rank, not w.parked, w.name), default=None)
        if chosen is None:
            chosen = self.crew.hire("rank" if fresh else "standby", place.rank, place.local_rank)
        chosen.rank, chosen.local_rank = place.rank, place.local_rank
        place.worker = chosen

    def _seat_workers(self, new: Assignment) -> None:
        """Tell everybody who is ready which chair it holds."""
        for place in self.crew.places.values():
            worker = place.worker
            if worker is None or not worker.alive or not worker.joined or worker.raised or worker.ended:
                continue
            if worker.seated is not None and worker.seated.round >= new.round:
                continue
            if any(f.rank in (place.rank, new.plan.lender) and f not in self._vault.fetched for f in new.fetch):
                continue
            worker.seated = sheets.seated(new, place, self._seals)
            self._out.append(m.Tell(worker=worker.name, message=worker.seated))

    def _keep_standbys(self) -> None:
        """As many as there should be: warmed up when a recovery is over, sent away when chairs came from another node."""
        standbys, chairs = self.crew.standbys(), sorted(self.crew.places.values(), key=lambda p: p.local_rank)
        room = max(0, self.settings.standbys - max(0, len(chairs) - self.settings.slots))
        for worker in standbys[room:]:
            self._dismiss(worker)
        settled = bool(chairs) and all(p.worker and p.worker.alive and p.worker.committed(self.acted) for p in chairs)
        if settled and self._standbys_lost < STANDBY_TRIES:
            for _ in range(room - len(standbys)):
                shadowed = [w.rank for w in self.crew.standbys()]
                place = min(chairs, key=lambda p: (shadowed.count(p.rank), p.local_rank))
                self.crew.hire("standby", place.rank, place.local_rank)

    def _instruct(self, new: Assignment) -> None:
        """Workers that are wished for, and the vault."""
        for worker in self.crew.workers.values() if self._zygote else ():
            if not worker.asked:
                worker.asked = True
                self._out.append(sheets.fork(new, worker, self.restart))
        self._order_vault(new)

    def _order_vault(self, new: Assignment) -> None:
        if (wish := sheets.vault_do(new)) != self._vault_do:
            self._vault_do = wish
            self._out.append(wish)

    # ------------------------------------------------------------------ small things

    def _attribute(self, finding: Finding) -> Finding:
        """Say whose a probe's finding is: of the worker that it names, or of those that sit on its device."""
        if finding.rank != NONE:
            return msgspec.structs.replace(finding, ranks=(finding.rank,)) if finding.ranks is None else finding
        ranks = self.crew.on(finding.device, self._devices)
        if ranks is None or len(ranks) != 1:
            return msgspec.structs.replace(finding, ranks=ranks)
        place = self.crew.places.get(ranks[0])
        worker = place.worker if place is not None else None
        about = {"worker": worker.name, "pid": worker.pid} if worker is not None else {}
        return msgspec.structs.replace(finding, ranks=ranks, rank=ranks[0], **about)

    def _fault(self, kind: str, now: float, worker: Worker, **more: object) -> None:
        """Something that breaks the round in force."""
        self._findings.add(kind, now, worker, self.acted, **more)
        self._fence(self.acted)

    def _fence(self, round_: int) -> None:
        if round_ > self._asked:
            self._asked = round_
            self._out.append(m.Fence(round=round_))

    def _save_evidence(self, incident: int, why: str) -> None:
        if incident > self._evidence:
            self._evidence = incident
            alive = tuple(w.name for w in self.crew.workers.values() if w.alive and w.pid)
            self._out.append(m.Evidence(incident=incident, workers=alive, why=why))

    def _dismiss(self, worker: Worker) -> None:
        """It is not wanted any more, dead or alive."""
        if not worker.alive or not worker.asked:
            self._forget(worker)
            return
        worker.unwanted = True
        if worker.pid:
            self._out.append(m.Kill(worker=worker.name, signal=SIGKILL))

    def _forget(self, worker: Worker) -> None:
        self.crew.forget(worker)
        if worker.asked:
            self._out.append(m.Forget(worker=worker.name))

    # ------------------------------------------------------------------ the end, and the report

    def _report_s(self) -> float:
        return self.assignment.report_s if self.assignment else 1.0

    def _orphaned_at(self) -> float:
        if self._heard is None:
            return (self._began or 0.0) + self.settings.join_timeout_s
        return self._heard + self.settings.orphan_s

    def _wind_down(self, exit_code: int, message: str, now: float, signal: int) -> None:
        if self._end is not None:
            return
        self._end = (exit_code, message)
        patience_s, self._end_at = self.settings.shutdown_timeout_s, now + self.settings.shutdown_timeout_s + LEAVE_S
        if self._waits():
            patience_s, self._end_at = min(patience_s, WORKERS_SHARE * self.settings.grace_s), now + self.settings.grace_s
        for worker in list(self.crew.workers.values()):
            if not worker.alive or not worker.asked:
                self._forget(worker)
            elif self.crew.place_of(worker) is None:
                self._out.append(m.Tell(worker=worker.name, message=Leave(reason=message or "the run is over")))
                worker.kill_at = now + LEAVE_S
            elif worker.raised is None:
                self._out.append(m.Kill(worker=worker.name, signal=signal))
                worker.kill_at = now + patience_s

    def _abandon(self, message: str, now: float) -> None:
        """This node has lost its run, which may not be over."""
        self._over = self._over and self._end is not None
        self._wind_down(1, message, now, SIGTERM)

    def _waits(self) -> bool:
        """Whether what is sealed here may yet be brought to safety, and this node is needed for it."""
        new = self.assignment
        if new is None or self.settings.grace_s <= 0 or not self._managed:
            return False
        return new.wait if new.state in ("finished", "failed") else self._leaving

    def _report(self, now: float) -> None:
        """Send one if it is time, or if anything changed that somebody waits for."""
        if self._asked > self.fenced:
            return  # the answer to a Fence comes at once, and with it the report
        gone = not any(w.alive for w in self.crew.workers.values()) and not self._waits()
        over = self._end is not None and (gone or now >= self._end_at)
        report = msgspec.structs.replace(
            sheets.report(self.settings, self.crew, self._vault, self._seals, self._refused, self._findings, now),
            store=self._store,
            round=self.acted,
            fenced=self.fenced,
            leaving=self._leaving,
            assigned=self.assignment.seq if self.assignment else 0,
            acted_s=self._acted_s,
            managed=self._managed,
            admitted=self._admitted,
            admission="" if self._admitted else self._admission,
        )
        sketch = sheets.sketch(report)
        if sketch == self._sketch and now < self._report_at and not over:
            return
        self._sketch, self._report_at, self._seq = sketch, now + self._report_s(), self._seq + 1
        self._out.append(m.SendReport(report=msgspec.structs.replace(report, seq=self._seq)))
        if over and self._end is not None:
            self.finished = True
            over = self._over and (self.acted > 0 or self._leaving)  # of a run that did not come to its first round all is as it was
            self._out.append(m.Finished(exit_code=self._end[0], message=self._end[1], over=over))
