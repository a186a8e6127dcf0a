"""Stores: the agent's end of the store process.

Contract: `start` answers through `on_up(addr)` or `on_down(reason)`, and `on_down` also comes when the process dies later. There is always
an empty store ahead: `turn` changes to it at once, without a wait, and gives its address (None if it is not open yet).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections import deque
from typing import TYPE_CHECKING, Final

from resilient_agents import kernel
from resilient_agents.nursery import SpawnFailed, ZygoteLost
from resilient_agents.orders import Spawn, StoreOpen, StoreTurn

if TYPE_CHECKING:
    from collections.abc import Callable

    from resilient_agents.doors import Doors
    from resilient_agents.nursery import Nursery

DYING_S: Final = 1.0
NAME: Final = "store"  # as who it comes in through the doors; no worker is called so


class Stores:
    """One store process at a time."""

    def __init__(
        self,
        nursery: Nursery,
        doors: Doors,
        env: dict[str, str],
        host: str,
        on_up: Callable[[str], None],
        on_down: Callable[[str], None],
    ) -> None:
        """`host`: address at which workers of all nodes reach it. `env`: what the process needs."""
        self._nursery = nursery
        self._doors = doors
        self._env = env
        self._host = host
        self._on_up = on_up
        self._on_down = on_down
        self._ports: deque[int] = deque()
        self._pid = 0
        self._pidfd = -1
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Start the process, or another one in its place."""
        self._task = asyncio.create_task(self._start())

    async def _start(self) -> None:
        self._end()
        try:
            pid = await self._nursery.spawn(Spawn(kind="store", program=None, env=self._env))
        except (ZygoteLost, SpawnFailed) as error:
            self._on_down(str(error))
            return
        self._pid, self._pidfd = pid, os.pidfd_open(pid)
        asyncio.get_running_loop().add_reader(self._pidfd, self._ended, pid)

    def opened(self, message: StoreOpen) -> None:
        """The process has opened one more store."""
        self._ports.append(message.port)
        if len(self._ports) == 1:
            self._on_up(f"{self._host}:{message.port}")

    def turn(self) -> str | None:
        """Leave the store in use for the next, empty one. None if there is none yet: the one in use stays."""
        if len(self._ports) < 2:
            return None
        self._ports.popleft()
        self._doors.tell(NAME, StoreTurn())
        return f"{self._host}:{self._ports[0]}"

    @property
    def pid(self) -> int:
        """Of the process that lives now, 0 if none does."""
        return self._pid if self._pidfd >= 0 else 0

    def _ended(self, pid: int) -> None:
        self._end()
        self._on_down(f"the store process (pid {pid}) died")

    def _end(self) -> None:
        """Kill it if it lives, and collect it."""
        self._ports.clear()
        if self._pidfd >= 0:
            asyncio.get_running_loop().remove_reader(self._pidfd)
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):
                kernel.collect(self._pid, DYING_S)
            os.close(self._pidfd)
            self._pidfd = -1

    async def close(self) -> None:
        """End it for good."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        self._end()
