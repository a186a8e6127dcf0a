"""Nursery: the agent's end of the zygote. Starts it, asks it for processes, and starts another when it dies.

Contract: `Nursery(argv)` starts the process at once, before an event loop runs, because importing torch is the longest part of a start.
`launch` gives what the command line means. `spawn` gives a pid that is already, or in a moment, this process's child. When the zygote
dies, spawns under way raise `ZygoteLost`, `on_down` is called, and `on_up` when the next one can be asked; one that dies
`DEATHS_MAX` times within a minute is not started again.
Light to import: nothing here may delay the start of the process.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import subprocess
import sys
import time
from collections import deque
from typing import TYPE_CHECKING, Any, Final

from resilient.errors import ResilientError
from resilient.wire.frames import HEADER, Decoder, body_bytes, encode
from resilient_agents.orders import Answer, Launch, Misused, Spawn, Spawned

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

DEATHS_MAX: Final = 3
ENDING_S: Final = 0.5  # from the end of its line to its own end, which has a code to tell
SPAWN_S: Final = 120.0  # the first spawn waits until torch is loaded; on a cold disk that is half a minute
BOOT: Final = "import sys; sys.path = [p for p in sys.path if p]; from resilient_agents.zygote import main; main()"


class ZygoteLost(ResilientError):
    """The zygote died before it had answered."""


class SpawnFailed(ResilientError):
    """The zygote could not make the process; the message says why."""


class Nursery:
    """One zygote at a time."""

    def __init__(self, argv: Sequence[str]) -> None:
        """Start the zygote now. `argv`: the launcher's arguments."""
        self._argv = tuple(argv)
        self._decoder: Decoder[Any] = Decoder(Answer)
        self._waiting: deque[asyncio.Future[Spawned]] = deque()
        self._writer: asyncio.StreamWriter | None = None
        self._deaths: deque[float] = deque(maxlen=DEATHS_MAX)
        self._task: asyncio.Task[None] | None = None
        self._start()

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(  # noqa: S603
                [sys.executable, "-u", "-c", BOOT, str(theirs.fileno()), str(os.getpid()), *self._argv],
                pass_fds=[theirs.fileno()],
                start_new_session=True,  # Ctrl-C in a terminal is for the launcher alone
            )
        self._socket = ours

    @property
    def pid(self) -> int:
        """Of the zygote that lives now, or lived last."""
        return self._process.pid

    async def launch(self) -> Launch | Misused:
        """Wait for what the command line means; a zygote that dies meanwhile is replaced. Raises ZygoteLost if `DEATHS_MAX` have died."""
        while (answer := await self._ask()) is None:
            reason = self._hang_up("died while it was starting", at_once=False)
            self._deaths.append(time.monotonic())
            if len(self._deaths) == DEATHS_MAX:
                raise ZygoteLost(reason)
            self._start()
        return answer

    def watch(self, on_up: Callable[[], None], on_down: Callable[[str], None], on_gone: Callable[[str], None]) -> None:
        """From now on answer spawns, and replace a zygote that dies. `on_gone`: it died too often."""
        self._task = asyncio.create_task(self._watch(on_up, on_down, on_gone))

    async def spawn(self, order: Spawn) -> int:
        """Ask for one process. Raises ZygoteLost or SpawnFailed."""
        if self._writer is None:
            raise ZygoteLost("there is no zygote at the moment")
        answered: asyncio.Future[Spawned] = asyncio.get_running_loop().create_future()
        self._waiting.append(answered)
        self._writer.write(encode(order))
        try:
            async with asyncio.timeout(SPAWN_S):
                answer = await asyncio.shield(answered)
        except TimeoutError:
            self._process.kill()  # it answers nobody any more
            raise ZygoteLost(f"the zygote (pid {self.pid}) did not answer within {SPAWN_S:.0f} s") from None
        if answer.error:
            raise SpawnFailed(answer.error)
        return answer.pid

    async def close(self) -> None:
        """End the zygote; nothing is restarted any more."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        self._hang_up("the run is over")

    # ------------------------------------------------------------------

    async def _ask(self) -> Launch | Misused | None:
        """None if it dies instead."""
        self._reader, self._writer = await asyncio.open_unix_connection(sock=self._socket)
        answer = await self._read()
        return answer if isinstance(answer, Launch | Misused) else None

    async def _read(self) -> Any:
        try:
            length = body_bytes(await self._reader.readexactly(HEADER.size))
            return self._decoder.decode(await self._reader.readexactly(length))
        except (OSError, EOFError):
            return None

    async def _watch(self, on_up: Callable[[], None], on_down: Callable[[str], None], on_gone: Callable[[str], None]) -> None:
        on_up()
        while True:
            answer = await self._read()
            if isinstance(answer, Spawned) and self._waiting:
                waiting = self._waiting.popleft()
                if not waiting.done():
                    waiting.set_result(answer)
                continue
            reason = self._hang_up("died", at_once=False)
            self._deaths.append(time.monotonic())
            on_down(reason)
            if len(self._deaths) == DEATHS_MAX and time.monotonic() - self._deaths[0] < 60.0:
                on_gone(f"{reason}; {DEATHS_MAX} zygotes died within a minute, no further one is started")
                return
            self._start()
            if isinstance(await self._ask(), Launch):
                on_up()  # if it died, the end of the stream is read once more, and counted

    def _hang_up(self, why: str, *, at_once: bool = True) -> str:
        """Close the line, end the process, fail what waits. Gives a line for the log. at_once: it is not about to end by itself."""
        if self._writer is not None:
            self._writer.transport.abort()
            self._writer = None
        else:
            self._socket.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(0 if at_once else ENDING_S)
        self._process.kill()
        code = self._process.wait()  # at once: it has ended, or has just been killed
        reason = f"zygote (pid {self.pid}) {why}, exit code {code}"
        while self._waiting:
            waiting = self._waiting.popleft()
            if not waiting.done():
                waiting.set_exception(ZygoteLost(reason))
                waiting.exception()  # whoever waited may have gone
        return reason
