"""Coordinator: decides who sits on which rank. Deterministic: same events and nows, same actions.

Intuition: a theatre. Ranks are chairs, workers are people, a round is one seating plan. When somebody falls ill we do not repair the
evening: we print a new plan, and everybody walks to the chair it names.

The life of a run has five stages:
- gathering: nodes report; when enough are there, round 1 is seated.
- seated: the round is out. A report with `fenced >= round` (its agent saw a fault), a lost node or a verdict breaks it.
- broken: every assignment says `fence = round`; when each living node has fenced, all records are stable and the next round is seated.
- parting: a node was told to stop; every assignment says failed, and what is sealed in memory is brought to safety (rescue.py).
- ending: every assignment says finished or failed; when all have heard it, Finish.

What probes see goes through triage.py. A round that nothing has broken is broken here for one reason only: somebody sits on a device that
is broken, and another node has room.

I1 a round is seated only when every living node has fenced the one before. I4 rounds only grow. I6 every wait has a deadline.
A report costs O(chairs of its node); only seating a round looks at all ranks.
Rejected: repairing the round in force (one more protocol, and the one that is used least often).
"""

from __future__ import annotations

from typing import Literal, assert_never

import msgspec

from resilient.core import fleet, lines
from resilient.core.audits import Audits
from resilient.core.cadence import Cadence
from resilient.core.cause import Seen
from resilient.core.commits import Commits
from resilient.core.court import ONLY_TOLD, Court
from resilient.core.fleet import Node
from resilient.core.incident import Incident
from resilient.core.leases import Leases
from resilient.core.machine import (
    Announce,
    Asked,
    Assign,
    CoordinatorAction,
    CoordinatorEvent,
    CoordinatorSettings,
    Finish,
    NodeLost,
    NodeUp,
    StatusDue,
    Stop,
    Tick,
)
from resilient.core.messages import NONE, Assignment, Finding, Report, RunState
from resilient.core.moves import Closed, find
from resilient.core.placement import Room, in_order, seat_all
from resilient.core.policy import TABLE, UNKNOWN, Verdict, unrelated
from resilient.core.rescue import Rescue
from resilient.core.round import Round
from resilient.core.seating import Hall, Seating, seat
from resilient.core.tempo import Tempo
from resilient.core.triage import Taken, Triage

RESEND_S = 0.25  # an assignment that a report does not acknowledge is sent again, at most this often
REPORTS_S = 1000  # reports that the coordinator will hear in a second: larger fleets speak more rarely, and at once of what is new
REPORT_S_MAX = 12.0
BOOTS_MAX = 64  # of an agent, remembered
LEASE_REPORTS = 3  # so many reports in a row may be lost
LATE_REPORTS = 2  # in whose time the last words of an agent that is gone have come: until then they may follow the first of its successor
HEARTBEAT_S = 3.0  # and to a node that has it, this often, so that agents can tell a dead coordinator from a quiet one
MARKER_S = 60.0  # storage that has taken the files takes a line of JSON sooner than this, or not at all
STATUS_S = 1.0
CULPRIT_S = 0.01  # for each thousand ranks, between two looks at all of them
QUIET_FROM, QUIET_STEP_S, QUIET_MAX_S = 3, 1.0, 30.0  # after so many fruitless rounds, wait longer before each next one
FOREIGN_S = 60.0  # a group that does not use this library has come somewhere when it has run this long
FAILURES = ("exit", "exception", "stopped", "fork_failed")  # of a worker; what was seen around one explains it
LISTED = 64  # ranks named in one line of events.jsonl
NEVER = float("inf")

Stage = Literal["gathering", "seated", "broken", "parting", "ending", "over"]


class Coordinator:
    """See the head of this file."""

    def __init__(self, settings: CoordinatorSettings) -> None:
        """Nothing has happened yet."""
        self.settings = settings
        self.stage: Stage = "gathering"
        self.state: RunState = "forming"
        self.round = Round(settings.copies, settings.parity)
        self._evidence = 0  # the incident whose stacks are to be saved
        self.nodes: dict[str, Node] = {}
        self._lost = 0  # how many of them are not alive
        self.incident: Incident | None = None
        self.exit_code, self.message = 0, ""
        self._managed = False  # the script uses this library
        self._court = Court(settings)
        self._triage = Triage(settings.rules, settings.run)
        self._unfit: set[str] = set()  # nodes that live and are not admitted
        self._restless = False  # somebody may have to move, or have room to
        self._wave = False  # with the round in force somebody went to another node: others may follow
        self._past: Incident | None = None  # the last one that was closed: it may yet be explained
        self._commits = Commits()
        self._cadence = Cadence(every=settings.checkpoint_every, auto=settings.checkpoint_auto, budget=settings.checkpoint_budget)
        self._audits = Audits()
        self._tempo = Tempo()
        self._rescue: Rescue | None = None
        self._now = 0.0  # of the newest event, for `status`
        self._leases = Leases(settings.lease_s)
        self._unfenced: set[str] = set()  # broken: nodes that have not said so yet
        self._named = NONE  # the step that the assignments say is to be sealed next
        self._unheard: set[str] = set()  # ending: nodes that may not know it
        self._fruitless = 0  # rounds since the last one in which all ranks committed
        self._began: float | None = None  # of the stage
        self._enough: float | None = None  # gathering: since when there are `nodes_min`
        self._finish_by = NEVER  # seated, all ranks have finished: until when the last marker may take
        self._lack, self._patience = "", NEVER  # broken: what is missing for the next round, and until when it may be
        self._status_at = self._culprit_at = 0.0
        self._out: list[CoordinatorAction] = []

    # ------------------------------------------------------------------ the contract

    def step(self, event: CoordinatorEvent, now: float) -> list[CoordinatorAction]:
        """See core/machine.py."""
        if self._began is None:
            self._began = now
        self._now = now
        match event:
            case Report():
                self._on_report(event, now)
            case NodeLost():
                self._leases.shorten(event.node, now + self.settings.link_grace_s)
                if event.node in self.nodes:
                    self.nodes[event.node].heard = now
            case NodeUp():
                self._on_node_up(event.node, now)
            case Asked():
                self._ask(now)
            case Stop():
                self._part(f"stopped by signal {event.signal}", now)
            case Tick():
                pass
            case _:
                assert_never(event)
        for name in self._leases.expired(now):
            self._lose(name, f"node {name} is silent", now)
        self._advance(now)
        if now >= self._status_at or any(isinstance(action, Announce) for action in self._out):
            self._status_at = now + STATUS_S
            self._out.append(StatusDue())
        out, self._out = self._out, []
        return out

    def deadline(self) -> float | None:
        """See core/machine.py."""
        earliest = self._leases.earliest()
        at = min(self._status_at, self._stage_deadline(), NEVER if earliest is None else earliest)
        return None if self.stage == "over" else at

    def status(self) -> lines.Status:
        """What status.json says now."""
        checkpoint = self._cadence.status(len(self.round.ranks), self._now) if self.settings.checkpoints else None
        return fleet.status(
            self.settings.run,
            self.state,
            self.round.number,
            self.nodes.values(),
            self.round.seating.places,
            checkpoint,
            self._audits.status(),
            self._tempo.stragglers,
            self._triage.cordons.nodes,
        )

    # ------------------------------------------------------------------ a report

    def _on_report(self, report: Report, now: float) -> None:
        before = self._admit(report, now)
        node = self.nodes.get(report.node)
        if node is None or node.report is not report:
            return
        for line in node.news():
            self._tell(line)
        if self.stage in ("ending", "over"):
            if node.assignment is not None and report.assigned >= node.assignment.seq:
                self._unheard.discard(node.name)
        elif self._rescue is not None:
            self._rescue.take(node.name, report.chairs)
            self._commit(node, before, now)
        else:
            self._take(node, before, now)
        self._answer(node, now)

    def _admit(self, report: Report, now: float) -> Report | None:
        """Take in a report unless it is old or of another run. Returns the node's report before this one."""
        if report.run != self.settings.run:
            return None
        node = self.nodes.get(report.node)
        if node is None:
            self.nodes[report.node] = Node(report.node, len(self.nodes), report, now, since={report.boot: now})
            self._leases.lease_s = max(self.settings.lease_s, LEASE_REPORTS * self._report_s())
            self._leases.touch(report.node, now)
            self._room_changed()
            self._heed_admission(report)
            return None
        if report.boot in node.past or (report.boot == node.report.boot and report.seq <= node.report.seq):
            return None
        if report.boot != node.report.boot:
            if now - node.since.get(node.report.boot, now) >= LATE_REPORTS * self._report_s():
                node.past = (*node.past, node.report.boot)[-BOOTS_MAX:]
                node.since.pop(node.report.boot, None)
            node.since = dict([*node.since.items(), (report.boot, node.since.get(report.boot, now))][-BOOTS_MAX:])
            self._lose(node.name, f"the agent of {node.name} was started again", now)
            if node.assignment is not None:
                node.assignment = msgspec.structs.replace(node.assignment, seen=0)
        if not node.alive:
            node.alive = True
            self._room_changed()
            self._lost -= 1
            if self.stage == "broken" and node.name in self.round.ranks:
                self._unfenced.add(node.name)
        if report.store != node.report.store:
            self._lack = ""
        if (report.slots, report.spares) != (node.report.slots, node.report.spares):
            self._room_changed()
        self._heed_admission(report)
        before, node.report, node.heard = node.report, report, now
        self._leases.touch(report.node, now)
        return before

    def _room_changed(self) -> None:
        """A node may have the room that a chair waits for, or that somebody was to move to."""
        self._lack, self._restless = "", True
        self._triage.cordons.changed()

    def _heed_admission(self, report: Report) -> None:
        if report.admitted and report.node in self._unfit:
            self._unfit.discard(report.node)
            self._room_changed()
        elif not report.admitted:
            self._unfit.add(report.node)

    def _report_s(self) -> float:
        return min(REPORT_S_MAX, 1.0 + len(self.nodes) // REPORTS_S)

    def _take(self, node: Node, before: Report | None, now: float) -> None:
        """Everything that a report may change."""
        report = node.report
        if report.leaving:
            self._part(f"node {node.name} was told to stop", now)
            return
        self._managed = self._managed or report.managed
        self.round.take(report, managed=self._managed)
        seen = node.assignment.seen if node.assignment else 0
        news = [f for f in report.findings if f.seq > seen]
        news.sort(key=lambda f: (f.exit_code or 0) >= 0)  # who was killed comes first: the errors of others follow from it
        probed = [it for f in news if (f.probe or f.class_) and (it := self._triage_one(f, node, now))]  # they may explain the others
        verdicts = [self._judge(f, node, now) for f in news if not (f.probe or f.class_)]
        refused = self._refuse(node) if before is None or report.refused != before.refused else []
        if self.stage == "seated" and (report.fenced >= self.round.number or refused):
            self._break(now)
        if self.incident is not None:
            for finding, verdict in (*verdicts, *refused):
                self.incident.take(finding, verdict, node.name)
        self._explain(probed, now)
        if self.stage == "broken" and report.fenced >= self.round.fence:
            self._unfenced.discard(node.name)
        self._commit(node, before, now)
        self._audit(node, before, now)
        pace = report.pace
        sound = self.stage == "seated" and self.incident is None and report.round == self.round.number
        if sound and pace is not None:
            self._cadence.take(pace, len(self.round.ranks), now)
            self._name_step(now)
        if self.stage == "seated" and report.round == self.round.number:
            for finding in self._tempo.take(report.chairs, now):
                places = self.round.seating.places
                self._tell_finding(finding, TABLE.get(finding.kind, UNKNOWN), places[finding.rank].node if finding.rank in places else "")

    def _commit(self, node: Node, before: Report | None, now: float) -> None:
        """What lies on the persistent tier."""
        leads = node.name == self.settings.leader
        manifest = self._commits.manifest
        step = self._commits.take(node.report, before, leads=leads, world_size=len(self.round.seating.places))
        if leads and self._commits.sound:
            self._cadence.marked(max(self._commits.sound), now)
        if step != NONE:
            self._tell(lines.CheckpointCommitted(step=step))
        if self._commits.manifest != manifest and self.settings.leader in self.nodes:
            self._send(self.nodes[self.settings.leader], now)

    def _audit(self, node: Node, before: Report | None, now: float) -> None:
        """Whether replicas are still equal."""
        wish, places, leader = self._audits.wish, self.round.seating.places, self.nodes.get(self.settings.leader)
        for finding in self._audits.take(node.report, before, len(places), now, leads=node is leader):
            verdict = self._triage.heed(finding, TABLE[finding.kind])
            self._tell_finding(finding, verdict, places[finding.rank].node if finding.rank in places else node.name)
            if verdict.verdict == "halt":
                self._end("failed", 1, f"rank {finding.rank}: {verdict.why}\n{finding.text}".rstrip(), now)
        if self._audits.wish is not wish and leader is not None:
            self._send(leader, now)

    def _ask(self, now: float) -> None:
        """A checkpoint is wanted soon."""
        if self.settings.checkpoints:
            self._cadence.ask(len(self.round.ranks), now)
            self._name_step(now)

    def _name_step(self, now: float) -> None:
        """Everybody hears of the step that is to be sealed next."""
        if self._cadence.named != self._named:
            self._named = self._cadence.named
            self._send_all(now)

    def _judge(self, finding: Finding, node: Node, now: float) -> tuple[Finding, Verdict]:
        chair = node.chair(finding.rank) if finding.rank in self.round.ranks.get(node.name, ()) else None
        failure, fails = (node.name, finding.rank), finding.kind in FAILURES and not finding.consequence
        explained = self._triage.explain(failure, finding.worker, now) if fails else None
        verdict = self._court.judge(finding, chair, now, managed=self._managed, explained=explained)
        verdict = self._triage.heed(finding, verdict)
        self._tell_finding(finding, verdict, node.name)
        if fails:
            for seen, moved in self._triage.failed(
                failure, now, worker=finding.worker, unrelated=unrelated(finding, managed=self._managed)
            ):
                self._tell(lines.judged(seen.finding, moved.verdict, moved.why, seen.node))
        if verdict.verdict == "halt":
            self._end("failed", 1, f"rank {finding.rank} on {node.name}: {verdict.why}\n{finding.text}".rstrip(), now)
        if finding.kind == "warning":
            self._ask(now)
        if finding.kind == "stopped" and self._managed:
            self._evidence = self.round.number
        return finding, verdict

    def _triage_one(self, finding: Finding, node: Node, now: float) -> Seen | None:
        """What a probe saw; returned if it may be the cause of something, and is new."""
        taken = self._triage.take(finding, node.name, now, self.nodes, self.round.seating.places, len(self.nodes) - self._lost)
        told = taken.told and (self.incident is None or finding.role == "cause")
        if told:
            self._tell_finding(taken.finding, taken.verdict, taken.node)
        if taken.seen is None and self.incident is not None:
            self.incident.consequences += finding.count
        for closed in taken.opened:
            self._tell(lines.NodeOpened(node=closed.node, kind=closed.wish.finding.kind, device=closed.wish.finding.device))
            self._restless = True
        if taken.shared is not None:
            self._tell(lines.finding(taken.shared, ""))
        if taken.verdict.verdict == "halt":
            self._end("failed", 1, f"{taken.node}: {finding.kind} {finding.code}: {taken.verdict.why}\n{finding.text}".rstrip(), now)
        if told and taken.verdict.verdict in ("replace", "restart") and self._managed:
            self._renew(taken, now)
        return taken.seen

    def _renew(self, taken: Taken, now: float) -> None:
        """A rule wants those that sit there to be other processes, at once."""
        chairs = [c for r in taken.finding.ranks or () if (c := self.nodes[taken.node].chair(r)) is not None and c.worker]
        if self.stage == "seated" and chairs and taken.seen is not None and taken.seen.proof:
            self._court.condemned.update(chair.worker for chair in chairs)
            self._court.again = self._court.again or taken.verdict.verdict == "restart"
            self._break(now)
            assert self.incident is not None
            self.incident.take(msgspec.structs.replace(taken.finding, count=0), taken.verdict, taken.node)

    def _explain(self, seen: list[Seen], now: float) -> None:
        """Probes have seen something that may be the cause of what is open, or was a moment ago."""
        if self.incident is not None:
            if not self.incident.heard:
                self.incident.heard = True
                seen = self._triage.casebook.lately(now, self.incident.failures)
            if seen:
                self.incident.explain(seen)
        elif seen and (past := self._past) is not None:
            late = past.late(seen, now, self._triage.book.limits.after_s)
            if late and past.explain(late):
                self._tell(past.explained())

    def _refuse(self, node: Node) -> list[tuple[Finding, Verdict]]:
        """Copies that were refused; those that the round in force is built upon are returned."""
        refused = self._court.refuse(node.report, self.round.number)
        for finding in refused:
            self._tell_finding(finding, TABLE.get(finding.kind, UNKNOWN), node.name)
        step = self.round.seating.plan.step
        return [(finding, TABLE["refused"]) for finding in refused if finding.kind == "refused" and finding.step == step]

    # ------------------------------------------------------------------ stages

    def _advance(self, now: float) -> None:
        """Whatever is due."""
        if self.stage == "gathering":
            self._gather(now)
        if self.stage == "seated" and self._court.standstill.found and now >= self._culprit_at:
            self._culprit_at = now + CULPRIT_S * (len(self.round.seating.places) // 1000)
            self._find_culprit(now)
        if self.stage in ("seated", "broken"):
            self._close_nodes(now)
        if self.stage == "seated" and self._restless and self._managed:
            self._move(now)
        if self.stage == "seated":
            if not self.round.uncommitted and (self.state == "forming" or self.incident):
                self._settle(now)  # also where a report says at once that its ranks have committed, and are at their end
            if not self.round.unfinished:
                self._finish(now)
        if self.stage == "broken":
            if now >= self._patience:
                self._end("failed", 1, f"{self._lack or 'a node was awaited'} for {self.settings.join_timeout_s:.0f} s", now)
            elif now >= self._decide_at():
                self._decide(now)
        if self.stage == "parting":
            self._bring_to_safety(now)
        if self.stage == "ending" and (not self._unheard or now >= self._stage_deadline()):
            self.stage = "over"
            self._out.append(Finish(exit_code=self.exit_code, message=self.message))

    def _close_nodes(self, now: float) -> None:
        """Carry out what verdicts asked for and the pace allows."""
        cordons = self._triage.cordons
        if now < cordons.due():
            return
        pending = len(cordons.wishes)
        for closed in cordons.act(now, {n.name: n.report.failure_domain for n in self._alive()}):
            wish = closed.wish
            line = lines.NodeCordoned(
                node=wish.node, kind=wish.finding.kind, device=wish.finding.device, verdict=wish.verdict, why=wish.finding.text
            )
            self._tell(line)
            self._ask(now)  # what lies in its memory may be lost with it
        self._restless = self._restless or len(cordons.wishes) < pending

    def _move(self, now: float) -> None:
        """Some sit on a broken device: if there is room for them elsewhere, they go now."""
        self._restless = False
        closed = self._closed()
        if not closed.leaving:
            return
        reports = {n.name: n.report for n in self._alive()}
        over = {chair.rank for report in reports.values() for chair in report.chairs if chair.state == "finished"}
        moves = find(self.round.seating.places, reports, closed, {}, over=over)
        movers = sorted(moves.moved & closed.leaving.keys())
        if not movers:
            return
        places = self.round.seating.places
        wish = self._triage.cordons.moving(places[movers[0]])
        self._break(now)
        assert self.incident is not None
        finding = msgspec.structs.replace(wish.finding, rank=movers[0], age_s=now - wish.since, count=0)
        self.incident.take(finding, Verdict(verdict="evict", why=wish.seen.name), wish.node)
        self.incident.explain([wish.seen])

    def _closed(self) -> Closed:
        """Where nobody may come."""
        cordons = self._triage.cordons
        leaving = cordons.leaving(self.round.seating.places)
        return Closed(unfit=frozenset(self._unfit), broken=cordons.broken(), cordoned=cordons.nodes, leaving=leaving)

    def _finish(self, now: float) -> None:
        """All ranks have finished: the last checkpoint's marker is awaited, but not for ever."""
        self._finish_by = min(self._finish_by, now + MARKER_S)
        if not self._commits.asked or now >= self._finish_by:
            self._end("finished", 0, "", now)

    def _stage_deadline(self) -> float:
        began = self._began or 0.0
        match self.stage:
            case "gathering":
                calling = self._enough is not None and self._came() < self.settings.nodes_max
                return min(began + self.settings.join_timeout_s, (self._enough or 0.0) + self.settings.last_call_s if calling else NEVER)
            case "seated":
                due = self._court.standstill.due()
                return min(self._finish_by, NEVER if due is None else due, self._triage.cordons.due())
            case "broken":
                return min(self._patience, self._decide_at(), self._triage.cordons.due())
            case "parting":
                return self._rescue.deadline() if self._rescue else NEVER
            case "ending":
                return began + self.settings.farewell_s
            case "over":
                return NEVER

    def _came(self) -> int:
        """How many nodes live and may take ranks."""
        return len(self.nodes) - self._lost - len(self._unfit)

    def _refusals(self) -> str:
        """Nodes that may not take ranks, and why."""
        names = sorted(self._unfit)[:8]
        return "".join(f"; {name} is not admitted: {self.nodes[name].report.admission or 'no reason given'}" for name in names)

    def _gather(self, now: float) -> None:
        s, began = self.settings, self._began or 0.0
        came = self._came()
        self._enough = None if came < s.nodes_min else self._enough if self._enough is not None else now
        called = self._enough is not None and (came >= s.nodes_max or now >= self._enough + s.last_call_s)
        leader = self.nodes.get(s.leader)
        if called and leader is not None and leader.alive and leader.report.store and leader.report.available is not None:
            alive = [n for n in self._alive() if n.name not in self._unfit]
            first = sorted(alive, key=lambda n: (n is not leader, n.joined))[: s.nodes_max]
            rooms = in_order([Room(node=n.name, slots=n.report.slots, node_rank=n.report.node_rank, joined=i) for i, n in enumerate(first)])
            self.round.seating = Seating(places=seat_all(rooms))
            past = self.round.number = self.round.fence = max(n.report.past for n in alive)
            for node in alive:  # who was not there to the end may hold steps that were made once more, and differently
                node.report = node.report if node.report.past == past else msgspec.structs.replace(node.report, holdings=())
            self._tell(lines.RunStarted(run_id=s.run, world_size=len(self.round.seating.places), nodes=tuple(r.node for r in rooms)))
            self.stage = "broken"
            self._decide(now)
        elif now >= began + s.join_timeout_s:
            lack = "the leader has no store, or could not list the checkpoints"
            lack = f"{came} of {s.nodes_min} nodes came{self._refusals()}" if came < s.nodes_min else lack
            self._end("failed", 1, f"the run did not start within {s.join_timeout_s:.0f} s: {lack}", now)

    def _break(self, now: float) -> None:
        """The round in force is broken."""
        if not self._managed and now - (self._began or 0.0) >= FOREIGN_S:
            self._fruitless = 0
        self.round.fence, self.stage, self._began, self.state = self.round.number, "broken", now, "forming"
        self._cadence.disturbed()
        self.incident = self.incident or Incident(self.round.number, now, known=self._managed)
        self._unfenced = {n.name for n in self._alive() if n.name in self.round.ranks and n.report.fenced < self.round.fence}
        self._lack, self._patience = "", NEVER
        self._send_all(now)

    def _decide_at(self) -> float:
        """When the next round can be seated; never before all have fenced, and nothing is known to be missing."""
        if self._unfenced or self._lack:
            return NEVER
        quiet = min(QUIET_MAX_S, QUIET_STEP_S * (self._fruitless - QUIET_FROM + 1)) if self._fruitless >= QUIET_FROM else 0.0
        vague = self.incident is not None and self.incident.symptom == "suspect" and not self._anybody_gone()
        return (self._began or 0.0) + max(quiet, self.settings.suspect_s if vague else self.settings.settle_s)

    def _anybody_gone(self) -> bool:
        return any(c.state == "dead" or c.worker in self._court.condemned for n in self._alive() for c in n.report.chairs)

    def _decide(self, now: float) -> None:
        if self._fruitless >= self.settings.fruitless_max:
            cause = f"{self.incident.cause} of rank {self.incident.rank}" if self.incident else "none known"
            self._end("failed", 1, f"{self._fruitless} rounds in a row ended without a committed step; the last cause: {cause}", now)
            return
        self._court.blame((c for n in self._alive() if n.name in self.round.ranks for c in n.report.chairs), now)
        alive = self._alive()
        leader = self.nodes[self.settings.leader]
        hall = Hall(
            round=self.round.fence + 1,
            places=self.round.seating.places,
            reports={n.name: n.report for n in alive},
            condemned=self._court.condemned,
            activated=self.round.activated,
            managed=self._managed,
            again=self._court.again,
            committed=self._commits.committed,
            poison=self._court.poison,
            doubted=self._audits.doubted,
            closed=self._closed(),
        )
        seating = seat(hall)
        if seating.error:
            self._end("failed", 1, seating.error, now)
        elif seating.homeless or not leader.report.store:
            self._wait_for(seating.homeless, now)
        else:
            self._seat(seating, now)

    def _wait_for(self, homeless: tuple[int, ...], now: float) -> None:
        """Something without which no round can be seated is missing; its coming clears `_lack`."""
        self._patience = min(self._patience, now + self.settings.join_timeout_s)
        self._lack = "there was no store"
        if homeless:
            advice = "(start another node, or raise --standbys)"
            self._lack = f"no node had room for ranks {_listed(homeless)} {advice}{self._refusals()}"
            finding = Finding(seq=0, kind="no_room", rank=homeless[0], round=self.round.number, text=self._lack)
            self._tell_finding(finding, TABLE["no_room"], "")

    def _seat(self, seating: Seating, now: float) -> None:
        """The round is decided: send it out."""
        stood = self.round.seating.places
        self._wave = any(stood[r].node != p.node for r, p in seating.places.items())
        self.round.seat(seating, {n.name: n.report for n in self._alive()})
        self.stage, self._began = "seated", now
        self._lack, self._patience = "", NEVER
        self._fruitless += 1
        self._court.adjourn(worker for workers in seating.put_down.values() for worker in workers)
        plan, incident = seating.plan, self.incident
        self._commits.begin(self.round.number, plan.step)
        self._audits.seated(self.round.number, plan)
        self._tempo.seated({rank: place.node for rank, place in self.round.seating.places.items()} if self._managed else {})
        if incident is not None:
            incident.decide(plan, seating.reached, now)
        line = lines.RoundStarted(
            round=self.round.number,
            reason="start" if incident is None else f"{incident.cause} of rank {incident.rank}",
            step=plan.step,
            tier=plan.tier,
            receivers=len(plan.receivers),
            emptied=seating.emptied[:LISTED],
            why=seating.why,
        )
        self._tell(line)
        self._send_all(now)

    def _settle(self, now: float) -> None:
        """Every rank has committed: the incident is over."""
        self.state = "running"
        if self._managed:
            self._fruitless = 0
        self._out.append(StatusDue())
        if self.incident is not None:
            closed = self.incident.close((n.report for n in self._alive()), self.round.number, now)
            self._tell(closed)
            self._past, self.incident = self.incident, None
            self._restless = self._restless or self._wave
            if closed.cause == "node_lost" or closed.restored_from == "persistent":
                self._cadence.failed()

    def _find_culprit(self, now: float) -> None:
        """Some ranks stand still: break the round if it is known who is to blame, or nobody will be."""
        found, blamed = self._court.blame((c for n in self._alive() if n.name in self.round.ranks for c in n.report.chairs), now)
        due = self._court.standstill.due()
        if due is None:
            return
        if found.wait:
            self._court.standstill.since = now if now >= due else self._court.standstill.since
        elif blamed or now >= due:
            verdict = Verdict(verdict=found.verdict if blamed else "watch", why=found.why)
            self._evidence = self.round.number
            told = [(f, self.round.seating.places[f.rank].node if blamed else "") for f in blamed or [_nobody(found.why)]]
            if self._court.only_told():
                for finding, node in told:
                    self._tell_finding(finding, ONLY_TOLD, node)
                self._send_all(now)
                return
            self._break(now)
            assert self.incident is not None
            for finding, node in told:
                self._tell_finding(finding, verdict, node)
                self.incident.take(finding, verdict, node)
                for seen, moved in self._triage.failed((node, finding.rank), now, worker=finding.worker) if blamed else ():
                    self._tell(lines.judged(seen.finding, moved.verdict, moved.why, seen.node))
            self._explain([], now)
            if verdict.verdict == "halt":
                self._end("failed", 1, f"{found.why}, for the second time at this step", now)

    def _on_node_up(self, name: str, now: float) -> None:
        node = self.nodes.get(name)
        if node is not None and node.alive:
            self._leases.touch(name, now)
            node.sent = -NEVER
            self._answer(node, now)

    def _lose(self, name: str, text: str, now: float) -> None:
        node = self.nodes[name]
        if not node.alive:
            return
        node.alive, node.stale = False, True
        self._lost += 1
        self._unfit.discard(name)
        self._triage.cordons.changed()
        self._leases.drop(name)
        self._unfenced.discard(name)
        self._unheard.discard(name)
        if self._rescue is not None:
            self._rescue.take(name, ())
        if self.stage not in ("seated", "broken") or name not in self.round.ranks:
            return
        if self.stage == "seated":
            self._break(now)
        assert self.incident is not None
        finding = Finding(
            seq=0, kind="node_lost", rank=self.round.ranks[name][0], text=text, round=self.round.number, age_s=now - node.heard
        )
        self._tell_finding(finding, TABLE["node_lost"], name)
        self.incident.take(finding, TABLE["node_lost"], name)
        self._explain([], now)

    def _part(self, text: str, now: float) -> None:
        """Told to stop: the workers are ended, and what lies sealed in memory is brought to safety first."""
        if self.stage in ("parting", "ending", "over"):
            return
        if self.stage == "gathering" or not self._managed or self.settings.grace_s <= 0:
            self._end("failed", 1, text, now)
            return
        self.stage, self.state, self._began = "parting", "failed", now
        self.exit_code, self.message = 1, text
        self._rescue = Rescue((name for name in self.round.ranks if self.nodes[name].alive), self.settings.grace_s, now)
        self._send_all(now)

    def _bring_to_safety(self, now: float) -> None:
        rescue, committed, places = self._rescue, self._commits.sound, self.round.seating.places
        assert rescue is not None, "parting begins with one"
        if rescue.ready(now):
            homes = {rank: self.nodes[place.node] for rank, place in places.items()}
            rescue.choose({r: n.chair(r) if n.alive else None for r, n in homes.items()}, committed, self._court.poison)
            self._send_all(now)
        if rescue.over(committed, now):
            outcome = rescue.outcome(committed, self._commits.files(rescue.step), len(places), self.settings.grace_s)
            self._end("failed", 1, f"{self.message}; {outcome}", now)

    def _end(self, state: RunState, exit_code: int, message: str, now: float) -> None:
        if self.stage in ("ending", "over"):
            return
        self.stage, self.state, self._began = "ending", state, now
        self.exit_code, self.message = exit_code, message
        self._tell(lines.RunFinished(exit_code=exit_code, message=message))
        self._send_all(now)
        self._unheard = {n.name for n in self._alive()}

    # ------------------------------------------------------------------ what goes out

    def _alive(self) -> list[Node]:
        return [n for n in self.nodes.values() if n.alive]

    def _tell(self, line: lines.EventLine) -> None:
        self._out.append(Announce(line=line))

    def _tell_finding(self, finding: Finding, verdict: Verdict, node: str) -> None:
        self._tell(lines.finding(finding, node))
        self._tell(lines.judged(finding, verdict.verdict, verdict.why, node))

    def _send_all(self, now: float) -> None:
        for node in self._alive():
            self._send(node, now)

    def _send(self, node: Node, now: float) -> None:
        """Everything this node should be; only if something on it changed."""
        old, node.stale = node.assignment, False
        seen = max((f.seq for f in node.report.findings), default=old.seen if old else 0)
        new = self._compose(node, old.seq if old else 0, seen)
        if new != old:
            node.assignment, node.sent = msgspec.structs.replace(new, seq=new.seq + 1), now
            self._out.append(Assign(node=node.name, assignment=node.assignment))

    def _answer(self, node: Node, now: float) -> None:
        """After a report: what it made new, or what the node has not heard, or a sign of life."""
        sheet = node.assignment
        if sheet is None or node.stale or ((findings := node.report.findings) and findings[-1].seq > sheet.seen):
            self._send(node, now)
        elif now - node.sent >= (RESEND_S if node.report.assigned < sheet.seq else HEARTBEAT_S):
            node.sent = now
            self._out.append(Assign(node=node.name, assignment=sheet))

    def _compose(self, node: Node, seq: int, seen: int) -> Assignment:
        leader = self.nodes.get(self.settings.leader)
        leads = node is leader
        return msgspec.structs.replace(
            self.round.sheet(self.settings.run, node.name),
            seq=seq,
            seen=seen,
            state=self.state,
            store=leader.report.store if leader else "",
            incident=self.incident.number if self.incident else 0,
            commit=self._commits.commit if leads else NONE,
            manifest=self._commits.manifest if leads else (),
            exit_code=self.exit_code,
            message=self.message,
            report_s=self._report_s(),
            evidence=self._evidence,
            checkpoint=self._named,
            rescue=self._rescue.step if self._rescue is not None and self.stage == "parting" else NONE,
            wait=self.stage == "parting",
            distrusted=tuple(sorted(self._commits.wrong)),
            term=self.settings.term,
            compare=self._audits.wish if leads else None,
        )


def _nobody(why: str) -> Finding:
    return Finding(seq=0, kind="suspect", text=why)


def _listed(ranks: tuple[int, ...]) -> str:
    return ", ".join(str(r) for r in ranks[:8]) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
