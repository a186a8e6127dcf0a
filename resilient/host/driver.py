"""Driver: runs one machine (core/machine.py) for real, on an asyncio loop.

Think of a clerk with an in-tray: takes the next paper, asks the machine, carries out what it says in the order in which it says it,
and looks at the clock when the tray is empty.

Contract: events are stepped in the order of `put`. What performing an action yields at once (a list of events) is stepped right after
the actions of the same step and before anything in the tray. `perform` never blocks; what takes time is started there and comes back
through `put`. An exception in the machine or in `perform` ends `run` with it: a broken invariant is never papered over.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from typing import TYPE_CHECKING, Any, Final, Generic, Protocol, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

E = TypeVar("E")
A = TypeVar("A")
E_contra = TypeVar("E_contra", contravariant=True)
A_co = TypeVar("A_co", covariant=True)
_EVENTS_PER_TURN: Final = 256  # then the loop may read sockets again


class Machine(Protocol[E_contra, A_co]):
    """What core/coordinator.py and core/agent.py have in common."""

    def step(self, event: E_contra, now: float) -> Sequence[A_co]:
        """Take one event, give the actions that follow from it."""
        ...

    def deadline(self) -> float | None:
        """When to step a tick if nothing else happens."""
        ...


class Driver(Generic[E, A]):
    """One machine and its in-tray."""

    def __init__(
        self,
        machine: Machine[E, A],
        tick: E,
        perform: Callable[[A], Sequence[E] | None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`tick` is the event for a deadline reached; `perform` makes an action real and may answer with events."""
        self.machine = machine
        self._tick = tick
        self._perform = perform
        self._clock = clock
        self._tray: deque[E] = deque()
        self._filled = asyncio.Event()
        self._finished = False

    def put(self, event: E) -> None:
        """Lay `event` into the tray. From the loop's own thread only."""
        self._tray.append(event)
        self._filled.set()

    def finish(self) -> None:
        """Perform no further action and let `run` return."""
        self._finished = True
        self._filled.set()

    async def run(self) -> None:
        """Step events until `finish`."""
        while not self._finished:
            await self._wait()
            for _ in range(min(len(self._tray), _EVENTS_PER_TURN)):
                self._step(self._tray.popleft())
            due = self.machine.deadline()
            if due is not None and self._clock() >= due:
                self._step(self._tick)
            await asyncio.sleep(0)

    async def _wait(self) -> None:
        """Until the tray holds something or the machine's deadline is reached."""
        if self._tray or self._finished:
            return
        self._filled.clear()
        due = self.machine.deadline()
        try:
            async with asyncio.timeout(None if due is None else max(0.0, due - self._clock())):
                await self._filled.wait()
        except TimeoutError:
            return

    def _step(self, event: E) -> None:
        at_once: deque[Any] = deque([event])
        while at_once and not self._finished:
            for action in self.machine.step(at_once.popleft(), self._clock()):
                if self._finished:
                    return
                at_once.extend(self._perform(action) or ())
