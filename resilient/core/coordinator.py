"""Coordinator: decides who sits on which rank. Deterministic: same events and nows, same actions.

Intuition: a theatre. Ranks are chairs, workers are people, a round is one seating plan. When somebody falls ill we do not repair the
evening: we print a new plan, and everybody walks to the chair it names.

The life of a run is four stages:
- gathering: nodes report; when enough are there, round 1 is seated.
- seated: the round is out. A report with `fenced >= round` (its agent saw a fault), a lost node or a verdict breaks it.
- broken: every assignment says `fence = round`; when each living node has fenced, all records are stable and the next round is seated.
- ending: every assignment says finished or failed; when all have heard it, Finish.

I1 a round is seated only when every living node has fenced the one before. I4 rounds only grow. I6 every wait has a deadline.
A report costs O(chairs of its node); only seating a round looks at all ranks.
Rejected: repairing the round in force (one more protocol, and the one that is used least often).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, assert_never

import msgspec

from resilient.core import hang, lines
from resilient.core.incident import Incident
from resilient.core.leases import Leases
from resilient.core.machine import Announce, Assign, CoordinatorAction, CoordinatorEvent, CoordinatorSettings, Finish, NodeLost, NodeUp, StatusDue, Stop, Tick
from resilient.core.messages import NONE, Assignment, Chair, Finding, Persisted, Plan, Report, RunState, Seat
from resilient.core.placement import Place, Room, in_order, ring, seat_all
from resilient.core.policy import TABLE, Trials, Verdict, judge
from resilient.core.seating import Hall, Seating, seat

RESEND_S = 0.25  # an assignment that a report does not acknowledge is sent again, at most this often
HEARTBEAT_S = 3.0  # and to a node that has it, this often, so that agents can tell a dead coordinator from a quiet one
STATUS_S = 1.0
QUIET_FROM, QUIET_STEP_S, QUIET_MAX_S = 3, 1.0, 30.0  # after so many fruitless rounds, wait longer before each next one
LISTED = 64  # ranks named in one line of events.jsonl

Stage = Literal["gathering", "seated", "broken", "ending", "over"]


@dataclass(slots=True)
class Node:
    """One agent, as the coordinator knows it."""

    name: str
    joined: int
    report: Report
    assignment: Assignment | None = None
    sent: float = float("-inf")
    alive: bool = True
    stale: bool = False  # it was lost: its sheet may be old
    known: frozenset[str] = frozenset()  # workers announced
    ready: frozenset[str] = frozenset()  # standbys announced as parked


@dataclass(slots=True)
class Checkpoints:
    """What lies on the persistent tier."""

    committed: set[int] = field(default_factory=set)
    pending: dict[int, dict[int, Persisted]] = field(default_factory=dict)  # step -> rank -> file
    commit: int = NONE  # the step whose marker the leader is to write
    manifest: tuple[Persisted, ...] = ()


class Coordinator:
    """See the head of this file."""

    def __init__(self, settings: CoordinatorSettings) -> None:
        """Nothing has happened yet."""
        self.settings = settings
        self.stage: Stage = "gathering"
        self.state: RunState = "forming"
        self.round = self.fence = self.restart = self.evidence = 0
        self.nodes: dict[str, Node] = {}
        self.seating = Seating(places={})
        self.ranks: dict[str, list[int]] = {}  # node -> its ranks, ascending
        self._order: dict[str, int] = {}  # node -> torchrun's GROUP_RANK
        self._peers: dict[str, str] = {}  # node -> vault that its copies go to
        self.activated: set[int] = set()
        self.condemned: set[str] = set()
        self.poison: set[tuple[str, int, int]] = set()
        self.checkpoints = Checkpoints()
        self.managed = self.again = False
        self.incident: Incident | None = None
        self.exit_code, self.message = 0, ""
        self._trials = Trials()
        self._leases = Leases(settings.lease_s)
        self._unfenced: set[str] = set()  # broken: nodes that have not said so yet
        self._uncommitted: set[str] = set()  # seated: nodes whose ranks have not all committed in this round
        self._unfinished: set[str] = set()
        self._unheard: set[str] = set()  # ending
        self._stalled: dict[int, tuple[Finding, Chair]] = {}
        self._stalled_at = 0.0
        self._fruitless = self._failures = 0
        self._began: float | None = None  # of the stage
        self._enough: float | None = None  # gathering: since when there are `nodes_min`
        self._patience: float | None = None  # broken: until when a chair without room may wait; None = none does
        self._status_at = 0.0
        self._dirty = True
        self._out: list[CoordinatorAction] = []

    # ------------------------------------------------------------------ the contract

    def step(self, event: CoordinatorEvent, now: float) -> list[CoordinatorAction]:
        """See core/machine.py."""
        if self._began is None:
            self._began = now
        match event:
            case Report():
                self._on_report(event, now)
            case NodeLost():
                self._leases.shorten(event.node, now + self.settings.link_grace_s)
            case NodeUp():
                node = self.nodes.get(event.node)
                if node is not None and node.alive:
                    self._leases.touch(event.node, now)
                    node.sent = float("-inf")
                    self._answer(node, now)
            case Stop():
                self._end("failed", 1, f"stopped by signal {event.signal}", now)
            case Tick():
                pass
            case _:
                assert_never(event)
        for name in self._leases.expired(now):
            self._lose(name, f"node {name} is silent", now)
        self._advance(now)
        if self._dirty or now >= self._status_at:
            self._dirty, self._status_at = False, now + STATUS_S
            self._out.append(StatusDue())
        out, self._out = self._out, []
        return out

    def deadline(self) -> float | None:
        """See core/machine.py."""
        times = [self._leases.earliest(), self._status_at, self._stage_deadline()]
        return min(t for t in times if t is not None)

    def status(self) -> lines.Status:
        """What status.json says."""
        ranks, standbys = [], []
        chairs = {(n.name, c.rank): c for n in self.nodes.values() for c in n.report.chairs}
        for rank, place in sorted(self.seating.places.items()):
            chair = chairs.get((place.node, rank))
            step = chair.record.step if chair and chair.record else NONE
            ranks.append(lines.RankStatus(rank, place.node, place.local_rank, chair.pid if chair else 0, step))
        for node in self._alive():
            standbys += [lines.StandbyStatus(node.name, s.pid, s.shadow, s.state == "parked") for s in node.report.standbys]
        return lines.Status(
            run_id=self.settings.run,
            state=self.state,
            round=self.round,
            world_size=len(ranks),
            ranks=tuple(ranks),
            standbys=tuple(standbys),
        )

    # ------------------------------------------------------------------ a report

    def _on_report(self, report: Report, now: float) -> None:
        node, old = self._admit(report, now)
        if node is None:
            return
        self.managed = self.managed or report.managed
        self._announce_workers(node)
        if self.stage in ("ending", "over"):
            if node.assignment and report.assigned >= node.assignment.seq:
                self._unheard.discard(node.name)
        else:
            if report.leaving:
                self._end("failed", 1, f"node {node.name} was told to stop", now)
            self._take_chairs(node)
            news = [f for f in report.findings if f.seq > (node.assignment.seen if node.assignment else 0)]
            verdicts = [(f, self._judge(f, node, now)) for f in news]
            refused = report.refused != old.refused if old else bool(report.refused)
            asks = refused and self._take_refused(node, now)
            if self.stage == "seated" and (report.fenced >= self.round or asks):
                self._break(now)
            if self.incident is not None:
                for finding, verdict in verdicts:
                    self.incident.take(finding, verdict, node.name)
            self._take_checkpoints(node, old, now)
            if self.stage == "broken" and report.fenced >= self.fence:
                self._unfenced.discard(node.name)
        self._answer(node, now)

    def _admit(self, report: Report, now: float) -> tuple[Node | None, Report | None]:
        """The node, and its report before this one. None: the report is old, or of another run."""
        node = self.nodes.get(report.node)
        if report.run != self.settings.run:
            return None, None
        if node is None:
            node = self.nodes[report.node] = Node(report.node, len(self.nodes), report)
            self._leases.touch(report.node, now)
            self._patience = None  # a new node may have the room that a chair waits for
            return node, None
        if (report.boot, report.seq) <= (node.report.boot, node.report.seq):
            return None, None
        if report.boot > node.report.boot:
            self._lose(node.name, f"the agent of {node.name} was started again", now)
            node.known = node.ready = frozenset()
            node.assignment = msgspec.structs.replace(node.assignment, seen=0) if node.assignment else None
        if not node.alive:
            node.alive, self._patience = True, None
            if self.stage == "broken" and node.name in self.ranks:
                self._unfenced.add(node.name)
        old, node.report = node.report, report
        self._leases.touch(report.node, now)
        return node, old

    def _announce_workers(self, node: Node) -> None:
        report = node.report
        chairs = {c.worker: ("rank", c.pid, c.rank) for c in report.chairs if c.pid}
        standbys = {s.worker: ("standby", s.pid, s.shadow) for s in report.standbys if s.pid}
        present = {**standbys, **chairs}
        ready = frozenset(s.worker for s in report.standbys if s.state == "parked")
        if present.keys() == node.known and ready == node.ready:
            return
        for worker in sorted(present.keys() - node.known):
            role, pid, rank = present[worker]
            self._tell(lines.WorkerStarted(worker=worker, role=role, pid=pid, rank=rank, node=node.name))
        for worker in sorted(ready - node.ready):
            _, pid, rank = present[worker]
            self._tell(lines.StandbyReady(worker=worker, pid=pid, shadow=rank, node=node.name))
        node.known, node.ready = frozenset(present), ready

    def _take_chairs(self, node: Node) -> None:
        """What this node's chairs mean for the round."""
        report = node.report
        if self.stage not in ("seated", "broken") or report.round != self.round or node.name not in self.ranks:
            return
        chairs = [c for c in report.chairs if c.rank in self.seating.places]
        self.activated.update(c.rank for c in chairs if c.state == "active" or (c.state == "finished" and c.record and c.record.phase != "setup"))
        if self.stage != "seated" or len(chairs) < len(self.ranks[node.name]):
            return
        if all(c.state == "finished" for c in chairs):
            self._unfinished.discard(node.name)
        if node.name in self._uncommitted and all(self._arrived(c) for c in chairs):
            self._uncommitted.discard(node.name)

    def _arrived(self, chair: Chair) -> bool:
        """Whether the fault is over for this rank."""
        if chair.state == "finished":
            return True
        if not self.managed:
            return chair.state == "starting" and chair.pid > 0
        record = chair.record
        return record is not None and record.round == self.round and (record.committed_s > 0 or record.phase == "done")

    def _judge(self, finding: Finding, node: Node, now: float) -> Verdict:
        self._tell(
            lines.FindingLine(
                kind=finding.kind,
                node=node.name,
                rank=finding.rank,
                worker=finding.worker,
                pid=finding.pid,
                step=finding.step,
                round=finding.round,
                exit_code=finding.exit_code,
                text=finding.text,
            )
        )
        verdict = judge(finding, self._trials) if self.managed else self._judge_unmanaged(finding)
        self._tell_verdict(finding, verdict, node.name)
        if verdict.verdict == "replace" and finding.worker:
            self.condemned.add(finding.worker)
        elif verdict.verdict == "halt":
            self._end("failed", 1, f"rank {finding.rank} on {node.name}: {verdict.why}\n{finding.text}".rstrip(), now)
        if finding.kind == "unrecorded":
            self.again = True
        elif finding.kind == "stopped":
            self.evidence = self.round
        elif finding.kind == "stalled" and self.stage == "seated":
            chair = next((c for c in node.report.chairs if c.rank == finding.rank), None)
            if chair is not None and finding.rank in self.ranks.get(node.name, ()) and chair.worker == finding.worker:
                self._stalled_at = now if not self._stalled else self._stalled_at
                self._stalled[finding.rank] = (finding, chair)
        return verdict

    def _judge_unmanaged(self, finding: Finding) -> Verdict:
        """A group that does not use this library: as torchrun, but a signal is not the user's failure."""
        if finding.kind not in ("exit", "exception"):
            known = TABLE.get(finding.kind)
            return known if known and known.verdict in ("halt", "restart") else Verdict(verdict="watch", why="the group does not use this library")
        if finding.exit_code is not None and finding.exit_code < 0:
            return Verdict(verdict="restart", why="killed by a signal: the group starts again")
        if finding.round == self.round and self.stage == "seated":
            self._failures += 1
        if self._failures > self.settings.max_restarts:
            return Verdict(verdict="halt", why=f"exit code {finding.exit_code}, --max-restarts {self.settings.max_restarts}")
        return Verdict(verdict="restart", why=f"user failure {self._failures} of --max-restarts {self.settings.max_restarts}")

    def _take_refused(self, node: Node, now: float) -> bool:
        """Poison what was refused; True if the round in force was built upon it."""
        fresh = {(r.tier, r.step, r.rank): r for r in node.report.refused if (r.tier, r.step, r.rank) not in self.poison}
        self.poison.update(fresh)
        plan = self.seating.plan
        for (tier, step, rank), refused in sorted(fresh.items()):
            text = f"{tier} copy of step {step} of rank {rank}: {refused.reason}"
            self._tell(lines.FindingLine(kind="refused", node=node.name, rank=rank, step=step, round=self.round, text=text))
            self._tell_verdict(Finding(seq=0, kind="refused", rank=rank), TABLE["refused"], node.name)
        return any(step == plan.step for _, step, _ in fresh)

    def _take_checkpoints(self, node: Node, old: Report | None, now: float) -> None:
        report, points = node.report, self.checkpoints
        if node.name == self.settings.leader:
            points.committed.update(report.available or ())
            if report.committed != NONE and report.committed not in points.committed:
                points.committed.add(report.committed)
                points.pending = {s: p for s, p in points.pending.items() if s > report.committed}
                self._tell(lines.CheckpointCommitted(step=report.committed))
        if old is not None and report.persisted == old.persisted:
            return
        newest = max(points.committed, default=NONE)
        for item in report.persisted:
            if item.step > newest or item.step not in points.committed:
                points.pending.setdefault(item.step, {})[item.rank] = item
        complete = [s for s, p in points.pending.items() if len(p) == len(self.seating.places)]
        if complete and max(complete) != points.commit:
            points.commit = max(complete)
            points.manifest = tuple(p for _, p in sorted(points.pending[points.commit].items()))
            if leader := self.nodes.get(self.settings.leader):
                self._send(leader, now)

    # ------------------------------------------------------------------ stages

    def _advance(self, now: float) -> None:
        """Whatever is due."""
        assert self._began is not None
        if self.stage == "gathering":
            self._gather(now)
        if self.stage == "seated":
            if self._stalled:
                self._find_culprit(now)
            if not self._unfinished:
                self._end("finished", 0, "", now)
            elif not self._uncommitted and (self.state == "forming" or self.incident):
                self._settle(now)
        if self.stage == "broken":
            if self._patience is not None and now >= self._patience:
                self._end("failed", 1, f"no node has room for ranks {_listed(self.seating.homeless)}: start another node, or raise --standbys", now)
            elif self._patience is None and now >= self._decide_at():
                self._decide(now)
        if self.stage == "ending" and (not self._unheard or now >= self._began + self.settings.farewell_s):
            self.stage = "over"
            self._out.append(Finish(exit_code=self.exit_code, message=self.message))

    def _stage_deadline(self) -> float | None:
        began = self._began or 0.0
        if self.stage == "gathering":
            if self._enough is not None and len(self._alive()) < self.settings.nodes_max:
                return self._enough + self.settings.last_call_s
            return began + self.settings.join_timeout_s
        if self.stage == "broken":
            at = self._patience if self._patience is not None else self._decide_at()
            return None if at == float("inf") else at
        if self.stage == "ending":
            return began + self.settings.farewell_s
        return self._stalled_at + self.settings.culprit_s if self._stalled else None

    def _gather(self, now: float) -> None:
        alive, s = self._alive(), self.settings
        began = self._began or 0.0
        self._enough = None if len(alive) < s.nodes_min else self._enough if self._enough is not None else now
        leader = self.nodes.get(s.leader)
        ready = leader is not None and leader.alive and leader.report.store and leader.report.available is not None
        late = self._enough is not None and (len(alive) >= s.nodes_max or now >= self._enough + s.last_call_s)
        if ready and late:
            rooms = [Room(node=n.name, slots=n.report.slots, node_rank=n.report.node_rank, joined=n.joined) for n in alive]
            rooms = in_order(sorted(rooms, key=lambda r: (r.node != s.leader, r.joined))[: s.nodes_max])
            self.checkpoints.committed.update(leader.report.available or () if leader else ())
            self.seating = Seating(places=seat_all(rooms))
            self._tell(lines.RunStarted(run_id=s.run, world_size=len(self.seating.places), nodes=tuple(r.node for r in rooms)))
            self.stage = "broken"
            self._began = now - s.settle_s
            self._decide(now)
        elif now >= began + s.join_timeout_s:
            lacks = "the leader's store or its list of checkpoints is missing" if len(alive) >= s.nodes_min else f"{len(alive)} of {s.nodes_min} nodes came"
            self._end("failed", 1, f"the run did not start within {s.join_timeout_s:.0f} s: {lacks}", now)

    def _break(self, now: float) -> None:
        """The round in force is broken."""
        self.fence, self.stage, self._began, self.state = self.round, "broken", now, "forming"
        self.incident = self.incident or Incident(self.round, now, known=self.managed)
        self._unfenced = {n.name for n in self._alive() if n.name in self.ranks and n.report.fenced < self.fence}
        self._stalled.clear()
        self._send_all(now)

    def _decide_at(self) -> float:
        """When the next round can be seated; inf = not before a report says that its node has fenced."""
        if self._unfenced:
            return float("inf")
        began, s = self._began or 0.0, self.settings
        quiet = min(QUIET_MAX_S, QUIET_STEP_S * (self._fruitless - QUIET_FROM + 1)) if self._fruitless >= QUIET_FROM else 0.0
        vague = self.incident is not None and self.incident.verdict == "watch" and self.incident.cause == "suspect" and not self._anybody_gone()
        return began + max(quiet, s.suspect_s if vague else s.settle_s)

    def _anybody_gone(self) -> bool:
        return any(c.state == "dead" or c.worker in self.condemned for n in self._alive() for c in n.report.chairs)

    def _decide(self, now: float) -> None:
        if self._fruitless >= self.settings.fruitless_max:
            cause = f"{self.incident.cause} of rank {self.incident.rank}" if self.incident else "no cause known"
            self._end("failed", 1, f"{self._fruitless} rounds in a row ended without a committed step; the last incident: {cause}", now)
            return
        alive = self._alive()
        seating = seat(
            Hall(
                places=self.seating.places,
                reports={n.name: n.report for n in alive},
                joined={n.name: n.joined for n in alive},
                condemned=self.condemned,
                activated=self.activated,
                managed=self.managed,
                again=self.again,
                committed=self.checkpoints.committed,
                poison=self.poison,
            )
        )
        if seating.error:
            self._end("failed", 1, seating.error, now)
            return
        if seating.homeless:
            self._patience = now + self.settings.join_timeout_s
            self.seating = msgspec.structs.replace(self.seating, homeless=seating.homeless)
            text = f"no node has room for ranks {_listed(seating.homeless)}"
            self._tell(lines.FindingLine(kind="no_room", node="", rank=seating.homeless[0], round=self.round, text=text))
            return
        self._seat(seating, now)

    def _seat(self, seating: Seating, now: float) -> None:
        """The round is decided: send it out."""
        first = self.round == 0
        self.round, self.seating, self.stage, self._began = self.fence + 1, seating, "seated", now
        if seating.again and not first:
            self.restart += 1
        if seating.again:
            self.activated.clear()
        self.again = False
        self._fruitless += 1
        self.ranks = {}
        for rank, place in sorted(seating.places.items()):
            self.ranks.setdefault(place.node, []).append(rank)
        addresses = {n.name: f"{n.report.host}:{n.report.data_port}" for n in self._alive()}
        self._order = {node: i for i, node in enumerate(self.ranks)}
        self._peers = {node: addresses[peer] for node, peer in ring(list(self.ranks)).items()}
        self._uncommitted, self._unfinished = set(self.ranks), set(self.ranks)
        if self.incident:
            self.incident.decide(seating.plan, seating.lost, now)
        reason = "start" if first else f"{self.incident.cause} of rank {self.incident.rank}" if self.incident else "again"
        self._tell(
            lines.RoundStarted(
                round=self.round,
                reason=reason,
                step=seating.plan.step,
                tier=seating.plan.tier,
                receivers=len(seating.plan.receivers),
                emptied=seating.emptied[:LISTED],
                why=seating.why,
            )
        )
        self._send_all(now)

    def _settle(self, now: float) -> None:
        """Every rank has committed: the incident is over."""
        self.state, self._dirty = "running", True
        if self.managed:
            self._fruitless = 0
        if self.incident is not None:
            self._tell(self.incident.close((n.report for n in self._alive()), self.round, now))
            self.incident = None

    def _find_culprit(self, now: float) -> None:
        current = {c.rank: c for n in self._alive() for c in n.report.chairs if n.name in self.ranks}
        self._stalled = {r: (f, c) for r, (f, c) in self._stalled.items() if r in current and not _moved(c, current[r])}
        if not self._stalled:
            return
        found = hang.blame(current.values(), frozenset(self._stalled))
        for rank in found.ranks:
            finding = self._stalled[rank][0]
            self.condemned.add(finding.worker)
        due = now >= self._stalled_at + self.settings.culprit_s
        if found.wait or not (found.ranks or due):
            self._stalled_at = now if found.wait and due else self._stalled_at
            return
        blamed = {r: self._stalled[r][0] for r in found.ranks} or {NONE: Finding(seq=0, kind="suspect", text=found.why)}
        verdict = Verdict(verdict="replace" if found.ranks else "watch", why=found.why)
        self.evidence = self.round
        self._break(now)
        assert self.incident is not None
        for rank, finding in blamed.items():
            node = self.seating.places[rank].node if rank != NONE else ""
            self._tell_verdict(finding, verdict, node)
            self.incident.take(finding, verdict, node)

    def _lose(self, name: str, text: str, now: float) -> None:
        node = self.nodes[name]
        if not node.alive:
            return
        node.alive, node.stale = False, True
        self._leases.drop(name)
        self._unfenced.discard(name)
        self._unheard.discard(name)
        if self.stage not in ("seated", "broken") or name not in self.ranks:
            return
        finding = Finding(seq=0, kind="node_lost", rank=self.ranks[name][0], text=text, round=self.round, age_s=self.settings.link_grace_s)
        verdict = TABLE["node_lost"]
        self._tell(lines.FindingLine(kind="node_lost", node=name, rank=finding.rank, round=self.round, text=text))
        self._tell_verdict(finding, verdict, name)
        if self.stage == "seated":
            self._break(now)
        if self.incident:
            self.incident.take(finding, verdict, name)

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
        self._dirty = True

    def _tell_verdict(self, finding: Finding, verdict: Verdict, node: str) -> None:
        self._tell(lines.VerdictLine(verdict=verdict.verdict, kind=finding.kind, node=node, rank=finding.rank, worker=finding.worker, why=verdict.why))

    def _send_all(self, now: float) -> None:
        for node in self._alive():
            self._send(node, now)

    def _send(self, node: Node, now: float) -> None:
        """Everything this node should be; a new sheet only if something on it changed."""
        old, node.stale = node.assignment, False
        new = self._compose(node, old.seq if old else 0, max((f.seq for f in node.report.findings), default=old.seen if old else 0))
        if new != old:
            node.assignment, node.sent = msgspec.structs.replace(new, seq=new.seq + 1), now
            self._out.append(Assign(node=node.name, assignment=node.assignment))

    def _answer(self, node: Node, now: float) -> None:
        """After a report: what it made new, or what the node has not heard, or a sign of life."""
        sheet = node.assignment
        if sheet is None or node.stale or any(f.seq > sheet.seen for f in node.report.findings):
            self._send(node, now)
        elif now - node.sent >= (RESEND_S if node.report.assigned < sheet.seq else HEARTBEAT_S):
            node.sent = now
            self._out.append(Assign(node=node.name, assignment=sheet))

    def _compose(self, node: Node, seq: int, seen: int) -> Assignment:
        seating = self.seating
        ranks = self.ranks.get(node.name, ())
        leader = self.nodes.get(self.settings.leader)
        peer = self._peers.get(node.name)
        again = frozenset(seating.emptied) if seating.again else frozenset()
        leads = node is leader
        return Assignment(
            run=self.settings.run,
            node=node.name,
            seq=seq,
            state=self.state,
            fence=self.fence,
            round=self.round,
            world_size=len(seating.places),
            node_rank=self._order.get(node.name, NONE),
            nodes=len(self.ranks),
            seats=tuple(Seat(rank=r, local_rank=seating.places[r].local_rank, fresh=r in again) for r in ranks),
            plan=seating.plan,
            store=leader.report.store if leader else "",
            put_down=seating.put_down.get(node.name, ()),
            incident=self.incident.number if self.incident else 0,
            peers=(peer,) if peer else (),
            fetch=seating.fetch.get(node.name, ()),
            commit=self.checkpoints.commit if leads else NONE,
            manifest=self.checkpoints.manifest if leads else (),
            seen=seen,
            exit_code=self.exit_code,
            message=self.message,
            restart=self.restart,
            evidence=self.evidence,
        )


def _moved(before: Chair, after: Chair) -> bool:
    """Whether this worker has made progress since, or is another one."""
    a, b = before.record, after.record
    return a is None or b is None or before.worker != after.worker or (a.step, a.phase, a.entered, a.completed) != (b.step, b.phase, b.entered, b.completed)


def _listed(ranks: tuple[int, ...]) -> str:
    return ", ".join(str(r) for r in ranks[:8]) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
