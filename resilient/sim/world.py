"""World: a fleet on a virtual clock, with the real machines inside and everything else made up.

Think of a model railway: the signal boxes (agents, coordinator) are the real ones; rails, trains and weather are toys, and an hour takes
a second. One seed decides every delay, loss and fault, so a strange evening can be played again.

Contract: `World(spec, seed)` builds; `run(until)` plays; `check` collects broken invariants as exceptions that name the seed. Nothing
here reads a clock. Messages between agent and coordinator take 0.2 to 2 ms, may overtake each other, are lost with `loss`, and not
delivered over a cut link. Frames between a worker and its agent come in order.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from resilient.core.agent import Agent
from resilient.core.coordinator import Coordinator
from resilient.core.machine import (
    Admitted,
    AgentAction,
    AgentEvent,
    AgentSettings,
    Allocate,
    Allocated,
    Announce,
    Assign,
    Assigned,
    CoordinatorEvent,
    CoordinatorSettings,
    Exited,
    Fence,
    Finish,
    Finished,
    Forget,
    Fork,
    Forked,
    Keep,
    Kill,
    LinkUp,
    Look,
    Looked,
    NodeLost,
    NodeUp,
    Probed,
    Said,
    Seals,
    SendReport,
    StartStore,
    StoreDown,
    StoreUp,
    Tell,
    Tick,
    VaultDo,
    Vaulted,
    ZygoteDown,
    ZygoteUp,
)
from resilient.core.messages import NONE, Assignment, Fetch, Finding, Holding, Persisted, Recorded, Refused, Report, Segments, WorkerUp
from resilient.core.rules import Rules
from resilient.sim.invariants import Invariants
from resilient.sim.script import Script, Segment
from resilient.sim.trace import Trace


@dataclass(frozen=True, slots=True)
class Spec:
    """The world to build. Times in seconds."""

    nodes: int = 1
    slots: int = 2
    standbys: int = 1
    spare_nodes: int = 0
    copies: int = 1
    rack_size: int = 0  # nodes that are one failure domain, 0 = none is named
    steps: int = 50
    managed: bool = True  # the script uses this library
    replicated: bool = True
    snapshots: bool = False
    persist_every: int = 0
    auto: bool = False  # --checkpoint-every auto
    grace_s: float = 0.0
    persist_s: float = 0.05
    stored: tuple[int, ...] = ()  # committed checkpoints of an earlier run
    step_s: float = 0.1
    commit_s: float = 0.004
    boot_s: float = 0.05
    setup_s: float = 0.1
    restore_s: float = 0.005
    loss: float = 0.0
    gated: bool = False  # nodes wait for their pre-flight checks
    rules: Rules = field(default_factory=Rules)


class Host:
    """One node: an agent and what is around it."""

    def __init__(self, world: World, name: str, boot: int) -> None:
        """The agent starts."""
        spec = world.spec
        self.world, self.name, self.dead, self.cut = world, name, False, False
        self.boot, self.leads = boot, name == "n0"
        self.agent = Agent(
            AgentSettings(
                run="run",
                node=name,
                boot=boot,
                slots=spec.slots,
                standbys=spec.standbys,
                host=name,
                data_port=1,
                failure_domain=f"rack {int(name[1:]) // spec.rack_size}" if spec.rack_size else "",
                hosts_store=self.leads,
                managed=spec.managed,
                grace_s=spec.grace_s,
                gated=spec.gated,
            )
        )
        self.scripts: dict[str, Script] = {}
        self.segments: dict[int, Segment] = {}
        self.held: dict[int, Segment] = {}  # copies of ranks that sit elsewhere
        self.minutes: dict[int, dict[int, Recorded]] = {}  # of ranks here and elsewhere
        self.vault = Vaulted(available=tuple(world.stored) if self.leads else ())
        self.orders = VaultDo()
        self.finished: Finished | None = None
        self._timer = 0
        self.step(Tick())
        self.step(self.vault)
        world.after(0.01, lambda: self.step(ZygoteUp()))
        world.after(0.0, self._look)

    def step(self, event: AgentEvent) -> None:
        """Give the agent an event and do what it says."""
        if self.dead or self.finished:
            return
        queue = [event]
        while queue:
            for action in self.agent.step(queue.pop(0), self.world.now):
                queue += self._perform(action)
        self.world.invariants.agent(self)
        self._timer += 1
        number, at = self._timer, self.agent.deadline()
        if at is not None:
            self.world.at(max(at, self.world.now), lambda: self.step(Tick()) if number == self._timer else None)

    def _perform(self, action: AgentAction) -> list[AgentEvent]:
        world = self.world
        match action:
            case Fork():
                pid = world.pid()
                self.scripts[action.worker] = script = Script(self, action.worker, action.role, action.rank, pid, action.restart)
                return [Forked(worker=script.name, pid=pid)]
            case Kill():
                if (killed := self.scripts.get(action.worker)) is not None:
                    killed.exit(-action.signal)
            case Forget():
                self.scripts.pop(action.worker, None)
            case Fence():
                for script in self.scripts.values():
                    script.fence = max(script.fence, action.round)
                return [self.vault, self._looked(action.round)]
            case Tell():
                if (listener := self.scripts.get(action.worker)) is not None:
                    world.after(0.0002, partial(listener.hear, action.message))
            case SendReport():
                world.report(self, action.report)
            case StartStore():
                world.after(0.05, world.start_store)
            case Allocate():
                self.segments.setdefault(action.layout.rank, Segment())
                segments = Segments(rank=action.layout.rank, own="/own", own_bytes=1, slots=(), snapshot_bytes=0)
                return [Allocated(worker=action.worker, segments=segments)]
            case Keep():
                self._keep(action.recorded)
            case VaultDo():
                self._obey(action)
            case Finished():
                self.finished = action
                for script in self.scripts.values():
                    script.exit(-9)
            case _:
                pass
        return []

    def _look(self) -> None:
        if not self.dead and not self.finished:
            self.step(self._looked(0))
            self.world.after(self.agent.look_every_s(), self._look)

    def _looked(self, fence: int) -> Looked:
        looks = {
            n: Look(record=s.record(), parked=s.parked, os_state=s.os_state, cpu_s=s.cpu_s(), pace=s.pace())
            for n, s in self.scripts.items()
        }
        seals = {
            r: Seals(
                own="/own", own_bytes=1, own_steps=tuple(s.own), gate_step=s.gate, snapshots={n: f"/snapshot.{n}" for n in s.snapshots}
            )
            for r, s in self.segments.items()
        }
        return Looked(workers=looks, seals=seals, fence=fence)

    # ------------------------------------------------------------------ workers

    def said(self, script: Script, message: WorkerUp) -> None:
        """A frame from a worker."""
        self.world.after(0.0002, lambda: self.step(Said(worker=script.name, message=message)))

    def exited(self, script: Script, code: int, text: str) -> None:
        """A pidfd woke us."""
        self.step(self._looked(0))
        self.step(Exited(worker=script.name, exit_code=code, text=text))

    def segment(self, rank: int) -> Segment:
        """Its chair's copies."""
        return self.segments.setdefault(rank, Segment())

    def kill(self) -> None:
        """Every process of this node, the agent included."""
        self.dead = True
        for script in self.scripts.values():
            script.exit(-9)
        self.world.after(0.001, lambda: self.world.decide(NodeLost(node=self.name)))

    # ------------------------------------------------------------------ the vault

    def _keep(self, item: Recorded) -> None:
        kept = self.minutes.setdefault(item.rank, {})
        if any(old.restart < item.restart for old in kept.values()):
            kept.clear()
        if all(old.restart == item.restart for old in kept.values()):
            kept[item.index] = item

    def know(self, **changes: object) -> None:
        """The vault knows something new."""
        fields = {f: getattr(self.vault, f) for f in self.vault.__struct_fields__}
        self.vault = Vaulted(**{**fields, **changes})
        self.step(self.vault)

    def sealed(self, rank: int) -> None:
        """A worker sealed something: copy it to the peer, and on every n-th step to the persistent tier."""
        copy, world = self.segments[rank], self.world
        snapshot = Segment(list(copy.own), copy.gate, list(copy.snapshots))
        for peer in self.orders.peers:
            if (host := world.hosts.get(peer.split(":")[0])) is not None:
                world.after(0.003, partial(host.hold, rank, snapshot, self.minutes.get(rank, {})))
        step, every = max(copy.snapshots, default=NONE), world.spec.persist_every
        if step > 0 and ((every and step % every == 0) or step == copy.marked):
            self._persist(rank, step)

    def _persist(self, rank: int, step: int) -> None:
        if not any(p.rank == rank and p.step == step for p in self.vault.persisted):
            item = Persisted(rank=rank, step=step, num_bytes=1, digest="0")
            self.world.after(self.world.spec.persist_s, lambda: self.know(persisted=tuple([*self.vault.persisted, item][-64:])))

    def hold(self, rank: int, copy: Segment, minutes: dict[int, Recorded]) -> None:
        """A copy from a peer arrived."""
        if self.dead:
            return
        self.held[rank] = copy
        for item in minutes.values():
            self._keep(item)
        holdings = tuple(
            Holding(rank=r, own_step=max(s.own, default=NONE), own_steps=tuple(s.own), gate_step=s.gate, snapshots=tuple(s.snapshots))
            for r, s in sorted(self.held.items())
        )
        self.know(holdings=holdings)

    def _obey(self, orders: VaultDo) -> None:
        before, self.orders = self.orders, orders
        for rank in set(self.segments) - set(orders.ranks):  # whoever moved away: its new node fetches this from here
            self.hold(rank, self.segments.pop(rank), self.minutes.get(rank, {}))
        for fetch in orders.fetch:
            if fetch not in before.fetch:
                self.world.after(0.02, partial(self._fetch, fetch))
        for rank in orders.ranks if orders.rescue not in (NONE, before.rescue) else ():
            self.world.check(orders.rescue in self.segment(rank).snapshots, f"rank {rank} has no step {orders.rescue} to be rescued")
            self._persist(rank, orders.rescue)
        if orders.commit not in (NONE, before.commit):
            self.world.after(0.02, partial(self._commit, orders.commit))

    def _commit(self, step: int) -> None:
        self.world.stored.add(step)
        self.know(committed=step)

    def _fetch(self, fetch: Fetch) -> None:
        if self.dead or fetch not in self.orders.fetch:
            return
        here, error = self.segment(fetch.rank), ""
        if fetch.tier == "persistent":
            if fetch.step in self.world.stored - self.world.damaged:
                here.seal_snapshot(fetch.step)
                here.seal_own(fetch.step)
            else:
                error = "checksum"
        else:
            source = self.world.hosts[fetch.source.split(":")[0]]
            held = None if source.dead else source.held.get(fetch.rank) or source.segments.get(fetch.rank)
            if held is None:
                error = "no such copy"
            else:
                here.own, here.gate, here.snapshots = list(held.own), held.gate, list(held.snapshots)
                for item in list(source.minutes.get(fetch.rank, {}).values()):
                    self.step(Said(worker="", message=item))
        if error:
            refused = Refused(tier=fetch.tier, step=fetch.step, rank=fetch.rank, reason=error)
            self.know(refused=(*self.vault.refused, refused))
        else:
            self.step(self._looked(0))
            self.know(fetched=(*self.vault.fetched, fetch))


class World:
    """See the head of this file."""

    def __init__(self, spec: Spec, seed: int = 0) -> None:
        """All nodes start at once."""
        self.spec, self.seed, self.random = spec, seed, random.Random(seed)  # noqa: S311  a seed decides all, nothing is secret
        self.now = 1000.0
        self._queue: list[tuple[float, int, Callable[[], object]]] = []
        self._count = self._pids = self._stores = 0
        self.store = ""
        self.loss = spec.loss
        self.stored, self.damaged = set(spec.stored), set[int]()
        self.ranks = range(spec.nodes * spec.slots)
        self.wishes = set[tuple[int, int]]()  # votes in which somebody asked for a checkpoint
        self._settled: dict[int, int] = {}  # round -> collectives of the set-up that somebody knows to be behind all
        self.invariants = Invariants(self)
        self.trace = Trace()
        self._meetings: dict[tuple[int, str], dict[Script, Callable[[float], None]]] = {}
        self.finish: Finish | None = None
        settings = CoordinatorSettings(
            run="run",
            leader="n0",
            nodes_min=spec.nodes,
            nodes_max=spec.nodes,
            checkpoints=spec.auto or spec.persist_every > 0 or spec.grace_s > 0,
            checkpoint_every=spec.persist_every,
            checkpoint_auto=spec.auto,
            grace_s=spec.grace_s,
            copies=spec.copies,
            rules=spec.rules,
            alone_s=30.0,  # of a simulated minute or two, not the ten of a run
        )
        self.coordinator = Coordinator(settings)
        self._timer = 0
        self.hosts: dict[str, Host] = {}
        for i in range(spec.nodes + spec.spare_nodes):
            self.start_node(f"n{i}")

    # ------------------------------------------------------------------ time

    def at(self, when: float, act: Callable[[], object]) -> None:
        """Do it then."""
        self._count += 1
        heapq.heappush(self._queue, (when, self._count, act))

    def after(self, seconds: float, act: Callable[[], object]) -> None:
        """Do it in so many seconds."""
        self.at(self.now + seconds, act)

    def run(self, seconds: float, until: Callable[[], bool] = lambda: False) -> bool:
        """Play; stops early, and returns True, when `until` holds."""
        end = self.now + seconds
        while self._queue and self._queue[0][0] <= end:
            self.now, _, act = heapq.heappop(self._queue)
            act()
            if until():
                return True
        self.now = end
        return until()

    def over(self) -> bool:
        """Coordinator and agents are done."""
        return self.finish is not None and all(h.dead or h.finished for h in self.hosts.values())

    # ------------------------------------------------------------------ the coordinator and its links

    def decide(self, event: CoordinatorEvent) -> None:
        """Give the coordinator an event and do what it says."""
        if self.finish is not None:
            return
        for action in self.coordinator.step(event, self.now):
            match action:
                case Assign():
                    self._assign(action.node, action.assignment)
                case Announce():
                    self.trace.line(self.now, action.line)
                    self.invariants.line(action.line)
                case Finish():
                    self.finish = action
        self.invariants.coordinator(self.coordinator)
        self._timer += 1
        number, at = self._timer, self.coordinator.deadline()
        if at is not None:
            self.at(max(at, self.now), lambda: self.decide(Tick()) if number == self._timer else None)

    def _delay(self) -> float:
        return self.random.uniform(0.0002, 0.002)

    def report(self, host: Host, report: Report) -> None:
        """On its way up."""
        if not host.cut and self.random.random() >= self.loss:
            self.after(self._delay(), lambda: None if host.cut else self.decide(report))

    def _assign(self, node: str, assignment: Assignment) -> None:
        host = self.hosts[node]
        if not host.cut and self.random.random() >= self.loss:
            self.after(self._delay(), lambda: None if host.cut else host.step(Assigned(assignment=assignment)))

    def cut(self, node: str, seconds: float, *, reset: bool) -> None:
        """The control link of a node is cut for a while; with `reset` both sides notice at once."""
        host = self.hosts[node]
        host.cut = True
        if reset:
            self.after(0.001, lambda: self.decide(NodeLost(node=node)))

        def back() -> None:
            host.cut = False
            self.decide(NodeUp(node=node))
            host.step(LinkUp())

        self.after(seconds, back)

    # ------------------------------------------------------------------ nodes, stores, collectives

    def start_node(self, name: str) -> None:
        """The first start of a node, or another one; not when there is nobody any more to talk to."""
        if self.finish is not None:
            return
        old = self.hosts.get(name)
        self.hosts[name] = Host(self, name, old.boot + 1 if old else 1)

    def start_store(self) -> None:
        """The store process listens."""
        self._stores += 1
        self.store = f"n0:{self._stores}"
        self.hosts["n0"].step(StoreUp(addr=self.store))

    def kill_store(self) -> None:
        """The store process dies."""
        if self.store:
            self.store = ""
            self.hosts["n0"].step(StoreDown(reason="killed"))

    def kill_zygote(self, name: str) -> None:
        """A zygote dies, and another one is there a little later."""
        self.hosts[name].step(ZygoteDown(reason="killed"))
        self.after(0.3, lambda: self.hosts[name].step(ZygoteUp()))

    def pid(self) -> int:
        """A new one."""
        self._pids += 1
        return self._pids

    def meet(self, key: tuple[int, str], script: Script, count: int, complete: Callable[[float], None]) -> None:
        """`script` enters a collective; it completes on everybody, at slightly different moments, when `count` are there."""
        meeting = self._meetings.setdefault(key, {})
        meeting[script] = complete
        if any(not s.alive for s in meeting):
            self.after(self._delay(), partial(script.broken, key[0]))
        if len(meeting) == count and all(s.alive for s in meeting):
            del self._meetings[key]
            for done in meeting.values():
                done(self.random.uniform(0.0001, 0.003))

    def tell_settled(self, place: int, count: int) -> None:
        """A script that joins a round says what it knows to be behind all."""
        self._settled[place] = max(self._settled.get(place, 0), count)

    def settled(self, place: int) -> int:
        """What anybody said; all have, when the groups are made."""
        return self._settled[place]

    def died(self, script: Script) -> None:
        """Neighbours in its round see a reset, sooner or later or (their own neighbour lives) not at all."""
        for (place, _), meeting in list(self._meetings.items()):
            if place == script.meeting_place:
                for other in list(meeting):
                    if other is not script and self.random.random() < 0.5:
                        self.after(self.random.uniform(0.0, 0.03), partial(other.broken, place))

    def committed(self, script: Script) -> None:
        """A rank completed a step."""
        self.invariants.committed(script)

    def see(self, node: str, **facts: Any) -> None:
        """A probe of this node sees something."""
        self.hosts[node].step(Probed(findings=(Finding(seq=0, **facts),)))

    def admit(self, node: str) -> None:
        """Its pre-flight checks have passed."""
        self.hosts[node].step(Admitted(passed=True))

    def check(self, holds: object, text: str) -> None:
        """Safety: raise if it does not hold."""
        assert holds, f"seed {self.seed}, t={self.now - 1000:.4f}: {text}\n{self.trace.tail()}"
