"""Agent: keeps the workers of one node as the newest assignment says, and reports all it knows. Deterministic.

Intuition: a stage manager. The director's sheet says who should sit where; the stage manager walks the rows, fills what is empty, sends
home who must go, and when somebody falls ill stops the scene at once (the fence) and calls the director: he never decides who plays.

Contract, besides core/machine.py:
- A fault of a chair (exit, exception, stop, suspect ...) fences the round in force before anything is reported; the report that tells
  of it carries the records read after the fence.
- A round is acted upon once, and only after its `fence` stands in all pages. Only workers named in `put_down` lose their chairs and only
  empty chairs are filled: a worker that died after the coordinator looked makes a newer round, never a quiet replacement (I3).
- A chair is taken by the worker that holds it, else by a standby that shadows its rank, else by a parked standby that may take any rank,
  else by a newcomer forked for it.
- `Seated` goes out when the worker has joined and its copies are fetched, and again whenever it changes.
- Standbys are started when all chairs of the node have committed, so that they never slow a recovery down.
"""

from __future__ import annotations

from typing import assert_never

import msgspec

from resilient.core import crew
from resilient.core.crew import Minutes, Place, Worker
from resilient.core.hang import Watch
from resilient.core.machine import (
    AgentAction,
    AgentEvent,
    AgentSettings,
    Allocate,
    Allocated,
    Assigned,
    Evidence,
    Exited,
    Fence,
    Finished,
    Fork,
    Forked,
    ForkFailed,
    Forget,
    Keep,
    Kill,
    LinkDown,
    LinkUp,
    Log,
    Look,
    Looked,
    Said,
    Seals,
    SendReport,
    StartStore,
    Stop,
    StoreDown,
    StoreUp,
    Tell,
    Tick,
    VaultDo,
    Vaulted,
    ZygoteDown,
    ZygoteUp,
)
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
    Report,
    Seat,
    Seated,
    Suspect,
)

REPORT_S = 1.0
LOOK_S, LOOK_FORMING_S, FORMING_S = 0.05, 0.005, 30.0
SIGTERM, SIGKILL = 15, 9  # the numbers of every Linux
LEAVE_S = 2.0  # a standby that was told to leave and a worker that reported its exception end by themselves within this
STORE_RETRY_S = 1.0
STANDBY_TRIES = 3  # standbys that died in a row before their warm-up was over
FINDINGS_MAX = 256


class Agent:
    """See the head of this file."""

    def __init__(self, settings: AgentSettings) -> None:
        """Nothing has happened yet."""
        self.settings = settings
        self.assignment: Assignment | None = None
        self.workers: dict[str, Worker] = {}
        self.chairs: dict[int, Place] = {}
        self.fenced = 0  # every page says so, and all was read after it
        self.acted = self.restart = 0  # newest round and group start that were acted upon
        self.managed = settings.managed
        self.vault: Vaulted | None = None
        self.seals: dict[int, Seals] = {}
        self.store = ""
        self._acted_s = 0.0
        self._asked = 0  # Fence is out
        self._evidence = 0
        self._minutes: dict[int, Minutes] = {}
        self._findings: list[Finding] = []
        self._refused: list[Refused] = []
        self._vault_do: VaultDo | None = None
        self._zygote = False
        self._store_at: float | None = None  # when to start the store
        self._heard: float | None = None  # when the coordinator last said something
        self._began: float | None = None
        self._count = self._seq = self._finding_seq = self._standbys_lost = 0
        self._end: tuple[int, str] | None = None  # (exit code, message): winding down
        self._end_at = 0.0
        self.leaving = self.finished = False
        self._report_at = 0.0
        self._told: object = None  # what the last report said, without what moves all the time
        self._out: list[AgentAction] = []

    # ------------------------------------------------------------------ the contract

    def step(self, event: AgentEvent, now: float) -> list[AgentAction]:
        """See core/machine.py."""
        if self.finished:
            return []
        if self._began is None:
            self._began = now
            self._store_at = now if self.settings.hosts_store else None
        match event:
            case Looked():
                self._on_looked(event, now)
            case Forked():
                self._on_forked(event)
            case ForkFailed():
                self._on_fork_failed(event, now)
            case Exited():
                self._on_exited(event, now)
            case Said():
                self._on_said(event, now)
            case Assigned():
                self._on_assigned(event.assignment, now)
            case Allocated():
                self._on_allocated(event, now)
            case Vaulted():
                self.vault = event
            case StoreUp():
                self.store = event.addr
            case StoreDown():
                self._on_store_down(event, now)
            case ZygoteUp():
                self._zygote = True
            case ZygoteDown():
                self._on_zygote_down(event, now)
            case LinkUp():
                self._told = None
            case Stop():
                self.leaving = True
                self._wind_down(1, f"signal {event.signal}", now, event.signal)
            case LinkDown() | Tick():
                pass
            case _:
                assert_never(event)
        self._reconcile(now)
        self._report(now)
        out, self._out = self._out, []
        return out

    def deadline(self) -> float | None:
        """See core/machine.py."""
        if self.finished:
            return None
        times = [self._report_at, self._store_at, *(w.kill_at for w in self.workers.values())]
        times.append(self._end_at if self._end else self._orphaned_at())
        return min(t for t in times if t is not None)

    def look_every_s(self) -> float:
        """How often the host should look at the pages now."""
        forming = self.acted > self._asked and any(not _committed(p.worker, self.acted) for p in self.chairs.values())
        recent = self._report_at - REPORT_S < self._acted_s + FORMING_S
        return LOOK_FORMING_S if forming and recent and self.managed else LOOK_S

    # ------------------------------------------------------------------ what the host saw

    def _on_looked(self, event: Looked, now: float) -> None:
        self.seals = event.seals
        for name, look in event.workers.items():
            if (worker := self.workers.get(name)) is not None:
                worker.record = look.record
                worker.parked = worker.parked or look.parked
                if look.parked:
                    self._standbys_lost = 0
        if event.fence > self.fenced:
            self.fenced = event.fence
            for worker in self._seated_workers():
                if worker.seated and worker.seated.round <= self.fenced and worker.fenced < self.fenced:
                    worker.fenced = self.fenced
                    self._out.append(Tell(worker=worker.name, message=Fenced(round=self.fenced)))
        elif not self._end:
            self._watch(event.workers, now)

    def _watch(self, looks: dict[str, Look], now: float) -> None:
        seated = {p.worker.name: p for p in self.chairs.values() if p.worker and p.worker.alive and p.worker.name in looks}
        running = sum(looks[name].os_state not in ("T", "t") for name in seated)
        alone = len(seated) == 1 and self.assignment is not None and self.assignment.world_size > 1
        for name, look in looks.items():
            worker = self.workers.get(name)
            if worker is None or not worker.alive or worker.unwanted or worker.raised:
                continue
            seen = worker.watch.look(look.record, look.os_state, look.cpu_s, now, neighbours_run=running > 0 or alone or name not in seated)
            if seen is None:
                continue
            if name not in seated:
                if seen.kind == "stopped":
                    self._out.append(Kill(worker=name, signal=SIGKILL))
                continue
            if self.acted > self._asked:
                self._save_evidence(self.acted, seen.text)
            self._find(seen.kind, now, worker, since=seen.since, text=seen.text, fence=seen.kind == "stopped" and self.managed)

    def _on_forked(self, event: Forked) -> None:
        if (worker := self.workers.get(event.worker)) is not None:
            worker.pid = event.pid
            if worker.unwanted:
                self._out.append(Kill(worker=worker.name, signal=SIGKILL))

    def _on_fork_failed(self, event: ForkFailed, now: float) -> None:
        worker = self.workers.get(event.worker)
        if worker is None:
            return
        worker.exit_code = 1
        if not self._drop_if_unseated(worker, now, event.reason):
            self._find("fork_failed", now, worker, text=event.reason, fence=True)

    def _on_exited(self, event: Exited, now: float) -> None:
        worker = self.workers.get(event.worker)
        if worker is None or not worker.alive:
            return
        worker.exit_code, worker.record = event.exit_code, event.record or worker.record
        worker.kill_at = None
        if self._drop_if_unseated(worker, now, event.text) or worker.raised is not None or crew.chair_state(worker) == "finished":
            return
        broken = worker.record is not None and worker.fenced >= worker.record.round > 0
        text = event.text or (f"killed by signal {-event.exit_code}" if event.exit_code < 0 else f"exit code {event.exit_code}")
        self._find("exit", now, worker, text=text, consequence=broken and event.exit_code >= 0, exit_code=event.exit_code, fence=True)

    def _drop_if_unseated(self, worker: Worker, now: float, text: str) -> bool:
        """A dead worker without a chair is forgotten; a standby is missed with a finding."""
        if any(p.worker is worker for p in self.chairs.values()) and not self._end:
            return False
        self._forget(worker)
        if not worker.unwanted and not self._end:
            self._standbys_lost += not worker.parked
            text = (worker.raised.text if worker.raised else text) or f"standby for rank {worker.rank}: exit code {worker.exit_code}"
            self._find("standby_lost", now, None, text=text, exit_code=worker.exit_code)
            if self._standbys_lost == STANDBY_TRIES:
                self._find("standbys_off", now, None, text=f"{STANDBY_TRIES} standbys died during their warm-up")
        return True

    def _on_store_down(self, event: StoreDown, now: float) -> None:
        again = bool(self.store)
        self.store, self._store_at = "", now if again else now + STORE_RETRY_S
        if again:
            self._find("store_lost", now, None, text=event.reason, fence=self.managed)

    def _on_zygote_down(self, event: ZygoteDown, now: float) -> None:
        self._zygote = False
        self._find("zygote_lost", now, None, text=event.reason)
        for worker in [w for w in self.workers.values() if w.asked and w.pid == 0 and w.alive]:
            del self.workers[worker.name]  # whether it was forked is unknown: never use its name again
            self._out.append(Forget(worker=worker.name))
            place = next((p for p in self.chairs.values() if p.worker is worker), None)
            if place is not None and not worker.unwanted:
                place.worker = self._hire(worker.role, place.rank, place.local_rank)

    # ------------------------------------------------------------------ what a worker said

    def _on_said(self, event: Said, now: float) -> None:
        worker, message = self.workers.get(event.worker), event.message
        if isinstance(message, Recorded):
            self._on_recorded(message, share=worker is not None)
            return
        if worker is None or not worker.alive or worker.unwanted:
            self._out.append(Tell(worker=event.worker, message=Leave(reason="this worker is not wanted any more")))
            return
        match message:
            case Join():
                worker.joined, worker.any_rank, self.managed = True, message.any_rank, True
            case Layout():
                if (place := self._chair_of(worker)) is not None:
                    place.layout = message
                self._out.append(Allocate(worker=worker.name, layout=message))
            case Recall():
                self._on_recall(worker, message, now)
            case Suspect():
                if message.round == self.acted > self._asked and self._chair_of(worker):
                    self._find("suspect", now, worker, text=message.text, fence=True)
            case Raised():
                self._on_raised(worker, message, now)
            case Marked():
                self._out.append(Log(rank=worker.rank, message=message))
            case Refused():
                if message not in self._refused:
                    self._refused.append(message)
                    self._fence(self.acted)
            case _:
                assert_never(message)

    def _on_recorded(self, item: Recorded, *, share: bool) -> None:
        minutes = self._minutes.setdefault(item.rank, Minutes())
        if minutes.add(item):
            if share:
                self._out.append(Keep(recorded=item))
            for name in minutes.waiting.pop(item.index, ()):
                self._out.append(Tell(worker=name, message=item))

    def _on_recall(self, worker: Worker, message: Recall, now: float) -> None:
        minutes = self._minutes.setdefault(message.rank, Minutes())
        if minutes.overflow:
            reason = f"the set-up of rank {message.rank} was larger than what is kept ({crew.MINUTES_BYTES >> 20} MiB, {crew.MINUTES_COUNT} results)"
            self._out.append(Tell(worker=worker.name, message=Leave(reason=reason)))
            if self._chair_of(worker):
                self._find("unrecorded", now, worker, text=reason, fence=True)
        elif (item := minutes.entries.get(message.index)) is not None:
            self._out.append(Tell(worker=worker.name, message=item))
        else:
            minutes.waiting.setdefault(message.index, []).append(worker.name)

    def _on_raised(self, worker: Worker, message: Raised, now: float) -> None:
        worker.raised, worker.kill_at = message, now + LEAVE_S
        if self._chair_of(worker):
            self._find(
                "exception",
                now,
                worker,
                text=message.text,
                fingerprint=message.fingerprint,
                consequence=message.consequence or message.torn_down,
                step=message.step,
                exit_code=1,
                fence=True,
            )

    def _on_allocated(self, event: Allocated, now: float) -> None:
        if (worker := self.workers.get(event.worker)) is not None:
            self._out.append(Tell(worker=worker.name, message=event.segments))
            if event.segments.error:
                self._find("allocation", now, worker, text=event.segments.error)

    # ------------------------------------------------------------------ what the coordinator said

    def _on_assigned(self, new: Assignment, now: float) -> None:
        self._heard = now
        if self._end or (self.assignment is not None and new.seq <= self.assignment.seq):
            return
        self.assignment = new
        self._findings = [f for f in self._findings if f.seq > new.seen]
        if new.evidence > self._evidence:
            self._save_evidence(new.evidence, "a rank does not move")
        if new.state in ("finished", "failed"):
            self._wind_down(new.exit_code, new.message, now, SIGTERM)
        else:
            self._fence(new.fence)

    def _reconcile(self, now: float) -> None:
        """Make the node what it should be."""
        for worker in list(self.workers.values()):
            if worker.kill_at is not None and now >= worker.kill_at:
                worker.kill_at = None
                self._out.append(Kill(worker=worker.name, signal=SIGKILL))
        if self._store_at is not None and now >= self._store_at:
            self._store_at = None
            self._out.append(StartStore())
        if not self._end and now >= self._orphaned_at():
            self._wind_down(1, f"no word from the coordinator for {now - (self._heard or self._began or 0.0):.0f} s", now, SIGTERM)
        if self._end or self.assignment is None:
            return
        new = self.assignment
        if new.round > max(new.fence, self.acted) and self.fenced >= new.fence:
            self._act(new, now)
        if new.round == self.acted > self._asked:
            self._keep_standbys()
            self._seat_workers(new)
        self._fork_wanted(new)
        self._instruct_vault(new)

    def _act(self, new: Assignment, now: float) -> None:
        """Walk the rows for a new round."""
        self.acted, self._acted_s = new.round, now
        if new.restart > self.restart:
            self.restart = new.restart
            self._minutes.clear()
            for worker in self._standbys():
                self._dismiss(worker)
        wanted = {seat.rank: seat for seat in new.seats}
        for rank, place in list(self.chairs.items()):
            worker = place.worker
            if worker is not None and (worker.name in new.put_down or rank not in wanted):
                place.worker = None
                self._dismiss(worker)
            if rank not in wanted:
                del self.chairs[rank]
        for seat in new.seats:
            place = self.chairs.setdefault(seat.rank, Place(seat.rank, seat.local_rank))
            if place.worker is None:
                self._fill(place, seat)
        if any(crew.chair_state(p.worker) == "dead" for p in self.chairs.values()):
            self._fence(new.round)

    def _fill(self, place: Place, seat: Seat) -> None:
        standbys = [] if seat.fresh else [w for w in self._standbys() if not w.raised]
        able = [w for w in standbys if w.rank == place.rank or (w.any_rank and w.parked)]
        chosen = min(able, key=lambda w: (w.rank != place.rank, not w.parked, w.name), default=None)
        if chosen is None:
            chosen = self._hire("rank" if seat.fresh else "standby", place.rank, place.local_rank)
        chosen.rank, chosen.local_rank = place.rank, place.local_rank
        place.worker = chosen

    def _seat_workers(self, new: Assignment) -> None:
        """Tell everybody who is ready which chair it holds."""
        fetched = set(self.vault.fetched) if self.vault else set()
        for place in self.chairs.values():
            worker = place.worker
            if worker is None or not worker.alive or not worker.joined or worker.raised:
                continue
            if any(f.rank == place.rank and f not in fetched for f in new.fetch):
                continue
            seals = self.seals.get(place.rank) or Seals()
            seated = Seated(
                round=new.round,
                rank=place.rank,
                local_rank=place.local_rank,
                world_size=new.world_size,
                node_rank=new.node_rank,
                nodes=new.nodes,
                local_world_size=len(new.seats),
                store=new.store,
                plan=new.plan,
                snapshot=seals.snapshots.get(new.plan.step, "") if new.plan.tier in ("memory", "peer", "persistent") else "",
                own=seals.own,
                own_bytes=seals.own_bytes,
            )
            if worker.seated is None or worker.seated.round < new.round:
                worker.seated = seated
                self._out.append(Tell(worker=worker.name, message=seated))

    def _keep_standbys(self) -> None:
        """As many as there should be: warmed up when the recovery is over, sent away when chairs came from another node."""
        standbys, chairs = self._standbys(), sorted(self.chairs.values(), key=lambda p: p.local_rank)
        room = max(0, self.settings.standbys - max(0, len(chairs) - self.settings.slots))
        for worker in standbys[room:]:
            self._dismiss(worker)
        settled = bool(chairs) and all(p.worker and p.worker.alive and _committed(p.worker, self.acted) for p in chairs)
        if not settled or self._standbys_lost >= STANDBY_TRIES:
            return
        for _ in range(room - len(standbys)):
            shadowed = [w.rank for w in self._standbys()]
            place = min(chairs, key=lambda p: (shadowed.count(p.rank), p.local_rank))
            self._hire("standby", place.rank, place.local_rank)

    def _fork_wanted(self, new: Assignment) -> None:
        for worker in self.workers.values() if self._zygote else ():
            if not worker.asked:
                worker.asked = True
                self._out.append(
                    Fork(
                        worker=worker.name,
                        role=worker.role,
                        rank=worker.rank,
                        local_rank=worker.local_rank,
                        world_size=new.world_size,
                        local_world_size=len(new.seats),
                        node_rank=new.node_rank,
                        nodes=new.nodes,
                        store=new.store,
                        restart=self.restart,
                        round=new.round,
                    )
                )

    def _instruct_vault(self, new: Assignment) -> None:
        wish = VaultDo(
            peers=new.peers,
            fetch=new.fetch,
            commit=new.commit,
            manifest=new.manifest,
            world_size=new.world_size,
            ranks=tuple(sorted(s.rank for s in new.seats)),
        )
        if wish != self._vault_do:
            self._vault_do = wish
            self._out.append(wish)

    # ------------------------------------------------------------------ small things

    def _find(
        self,
        kind: str,
        now: float,
        worker: Worker | None,
        *,
        fence: bool = False,
        since: float | None = None,
        text: str = "",
        fingerprint: str = "",
        consequence: bool = False,
        step: int | None = None,
        exit_code: int | None = None,
    ) -> None:
        """Note a fact; with `fence`, the round in force is broken by it."""
        self._finding_seq += 1
        record = worker.record if worker else None
        self._findings.append(
            Finding(
                seq=self._finding_seq,
                kind=kind,
                rank=worker.rank if worker else NONE,
                worker=worker.name if worker else "",
                pid=worker.pid if worker else 0,
                t=now if since is None else since,
                step=step if step is not None else record.step if record else NONE,
                round=self.acted,
                text=text[:16384],
                fingerprint=fingerprint,
                consequence=consequence,
                exit_code=exit_code,
            )
        )
        del self._findings[:-FINDINGS_MAX]
        if fence:
            self._fence(self.acted)

    def _fence(self, round: int) -> None:
        if round > self._asked:
            self._asked = round
            self._out.append(Fence(round=round))

    def _save_evidence(self, incident: int, why: str) -> None:
        if incident > self._evidence:
            self._evidence = incident
            alive = tuple(w.name for w in self.workers.values() if w.alive and w.pid)
            self._out.append(Evidence(incident=incident, workers=alive, why=why))

    def _hire(self, role: str, rank: int, local_rank: int) -> Worker:
        self._count += 1
        boot = f"{self.settings.boot}." if self.settings.boot > 1 else ""
        name = f"{self.settings.node}.{boot}{self._count}"
        self.workers[name] = worker = Worker(name, role, rank, local_rank, Watch(self.settings.first_step_timeout_s))
        return worker

    def _dismiss(self, worker: Worker) -> None:
        """It is not wanted any more, dead or alive."""
        if not worker.alive or not worker.asked:
            self._forget(worker)
            return
        worker.unwanted = True
        if worker.pid:
            self._out.append(Kill(worker=worker.name, signal=SIGKILL))

    def _forget(self, worker: Worker) -> None:
        self.workers.pop(worker.name, None)
        if worker.asked:
            self._out.append(Forget(worker=worker.name))

    def _chair_of(self, worker: Worker) -> Place | None:
        place = self.chairs.get(worker.rank)
        return place if place is not None and place.worker is worker else None

    def _seated_workers(self) -> list[Worker]:
        return [p.worker for p in self.chairs.values() if p.worker is not None and p.worker.alive]

    def _standbys(self) -> list[Worker]:
        """Those without a chair that are wanted, best first."""
        free = [w for w in self.workers.values() if w.alive and not w.unwanted and self._chair_of(w) is None]
        return sorted(free, key=lambda w: (not w.parked, not w.joined, w.name))

    # ------------------------------------------------------------------ the end

    def _orphaned_at(self) -> float:
        if self._heard is None:
            return (self._began or 0.0) + self.settings.join_timeout_s
        return self._heard + self.settings.orphan_s

    def _wind_down(self, exit_code: int, message: str, now: float, signal_: int) -> None:
        if self._end is not None:
            return
        self._end = (exit_code, message)
        self._end_at = now + self.settings.shutdown_timeout_s + LEAVE_S
        for worker in list(self.workers.values()):
            if not worker.alive or not worker.asked:
                self._forget(worker)
            elif self._chair_of(worker) is None:
                self._out.append(Tell(worker=worker.name, message=Leave(reason=message or "the run is over")))
                worker.kill_at = now + LEAVE_S
            elif worker.raised is None:
                self._out.append(Kill(worker=worker.name, signal=signal_))
                worker.kill_at = now + self.settings.shutdown_timeout_s

    def _report(self, now: float) -> None:
        """Send one if it is time, or if anything changed that somebody waits for."""
        vault = self.vault or Vaulted()
        over = self._end is not None and (not any(w.alive for w in self.workers.values()) or now >= self._end_at)
        chairs = tuple(crew.chair(p, self.seals.get(p.rank)) for _, p in sorted(self.chairs.items()))
        standbys = tuple(crew.standby(w) for w in self.workers.values() if self._chair_of(w) is None and w.alive and not w.unwanted)
        sketch = (
            tuple((c.worker, c.state, c.pid, c.layout, c.record is not None and c.record.committed_s > 0) for c in chairs),
            standbys,
            self._finding_seq,
            len(self._refused),
            (vault.persisted, vault.refused, vault.available, vault.fetched, vault.committed),
            (self.fenced, self.acted, self.store, self.managed, self.leaving, self.assignment.seq if self.assignment else 0),
        )
        if self._asked > self.fenced or (sketch == self._told and now < self._report_at and not over):
            return  # a fence is on its way: its answer comes at once, and with it the report
        self._told, self._report_at = sketch, now + REPORT_S
        self._seq += 1
        s = self.settings
        report = Report(
            run=s.run,
            node=s.node,
            boot=s.boot,
            seq=self._seq,
            host=s.host,
            data_port=s.data_port,
            store=self.store,
            slots=s.slots,
            spares=s.standbys,
            node_rank=s.node_rank,
            round=self.acted,
            fenced=self.fenced,
            chairs=chairs,
            standbys=standbys,
            findings=tuple(msgspec.structs.replace(f, age_s=max(0.0, now - f.t)) for f in self._findings),
            holdings=vault.holdings,
            persisted=vault.persisted,
            refused=(*self._refused, *vault.refused),
            available=vault.available,
            fetched=tuple(sorted({f.rank for f in vault.fetched})),
            committed=vault.committed,
            leaving=self.leaving,
            assigned=self.assignment.seq if self.assignment else 0,
            acted_s=self._acted_s,
            managed=self.managed,
        )
        self._out.append(SendReport(report=report))
        if over and self._end is not None:
            self.finished = True
            self._out.append(Finished(exit_code=self._end[0], message=self._end[1]))


def _committed(worker: Worker | None, round: int) -> bool:
    """Whether it has completed a step in this round (or the loop is over)."""
    record = worker.record if worker else None
    return record is not None and record.round == round and (record.committed_s > 0 or record.phase == "done")
