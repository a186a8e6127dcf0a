"""Main: the node agent at work. Makes the actions of core/agent.py real and tells it what happened.

Think of a stage manager: the machine says who goes on and who comes off; this file has the keys, the lights and the telephone.

Contract: one asyncio loop, no thread but the console's and those that allocate memory, no torch. Nothing in `_perform` waits: what takes
time becomes a task and comes back as an event. A worker's death is known by pidfd, at once; what its last words were is read
before its death is told. When `run` has returned, `close` leaves nothing of ours: no process, no file in shared memory, no socket.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from resilient.checkpoint import memory
from resilient.core import machine as m
from resilient.core.agent import Agent
from resilient.core.messages import NONE, Join, Msg, Sealed, Seated
from resilient.host.driver import Driver
from resilient.wire.page import UNCOPIED
from resilient_agents import kernel, orphans, stores
from resilient_agents.doors import Doors
from resilient_agents.evidence import Evidence, Flight
from resilient_agents.nursery import SpawnFailed, ZygoteLost
from resilient_agents.orders import Launch, Spawn, StoreOpen
from resilient_agents.probe import Watched
from resilient_agents.workers import Worker, environment

if TYPE_CHECKING:
    from collections.abc import Coroutine, Sequence

    from resilient.core.messages import Finding, Layout
    from resilient.host.journal import Journal
    from resilient_agents.logs import Archive, Console
    from resilient_agents.nursery import Nursery
    from resilient_agents.probing import Probing
    from resilient_agents.readmission import Readmission
    from resilient_agents.uplink import Uplink
    from resilient_agents.vault import Vault

SETTLE_S: Final = 600.0  # for what a rank that ended well has still to be written to the persistent tier
LAST_WORDS_S: Final = 0.1  # of a dead worker whose line a child of its own holds open
CLEANUP_S: Final = 5.0
UNKNOWN_S: Final = 0.2  # after a zygote's death: until all of its answers have been taken in
log = logging.getLogger("resilient.agent")


class Host:
    """One node's agent."""

    def __init__(
        self,
        *,
        launch: Launch,
        settings: m.AgentSettings,
        key: str,
        memory_dir: str,
        token: str,
        nursery: Nursery,
        probing: Probing,
        readmission: Readmission | None,
        vault: Vault,
        uplink: Uplink,
        journal: Journal,
        archive: Archive,
        console: Console,
        store_bind: str,
        checkpoint_every: int | str,
        snapshot_every: int | str,
        audit_every_s: float,
    ) -> None:
        """`key` names what we leave in `memory_dir`; `readmission`: None = nobody is examined; `store_bind`: "127.0.0.1", "" = all."""
        self._launch = launch
        self._settings = settings
        self._key = key
        self._memory_dir = memory_dir
        self._nursery = nursery
        self._probing = probing
        self._readmission = readmission
        self._vault = vault
        self._uplink = uplink
        self._journal = journal
        self._archive = archive
        self._console = console
        self._agent = Agent(settings)
        self._driver: Driver[m.AgentEvent, m.AgentAction] = Driver(self._agent, m.Tick(), self._perform)
        self._workers: dict[str, Worker] = {}
        self._early: dict[str, list[Msg]] = {}  # said before we had heard of the birth
        self._managed = settings.managed
        self._evidence = Evidence(journal.directory, Flight.of(os.environ))
        self._root_errors: dict[int, str] = {}  # attempt -> the first error file in it
        self._tasks: set[asyncio.Task[None]] = set()
        self._finished: m.Finished | None = None
        self._stopping = False
        self._wanted = NONE  # the step that the pages ask their workers to seal
        socket = memory.segment_path(memory_dir, key, "socket")
        self._doors = Doors(socket, token, self._knows, self._heard)
        self._env = {
            "TORCHELASTIC_RUN_ID": settings.run,
            "RESILIENT_RUN_ID": settings.run,
            "RESILIENT_RUN_DIR": str(journal.directory),
            "RESILIENT_SOCKET": socket,
            "RESILIENT_TOKEN": token,
            "RESILIENT_CHECKPOINT_EVERY": str(checkpoint_every),
            "RESILIENT_SNAPSHOT_EVERY": str(snapshot_every),
            "RESILIENT_AUDIT_EVERY_S": str(audit_every_s),
        }
        store_env = {**self._env, "RESILIENT_WORKER": stores.NAME, "RESILIENT_STORE_HOST": store_bind}
        self._stores = stores.Stores(nursery, self._doors, store_env, settings.host, self._store_up, self._store_down)

    # ------------------------------------------------------------------ life

    async def run(self) -> m.Finished:
        """Until the run is over for this node."""
        put = self._driver.put
        await self._doors.start()
        self._vault.watch(
            changed=self._vault_changed,
            note=lambda recorded: put(m.Said(worker="", message=recorded)),
            copied=self._copied,
            trouble=lambda finding: put(m.Probed(findings=(finding,))),
        )
        put(self._vault.known())
        self._uplink.start(
            on_up=lambda: put(m.LinkUp()),
            on_down=lambda reason: put(m.LinkDown(reason=reason)),
            on_assignment=lambda assignment: put(m.Assigned(assignment=assignment)),
            on_refused=self._give_up,
        )
        self._nursery.watch(
            on_up=lambda: put(m.ZygoteUp()),
            on_down=self._zygote_down,
            on_gone=self._give_up,
        )
        if self._readmission is not None:
            self._readmission.start(put)
        self._probing.start(self._seen)
        looking = asyncio.create_task(self._look_for_ever())
        driving = asyncio.create_task(self._driver.run())
        await asyncio.wait({looking, driving}, return_when=asyncio.FIRST_COMPLETED)
        if not driving.done():
            driving.cancel()
            await looking  # raises: only a fault of ours ends it
        looking.cancel()
        await driving
        assert self._finished is not None
        return self._finished

    def stop(self, number: int) -> None:
        """SIGTERM or SIGINT came: end in order."""
        self._stopping = True
        self._driver.put(m.Stop(signal=number))

    def warn(self, text: str) -> None:
        """Trouble may be coming."""
        self._driver.put(m.Warned(text=text))

    def abort(self, exit_code: int, message: str, *, over: bool = False) -> None:
        """End now: everything is killed in `close`. over: the run is; else what it holds in memory is left to a successor."""
        if self._finished is None:
            self._finished = m.Finished(exit_code=exit_code, message=message, over=over)
        self._driver.finish()

    def root_error(self) -> str:
        """The first error file of the last attempt, "" if there was none."""
        return self._root_errors[max(self._root_errors)] if self._root_errors else ""

    async def hang_up(self) -> None:
        """The coordinator need not wait for us."""
        await self._uplink.close()

    def _give_up(self, reason: str) -> None:
        self.abort(1, reason)

    async def close(self) -> None:
        """Leave nothing behind, whatever happened before."""
        for worker in self._workers.values():
            worker.signal(signal.SIGKILL)
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=CLEANUP_S)
        for worker in [w for w in self._workers.values() if w.alive]:
            self._loop.remove_reader(worker.pidfd)
            worker.reap()
        await self._evidence.close()
        await self._probing.close()
        if self._readmission is not None:
            await self._readmission.close()
        await self._stores.close()
        await self._nursery.close()
        await self._uplink.close()
        await self._doors.close()
        for worker in self._workers.values():
            self._console.ended(worker.name)
            worker.forget()
        orphans.kill_sessions({worker.pid for worker in self._workers.values()}, CLEANUP_S)
        await self._vault.close(unlink=self._finished is not None and self._finished.over)

    @property
    def _loop(self) -> asyncio.AbstractEventLoop:
        return asyncio.get_running_loop()

    def _task(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._task_done)

    def _task_done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("a fault of ours ends this node", exc_info=error)
            self.abort(1, f"internal error: {type(error).__name__}: {error}")

    # ------------------------------------------------------------------ looking

    async def _look_for_ever(self) -> None:
        strays_at = 0.0
        while True:
            self._driver.put(self._looked())
            now = time.monotonic()
            if now >= strays_at:
                strays_at = now + 1.0
                orphans.reap(self._known())
            await asyncio.sleep(self._agent.look_every_s())

    def _vault_changed(self) -> None:
        """What it has brought is looked at first: whoever is then seated is told where it lies."""
        known = self._vault.known()
        self._driver.put(self._looked())
        self._driver.put(known)

    def _looked(self, fence: int = 0) -> m.Looked:
        now_ns = time.monotonic_ns()
        for rank in {worker.chair for worker in self._workers.values()} - {NONE}:
            self._copied(rank)
            self._show_wanted(rank)
        return m.Looked(
            workers={worker.name: worker.look(now_ns) for worker in self._workers.values()},
            seals=self._vault.all_seals(),
            fence=fence,
        )

    def _copied(self, rank: int) -> None:
        """Show the worker of this chair how far its copies on another node have come, and what was audited."""
        step, audited = self._vault.copied(rank), self._vault.audits.done(rank)
        for worker in self._workers.values():
            if worker.chair == rank and worker.alive:
                worker.page.set_copied(UNCOPIED if step is None else step)
                worker.page.set_audited(*audited)

    def _show_wanted(self, rank: int) -> None:
        """Ask the worker of this chair for a checkpoint, and tell the vault which one it has made."""
        for worker in self._workers.values():  # in the order of their birth
            if worker.chair == rank:
                if worker.alive:
                    worker.page.want(self._wanted)
                if (step := worker.page.pace(rank).sealed) != NONE:
                    self._vault.sealed(rank, step)

    def _known(self) -> set[int]:
        """Children whose end somebody here waits for."""
        return {worker.pid for worker in self._workers.values() if worker.alive} | {
            self._nursery.pid,
            self._stores.pid,
            self._probing.pid,
            *(self._readmission.pids if self._readmission is not None else ()),
        }

    def _seen(self, findings: tuple[Finding, ...]) -> None:
        """By probes. A device that is well again is examined before anybody hears of it."""
        if self._readmission is not None:
            self._readmission.heard(findings)
        self._driver.put(m.Probed(findings=findings))

    def _show_workers(self) -> None:
        """Tell the probes whom to watch."""
        watched = tuple(
            Watched(
                worker=worker.name,
                rank=worker.fork.rank if worker.chair == NONE and worker.fork.role == "rank" else worker.chair,
                local_rank=worker.fork.local_rank,
                pid=worker.pid,
                stdout=worker.files.path("stdout.log"),
                stderr=worker.files.path("stderr.log"),
                alive=worker.alive,
            )
            for worker in self._workers.values()
            if worker.pid
        )
        self._probing.watch(watched)

    # ------------------------------------------------------------------ what workers say

    def _knows(self, name: str) -> bool:
        return name == stores.NAME or name in self._workers

    def _heard(self, name: str, message: Msg) -> None:
        if isinstance(message, StoreOpen):
            self._stores.opened(message)
            return
        if isinstance(message, Sealed):
            chair = self._workers[name].chair if name in self._workers else NONE
            self._show_wanted(chair)
            if NONE not in (message.audit, chair):
                self._vault.audits.begin(chair, message.audit)
            self._vault.poke()
            return
        if isinstance(message, Join):
            self._managed = True
        if name in self._early:
            self._early[name].append(message)
            return
        self._driver.put(m.Said(worker=name, message=message))  # type: ignore[arg-type]

    # ------------------------------------------------------------------ actions

    def _perform(self, action: m.AgentAction) -> Sequence[m.AgentEvent] | None:
        match action:
            case m.Fork():
                self._task(self._fork(action))
            case m.Kill():
                self._kill(action)
            case m.Forget():
                if (worker := self._workers.pop(action.worker, None)) is not None:
                    worker.forget()
                    self._show_workers()
            case m.Evidence():
                known = [self._workers[name] for name in action.workers if name in self._workers]
                self._evidence.ask(action.incident, known, action.why)
            case m.Fence():
                return self._fence(action.round)
            case m.Tell():
                self._tell(action)
            case m.SendReport():
                self._uplink.send(action.report)
            case m.StartStore():
                self._stores.start()
            case m.Allocate():
                self._task(self._allocate(action.worker, action.layout))
            case m.Keep():
                self._vault.keep(action.recorded)
            case m.VaultDo():
                self._wanted = action.checkpoint
                self._vault.do(action)
            case m.Log():
                message = action.message
                self._journal.line({"event": "log", "rank": action.rank, "step": message.step, "scalars": message.scalars})
            case m.Finished():
                self._finished = action
                self._driver.finish()
        return None

    def _fence(self, round_: int) -> Sequence[m.AgentEvent]:
        for worker in self._workers.values():
            worker.page.set_fence(round_)
        events: list[m.AgentEvent] = []
        if self._settings.hosts_store and not self._managed and (addr := self._stores.turn()) is not None:
            events.append(m.StoreUp(addr=addr))  # the script will be started anew, and must not find its old keys
        return [*events, self._looked(fence=round_)]

    def _tell(self, action: m.Tell) -> None:
        self._doors.tell(action.worker, action.message)
        if isinstance(action.message, Seated) and (worker := self._workers.get(action.worker)) is not None:
            worker.chair = action.message.rank
            self._show_workers()
            self._copied(worker.chair)
            worker.page.want(self._wanted)
            self._console.follow(worker.name, worker.files, action.message.rank, action.message.local_rank, from_now=True)

    def _kill(self, action: m.Kill) -> None:
        worker = self._workers.get(action.worker)
        if worker is None:
            return
        if action.signal == signal.SIGKILL and self._evidence.pending(worker.name):
            self._task(self._kill_after_evidence(worker))
        else:
            worker.signal(action.signal)

    async def _kill_after_evidence(self, worker: Worker) -> None:
        await self._evidence.spare(worker.name)
        worker.signal(signal.SIGKILL)

    async def _allocate(self, worker: str, layout: Layout) -> None:
        self._driver.put(m.Allocated(worker=worker, segments=await self._vault.reshape(layout)))

    # ------------------------------------------------------------------ birth and death

    async def _fork(self, fork: m.Fork) -> None:
        name = fork.worker
        try:
            files = self._archive.files(fork.restart, fork.local_rank, fork.role)
            worker = Worker(fork, memory.segment_path(self._memory_dir, self._key, f"page.{name}"), files)
        except OSError as error:
            hint = f" (enlarge {self._memory_dir} or name another place with --memory-dir)" if error.errno == errno.ENOSPC else ""
            self._driver.put(m.ForkFailed(worker=name, reason=f"{error.filename or self._memory_dir}: {error.strerror}{hint}"))
            return
        self._workers[name] = worker
        self._early[name] = []
        order = Spawn(
            kind="worker",
            program=self._launch.program,
            env=self._environment(worker),
            stdout=files.path("stdout.log"),
            stderr=files.path("stderr.log"),
            stacks=files.path("stacks.txt"),
            local_rank=fork.local_rank,
            numa_binding=self._launch.numa_binding,
        )
        try:
            pid = await self._nursery.spawn(order)
        except (ZygoteLost, SpawnFailed) as error:
            self._workers.pop(name).forget()
            self._early.pop(name)
            if isinstance(error, SpawnFailed):  # a zygote that died says so itself
                self._driver.put(m.ForkFailed(worker=name, reason=str(error)))
            return
        worker.born(pid)
        self._show_workers()
        self._driver.put(m.Forked(worker=name, pid=pid))
        for message in self._early.pop(name):
            self._heard(name, message)
        if fork.role == "rank":
            self._console.follow(name, files, fork.rank, fork.local_rank, from_now=False)
        self._loop.add_reader(worker.pidfd, self._died, worker)
        if self._finished is not None:
            worker.signal(signal.SIGKILL)

    def _environment(self, worker: Worker) -> dict[str, str]:
        return environment(
            worker.fork,
            self._launch,
            {
                **self._env,
                "RESILIENT_PAGE": worker.page.path,
                "RESILIENT_STACKS": worker.files.path("stacks.txt"),
                "TORCHELASTIC_ERROR_FILE": worker.files.path("error.json"),
            },
        )

    def _died(self, worker: Worker) -> None:
        self._loop.remove_reader(worker.pidfd)
        kernel.kill_group(worker.pid, signal.SIGKILL)
        self._task(self._bury(worker))

    async def _bury(self, worker: Worker) -> None:
        await self._doors.emptied(worker.name, LAST_WORDS_S)
        code = worker.reap()
        self._show_workers()
        self._console.ended(worker.name)
        if code == 0 and not self._stopping:
            await self._vault.settle(SETTLE_S)  # its last checkpoint is complete before the run counts as finished
        text = worker.error_text() if code else ""
        if text:
            self._root_errors.setdefault(worker.fork.restart, worker.files.path("error.json"))
        self._driver.put(self._looked())  # what it had sealed last is known before its death is
        self._driver.put(m.Exited(worker=worker.name, exit_code=code, text=text))

    def _zygote_down(self, reason: str) -> None:
        self._driver.put(m.ZygoteDown(reason=reason))
        self._loop.call_later(UNKNOWN_S, lambda: orphans.kill_unknown(self._known()))

    # ------------------------------------------------------------------ the store

    def _store_up(self, addr: str) -> None:
        self._driver.put(m.StoreUp(addr=addr))

    def _store_down(self, reason: str) -> None:
        self._driver.put(m.StoreDown(reason=reason))


def names_us(script: str) -> bool:
    """Whether the script's own source imports this package (a guess that only saves time: the first `Join` says it for certain)."""
    try:
        text = Path(script).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    return any(line.split()[:2] in (["import", "resilient"], ["from", "resilient"]) for line in text.splitlines())
