"""Doors: the agent's Unix socket, where its workers (and its store process) come in.

Contract: the socket is 0600 in a directory that is 0700, and whoever connects must first say who they are and the run's token, in a
`Join` or `StoreOpen`; anything else is one log line and the door is shut. A worker's messages reach `on_message` in order.
What a worker sent before it died is delivered before `emptied` returns.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import os
from typing import TYPE_CHECKING, Final

from resilient.core.messages import Join, Msg
from resilient.errors import ProtocolError
from resilient.wire.link import Link
from resilient_agents.orders import StoreOpen, Up

if TYPE_CHECKING:
    from collections.abc import Callable

INTRODUCTION_S: Final = 10.0
log = logging.getLogger("resilient.agent")


class Doors:
    """Listens at `path`; `known` says whether there is a worker of that name."""

    def __init__(self, path: str, token: str, known: Callable[[str], bool], on_message: Callable[[str, Msg], None]) -> None:
        """Nothing is opened before `start`."""
        self.path = path
        self._token = token
        self._known = known
        self._on_message = on_message
        self._links: dict[str, Link] = {}
        self._tasks: dict[asyncio.Task[None], str] = {}
        self._writers: set[asyncio.StreamWriter] = set()
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        """Open the socket."""
        self._server = await asyncio.start_unix_server(self._serve, self.path, backlog=256)
        os.chmod(self.path, 0o600)

    def tell(self, worker: str, message: Msg) -> None:
        """Send one frame; nothing if the worker has no connection."""
        link = self._links.get(worker)
        if link is not None:
            link.send(message)

    async def emptied(self, worker: str, timeout_s: float) -> None:
        """Until everything that a dead worker sent is delivered (a child of its own may hold the line open: then the timeout)."""
        tasks = [task for task, name in self._tasks.items() if name == worker]
        if tasks:
            await asyncio.wait(tasks, timeout=timeout_s)

    async def close(self) -> None:
        """Shut everything; the socket's file goes with its directory."""
        if self._server is not None:
            self._server.close()
        for writer in list(self._writers):
            writer.transport.abort()  # their tasks then end by themselves
        if self._tasks:
            await asyncio.wait(list(self._tasks), timeout=1.0)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks[task] = ""
        self._writers.add(writer)
        try:
            await self._listen(Link(reader, writer, Up, "a stranger"), task)
        except ProtocolError as error:
            log.warning("dropped a connection on %s: %s", self.path, error)
        finally:
            del self._tasks[task]
            self._writers.discard(writer)
            writer.close()

    async def _listen(self, link: Link, task: asyncio.Task[None]) -> None:
        try:
            async with asyncio.timeout(INTRODUCTION_S):
                first = await link.recv()
        except TimeoutError:
            first = None
        if not isinstance(first, Join | StoreOpen):
            raise ProtocolError(f"link from {link.name}: who it is expected first, {type(first).__name__} found")
        if not hmac.compare_digest(first.token.encode(), self._token.encode()):
            raise ProtocolError(f"link from {first.worker!r}: wrong token")
        if not self._known(first.worker):
            raise ProtocolError(f"link from {first.worker!r}: a worker of this agent expected")
        worker = link.name = self._tasks[task] = first.worker
        self._links[worker] = link
        try:
            message: Msg | None = first
            while message is not None:
                self._on_message(worker, message)
                message = await link.recv()
        finally:
            if self._links.get(worker) is link:
                del self._links[worker]
