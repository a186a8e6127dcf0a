"""Service: the coordinator's machine behind a TCP port.

Contract: every connection proves the run's token first (wire/link.py); anything else on the port costs one log line and is dropped.
After that come `Report`s of the node that was named in the handshake, and go `Assignment`s for it. A connection that ends is `NodeLost`,
unless the node has another one by then. The machine decides everything; this file only carries.
Limits: connections that have not proven anything, of all together; unsent bytes and frame size, of each.
Cost: about 30 us of one core per report with uvloop; an assignment is encoded once per node.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Final

from resilient.core.coordinator import Coordinator
from resilient.core.lines import IncidentClosed, RunStarted
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
    Tick,
)
from resilient.core.messages import Report
from resilient.errors import ProtocolError
from resilient.host.driver import Driver
from resilient.wire import link

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

    from resilient.host.journal import Journal

STRANGERS_MAX: Final = 256  # connections in the handshake at one time; more are dropped unheard
log = logging.getLogger("resilient.coordinator")


class Service:
    """One run's coordinator. `start`, then `run` until the run is over, then `close`."""

    def __init__(self, settings: CoordinatorSettings, token: str, journal: Journal, say: Callable[[str], None]) -> None:
        """`say` shows a line to the user."""
        self.coordinator = Coordinator(settings)
        self.driver: Driver[CoordinatorEvent, CoordinatorAction] = Driver(self.coordinator, Tick(), self._perform)
        self._run = settings.run
        self._token = token
        self._journal = journal
        self._say = say
        self._links: dict[str, link.Link] = {}
        self._strangers = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._writers: set[asyncio.StreamWriter] = set()
        self._server: asyncio.Server | None = None
        self._finished: Finish | None = None

    async def start(self, listener: socket.socket) -> int:
        """Listen on this bound socket; the port is returned."""
        self._server = await asyncio.start_server(self._serve, sock=listener, backlog=2048)
        port: int = listener.getsockname()[1]
        return port

    async def run(self) -> Finish:
        """Until every agent knows that the run is over."""
        await self.driver.run()
        assert self._finished is not None
        return self._finished

    async def close(self) -> None:
        """Write the status for the last time, and hang up."""
        self._journal.status(self.coordinator.status())
        if self._server is not None:
            self._server.close()
        await asyncio.gather(*(connection.close() for connection in self._links.values()))
        for writer in self._writers:
            writer.transport.abort()  # their tasks then end by themselves
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=1.0)

    # ------------------------------------------------------------------ connections

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self._writers.add(writer)
        try:
            await self._greet(reader, writer)
        except ProtocolError as error:
            log.warning("dropped a connection: %s", error)
        finally:
            self._tasks.discard(task)
            self._writers.discard(writer)
            writer.close()

    async def _greet(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._strangers >= STRANGERS_MAX:
            raise ProtocolError(f"more than {STRANGERS_MAX} connections in their handshake")
        self._strangers += 1
        try:
            connection = await link.accept(reader, writer, Report, token=self._token, run=self._run)
        finally:
            self._strangers -= 1
        node = connection.name
        earlier = self._links.get(node)
        self._links[node] = connection
        if earlier is not None:
            await earlier.close()
        self.driver.put(NodeUp(node=node))
        try:
            await self._read(connection)
        finally:
            if self._links.get(node) is connection:
                del self._links[node]
                self.driver.put(NodeLost(node=node))

    async def _read(self, connection: link.Link) -> None:
        while (report := await connection.recv()) is not None:
            if report.node != connection.name:
                raise ProtocolError(f"link from {connection.name}: a report of that node expected, one of {report.node!r} found")
            self.driver.put(report)

    # ------------------------------------------------------------------ actions

    def _perform(self, action: CoordinatorAction) -> None:
        match action:
            case Assign():
                connection = self._links.get(action.node)
                if connection is not None:
                    connection.send(action.assignment)
            case Announce():
                self._journal.line(action.line)
                self._show(action.line)
            case StatusDue():
                self._journal.status(self.coordinator.status())
                if self._journal.asked():
                    self.driver.put(Asked())
            case Finish():
                self._finished = action
                self.driver.finish()

    def _show(self, line: object) -> None:
        """The two things that a user wants to see without looking into a file."""
        if isinstance(line, IncidentClosed):
            lost = "step count unknown" if line.steps_lost < 0 else f"{line.steps_lost} steps lost"
            self._say(
                f"recovered in {line.downtime_s:.3f} s from: {line.cause} (rank {line.rank}, pid {line.pid}, {line.node}); "
                f"{line.verdict}, state from {line.restored_from}, {lost} "
                f"[detect {line.detect:.3f}, decide {line.decide:.3f}, regroup {line.regroup:.3f}, "
                f"restore {line.restore:.3f}, replay {line.replay:.3f}]",
            )
        elif isinstance(line, RunStarted):
            self._say(f"run {line.run_id}: {line.world_size} ranks on {len(line.nodes)} node(s); {self._journal.directory}")
