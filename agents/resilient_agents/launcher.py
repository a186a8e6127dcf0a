"""Launcher: puts one node together, from the parsed command line to the exit code.

Think of the person who unlocks the theatre in the morning and locks it at night: decides nothing about the play, forgets no light.

Contract: everything that can be wrong with what the user gave is found here, before a worker is started, and is a ConfigError (exit 2).
Whatever happens afterwards, everything is closed again: nothing of ours is left, neither process nor file. The first signal ends the
run in order, the second at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import shutil
import signal
import socket
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

from resilient import config, rulebook
from resilient.checkpoint import memory, room, transport
from resilient.checkpoint.haul import RATE_MIN
from resilient.checkpoint.retention import Keep
from resilient.core.machine import AgentSettings, CoordinatorSettings
from resilient.core.messages import NONE
from resilient.errors import ConfigError, ResilientError, TierUnavailable
from resilient.host.journal import Journal
from resilient.host.service import Service
from resilient.wire.page import PAGE_BYTES
from resilient_agents import kernel, logs, marks, preflight, readmission
from resilient_agents.devices import NOBODY, seats
from resilient_agents.devices import present as present_gpus
from resilient_agents.interface import address_on, present
from resilient_agents.main import Host, names_us
from resilient_agents.meeting import LOOPBACK, address, meeting_of
from resilient_agents.orders import Launch, Misused
from resilient_agents.probing import Probing, senses
from resilient_agents.sightings import Hello
from resilient_agents.tenancy import Tenancy
from resilient_agents.uplink import Uplink
from resilient_agents.vault import Vault
from resilient_agents.workers import shown_devices

if TYPE_CHECKING:
    from collections.abc import Callable

    from resilient_agents.meeting import Meeting
    from resilient_agents.nursery import Nursery

USAGE_EXIT: Final = 2
CONSOLE_S: Final = 5.0  # a console that does not take our last lines for this long does without them
FAREWELL_S: Final = 60.0  # the coordinator has a deadline of its own for telling the other nodes
ALONE_S: Final = 0.2  # there is nobody to tell
MEMORY_KEEP_S: Final = 3600.0  # a scheduler that brings a job back does it sooner; docs/decisions/0015-adoption.md
PROGRAM_MAX, DEVICES_MAX = 200, 32  # of a Hello, which has to be short
WARNING: Final = signal.SIGUSR1  # schedulers send it some time before the end (Slurm: --signal=B:USR1@300)
log = logging.getLogger("resilient")


def run(nursery: Nursery) -> int:
    """Run one node; gives the exit code."""
    kernel.adopt_orphans()
    try:
        with asyncio.Runner(loop_factory=_loop_factory()) as runner:
            return runner.run(_run(nursery))
    except ConfigError as error:
        sys.stderr.write(f"resilient-run: error: {error}\n")
        return USAGE_EXIT
    except ResilientError as error:
        sys.stderr.write(f"resilient-run: {error}\n")
        return preflight.UNFIT_EXIT if isinstance(error, preflight.Unfit) else 1
    except (asyncio.CancelledError, KeyboardInterrupt):  # a signal before there was anything to end
        return 1


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    try:
        import uvloop  # noqa: PLC0415 - optional
    except ImportError:
        return None
    factory: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop
    return factory


async def _run(nursery: Nursery) -> int:
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    try:
        launch = await nursery.launch()
        if isinstance(launch, Misused):
            (sys.stderr if launch.exit_code else sys.stdout).write(launch.text)
            return launch.exit_code
        options = config.resolve(launch.ours, os.environ, launch.config or None)
        _check_program(launch)
        _check_memory(launch, options)
        _check_rate(options)
        rulebook.load(options.policy)  # what is wrong with it is said on every node, before anything is started
        marks.read(options.policy)
        await preflight.admit(options)  # before there is a port, a run directory or a report of this node
        return await _Node(nursery, launch, options, meeting_of(launch, options)).run()
    finally:
        await nursery.close()


# --------------------------------------------------------------------------- what the user gave


def _check_program(launch: Launch) -> None:
    """The script must be there, before anything is started for it."""
    program = launch.program
    if program.kind in {"script", "run_path"} and not os.path.exists(program.target):
        raise ConfigError(f"the training script {program.target!r} does not exist (in {os.getcwd()})")


def _check_memory(launch: Launch, options: config.Options) -> None:
    """Room for the pages of all workers, and of those that take their places, must be there before the first one starts."""
    wanted = 4 * PAGE_BYTES * (launch.slots + _standbys(launch, options))
    try:
        found = room.left(options.memory_dir)
    except OSError as error:
        raise ConfigError(f"--memory-dir {options.memory_dir}: cannot be used ({error.strerror})") from error
    if found.num_bytes < wanted:
        raise ConfigError(
            f"--memory-dir {options.memory_dir}: at least {wanted} bytes free expected, {found.num_bytes} found {found.where}; {found.cure}"
        )


def _check_rate(options: config.Options) -> None:
    if options.parity == 1 or (options.parity and not options.copies):
        wanted = "0 or at least 2 nodes" if options.parity == 1 else "--copies of at least 1, for own state is always kept whole,"
        raise ConfigError(f"--parity {options.parity}: {wanted} expected, {options.copies if options.parity > 1 else 1} found")
    if 0 < options.data_rate < RATE_MIN:
        raise ConfigError(f"--data-rate: 0 or at least {RATE_MIN} bytes per second expected, {options.data_rate} found")


def _standbys(launch: Launch, options: config.Options) -> int:
    return launch.slots if options.shadows == "all" else options.standbys


def _keep_s(launch: Launch, options: config.Options, meeting: Meeting) -> float:
    """How long what this run holds in memory waits for its restart, if its agents are killed."""
    if meeting.run_id == launch.run_id and launch.run_id not in {"", "none"}:
        return (MEMORY_KEEP_S if options.checkpoint else 0.0) if options.memory_keep_s == "auto" else options.memory_keep_s
    if options.memory_keep_s not in {"auto", 0.0}:
        raise ConfigError("--memory-keep-s: a run id by which a restart is known for the same run expected (--rdzv-id), none found")
    return 0.0


# --------------------------------------------------------------------------- one node


class _Node:
    """All that runs on this node."""

    def __init__(self, nursery: Nursery, launch: Launch, options: config.Options, meeting: Meeting) -> None:
        self._nursery = nursery
        self._launch = launch
        self._options = options
        self._meeting = meeting
        self._run_dir = Path(options.run_dir or Path("runs", meeting.run_id)).absolute()
        self._signals = 0
        self._keep_s = _keep_s(launch, options, meeting)
        places = (str(self._run_dir), options.checkpoint, options.memory_dir)
        self._devices = seats(present_gpus(options.probe_root), {i: shown_devices(launch, i) for i in range(launch.slots)})
        ours = tuple(name for name, rank in self._devices.items() if rank != NOBODY)
        hello = Hello(program=launch.program.target[-PROGRAM_MAX:], devices=ours[:DEVICES_MAX])
        self._senses = senses(options.probes, options.probe_root, options.probe_socket, *places, policy=options.policy, hello=hello)

    async def run(self) -> int:
        launch, options, meeting = self._launch, self._options, self._meeting
        try:
            journal = Journal(self._run_dir)
            archive = logs.Archive(launch.log_dir or str(self._run_dir / "logs"), meeting.run_id)
        except OSError as error:
            raise ConfigError(f"{error.filename}: cannot be used ({error.strerror})") from error
        self._console = console = logs.Console(launch, archive)
        console.start()
        logs.log_to(console, options.log_level)
        for warning in launch.warnings:
            console.say(warning)
        try:
            tenancy = await self._claim(console)
            try:
                return await self._run(journal, archive, console, tenancy)
            finally:
                if tenancy is not None:
                    await tenancy.release()
        finally:
            journal.close()
            await asyncio.to_thread(console.close, CONSOLE_S)

    async def _run(self, journal: Journal, archive: logs.Archive, console: logs.Console, tenancy: Tenancy | None) -> int:
        launch, options, meeting = self._launch, self._options, self._meeting
        node = self._name()
        data_host = address_on(options.data_interface, present()) if options.data_interface else ""
        service = None
        if meeting.listener is not None:
            service = Service(self._coordinator_settings(node), meeting.token, journal, console.say)
            await service.start(meeting.listener)
        key = memory.new_key()
        vault, data_port = await self._vault(key, node, data_host)
        self._host = host = Host(
            launch=launch,
            settings=self._agent_settings(node, data_host, data_port, vault.heir.position, hosts=service is not None),
            key=key,
            memory_dir=options.memory_dir,
            token=meeting.token,
            nursery=self._nursery,
            probing=Probing(self._senses),
            readmission=readmission.wanted(options, self._devices),
            vault=vault,
            uplink=Uplink(meeting.host, meeting.port, token=meeting.token, run=meeting.run_id, node=node),
            journal=journal,
            archive=archive,
            console=console,
            store_bind=LOOPBACK if meeting.local else "",
            checkpoint_every=options.checkpoint_every if options.checkpoint else 0,
            snapshot_every=options.snapshot_every,
            audit_every_s=options.audit_every_s,
        )
        self._listen_to_signals()
        if tenancy is not None:
            tenancy.hold(lambda reason: host.abort(1, reason, over=True))
        try:
            return await self._both(host, service, console)
        finally:
            await host.close()
            if service is not None:
                await service.close()

    async def _claim(self, console: logs.Console) -> Tenancy | None:
        """The checkpoint URL for this run alone; None where another node does it, or there is no URL."""
        options, meeting = self._options, self._meeting
        if not options.checkpoint or meeting.listener is None:
            return None
        try:
            tenancy = Tenancy(options.checkpoint, meeting.run_id)
        except TierUnavailable as error:
            raise ConfigError(f"--checkpoint {options.checkpoint}: {error}") from error
        await tenancy.claim(console.say)
        return tenancy

    async def _vault(self, key: str, node: str, data_host: str) -> tuple[Vault, int]:
        """The keeper of copies, and the port where it serves peers."""
        options, meeting = self._options, self._meeting
        try:
            vault = Vault(
                run=meeting.run_id,
                directory=options.memory_dir,
                key=key,
                checkpoint_url=options.checkpoint,
                checkpoint_every=0 if options.checkpoint_every == "auto" else options.checkpoint_every,
                keep=Keep(options.checkpoint_keep, options.checkpoint_keep_every),
                level=options.checkpoint_zstd,
                token=meeting.token,
                node=node,
                host=data_host or address(self._launch, meeting),
                bind=data_host or (LOOPBACK if meeting.local else ""),
                data_rate=options.data_rate,
                transport=transport.find(options.data_transport),
                keep_s=self._keep_s,
                position=self._position(),
                alone=meeting.alone,
            )
        except TierUnavailable as error:
            raise ConfigError(f"--checkpoint {options.checkpoint}: {error}") from error
        try:
            return vault, await vault.start()
        except OSError as error:
            await vault.close(unlink=False)
            raise ConfigError(f"--memory-dir {options.memory_dir}: cannot be used ({error.strerror})") from error

    async def _both(self, host: Host, service: Service | None, console: logs.Console) -> int:
        """The agent, and the coordinator where it is here. The agent's end is this node's end."""
        coordinating = None if service is None else asyncio.create_task(service.run())
        acting = asyncio.create_task(host.run())
        tasks = {acting} | ({coordinating} if coordinating is not None else set())
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if coordinating is not None and coordinating.done() and coordinating.exception() is not None:
            host.abort(1, f"internal error in the coordinator: {coordinating.exception()!r}")
            log.error("a fault of ours ends the run", exc_info=coordinating.exception())
        finished = await acting
        if finished.message:
            console.say(finished.message)
        if finished.exit_code and host.root_error():
            _pass_on(host.root_error())
        await host.hang_up()
        if coordinating is not None and not coordinating.done() and self._signals < 2:
            await asyncio.wait({coordinating}, timeout=ALONE_S if self._meeting.alone else FAREWELL_S)
        if coordinating is not None and not coordinating.done():
            coordinating.cancel()
            await asyncio.gather(coordinating, return_exceptions=True)
        return finished.exit_code

    def _name(self) -> str:
        if self._meeting.alone or self._launch.backend == "static":
            return f"n{self._position()}"
        return f"{socket.gethostname().split('.')[0][:24]}-{secrets.token_hex(2)}"

    def _coordinator_settings(self, node: str) -> CoordinatorSettings:
        conf, options = self._launch.endpoint_conf, self._options
        return CoordinatorSettings(
            run=self._meeting.run_id,
            leader=node,
            nodes_min=self._launch.nodes_min,
            nodes_max=self._launch.nodes_max,
            max_restarts=self._launch.max_restarts,
            last_call_s=_seconds(conf, "last_call_timeout", 30.0),
            join_timeout_s=_seconds(conf, "join_timeout", 600.0),
            lease_s=options.lease_s,
            checkpoints=bool(options.checkpoint),
            checkpoint_every=0 if options.checkpoint_every == "auto" or not options.checkpoint else options.checkpoint_every,
            checkpoint_auto=options.checkpoint_every == "auto" and bool(options.checkpoint),
            checkpoint_budget=options.checkpoint_budget,
            grace_s=options.grace_s if options.checkpoint else 0.0,
            copies=options.copies,
            parity=options.parity,
            term=time.time_ns(),
            rules=rulebook.load(options.policy),
            hang=options.hang,
            alone_s=options.first_step_timeout_s,
        )

    def _position(self) -> int:
        """Of this node among all; NONE where only the order of coming tells."""
        return 0 if self._meeting.alone else self._launch.node_rank if self._launch.backend == "static" else NONE

    def _agent_settings(self, node: str, data_host: str, data_port: int, position: int, *, hosts: bool) -> AgentSettings:
        launch, options = self._launch, self._options
        return AgentSettings(
            run=self._meeting.run_id,
            node=node,
            boot=1 if self._meeting.alone else 2 + secrets.randbelow(1 << 31),
            slots=launch.slots,
            standbys=_standbys(launch, options),
            host=address(launch, self._meeting),
            data_host=data_host,
            data_port=data_port,
            failure_domain=options.failure_domain,
            node_rank=position,
            hosts_store=hosts,
            managed=launch.program.kind in {"script", "run_path"} and names_us(launch.program.target),
            first_step_timeout_s=options.first_step_timeout_s,
            shutdown_timeout_s=launch.shutdown_timeout_s,
            join_timeout_s=_seconds(launch.endpoint_conf, "join_timeout", 600.0),
            orphan_s=3 * options.lease_s,
            grace_s=options.grace_s if options.checkpoint else 0.0,
            hang=options.hang,
            devices=self._devices,
        )

    def _listen_to_signals(self) -> None:
        loop = asyncio.get_running_loop()
        for name in self._launch.signals:
            number = getattr(signal, name, None)
            if number is None:
                self._console.say(f"--signals-to-handle: {name!r} is no signal of this system")
            else:
                loop.add_signal_handler(number, self._signalled, int(number))
        if WARNING.name not in self._launch.signals:
            loop.add_signal_handler(WARNING, self._warned)

    def _warned(self) -> None:
        self._console.say(f"{WARNING.name}: a checkpoint is made soon" if self._options.checkpoint else f"{WARNING.name}: no --checkpoint")
        self._host.warn(WARNING.name)

    def _signalled(self, number: int) -> None:
        self._signals += 1
        name = signal.Signals(number).name
        if self._signals == 1:
            rescue = ", then what they held is checkpointed" if self._options.checkpoint and self._options.grace_s else ""
            self._console.say(f"{name}: ending the workers{rescue} (a second signal kills at once)")
            self._host.stop(number)
        else:
            self._host.abort(1, f"{name} again: killed", over=True)


def _seconds(conf: dict[str, str], key: str, default: float) -> float:
    """One of --rdzv-conf's timeouts."""
    try:
        return float(conf.get(key, default))
    except ValueError:
        raise ConfigError(f"--rdzv-conf {key}: seconds expected, {conf[key]!r} found") from None


def _pass_on(error_file: str) -> None:
    """Where somebody supervises us as we supervise workers (a scheduler, torchrun): hand on the root cause, as torchrun does."""
    if ours := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        with contextlib.suppress(OSError):
            shutil.copyfile(error_file, ours)
