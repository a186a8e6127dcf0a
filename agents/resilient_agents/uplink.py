"""Uplink: the agent's connection to the coordinator, made again whenever it breaks.

Contract: `on_up`, `on_down` and `on_assignment` are called from the loop, in order; `on_refused` once, and then no more is tried: a
wrong token or another run's coordinator does not become right by waiting. Everything else is tried again, with a pause that
grows to a second and is never the same for two agents (9,500 that come back at once would be one crowd).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from typing import TYPE_CHECKING, Final

from resilient.core.messages import Assignment, Report
from resilient.errors import ProtocolError
from resilient.wire import link

if TYPE_CHECKING:
    from collections.abc import Callable

PAUSE_S_MIN: Final = 0.02
PAUSE_S_MAX: Final = 1.0
COMPLAINT_S: Final = 5.0  # without a connection: say so, and again after twice as long
log = logging.getLogger("resilient.agent")


class Uplink:
    """One node's connection."""

    def __init__(self, host: str, port: int, *, token: str, run: str, node: str) -> None:
        """Nothing is connected before `start`."""
        self._host = host
        self._port = port
        self._token = token
        self._run = run
        self._node = node
        self._link: link.Link | None = None
        self._task: asyncio.Task[None] | None = None

    def start(
        self,
        on_up: Callable[[], None],
        on_down: Callable[[str], None],
        on_assignment: Callable[[Assignment], None],
        on_refused: Callable[[str], None],
    ) -> None:
        """Connect, and stay connected."""
        self._task = asyncio.create_task(self._run_for_ever(on_up, on_down, on_assignment, on_refused))

    def send(self, report: Report) -> None:
        """Send, or drop it where there is no connection: the next report says it all again."""
        if self._link is not None:
            self._link.send(report)

    async def close(self) -> None:
        """Send what is buffered, then hang up for good."""
        if self._link is not None:
            await self._link.close()
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _run_for_ever(
        self,
        on_up: Callable[[], None],
        on_down: Callable[[str], None],
        on_assignment: Callable[[Assignment], None],
        on_refused: Callable[[str], None],
    ) -> None:
        pause, patience, down_since = PAUSE_S_MIN, COMPLAINT_S, time.monotonic()
        while True:
            reason = f"no connection to {self._host}:{self._port}"
            try:
                self._link = await link.connect(self._host, self._port, Assignment, token=self._token, run=self._run, name=self._node)
            except link.RefusedError as error:
                on_refused(str(error))
                return
            except (OSError, ProtocolError) as error:  # TimeoutError is an OSError
                reason = str(error) or reason
            else:
                pause, patience = PAUSE_S_MIN, COMPLAINT_S
                on_up()
                with contextlib.suppress(ProtocolError):  # garbage: hang up and connect again
                    while (assignment := await self._link.recv()) is not None:
                        on_assignment(assignment)
                self._link.writer.transport.abort()
                self._link = None
                reason, down_since = "the coordinator closed the connection", time.monotonic()
            on_down(reason)
            if time.monotonic() - down_since > patience:
                log.warning("no coordinator at %s:%d since %.0f s, still trying: %s", self._host, self._port, patience, reason)
                patience *= 2
            await asyncio.sleep(pause * random.uniform(0.5, 1.0))  # noqa: S311
            pause = min(2 * pause, PAUSE_S_MAX)
