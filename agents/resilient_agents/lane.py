"""Lanes: threads for work that blocks, so that the agent's event loop never does.

Think of a counter with a few clerks: who comes draws a number and goes on with his day; if a clerk has fallen asleep over a form, another
one takes his place, and after the fourth sleeping clerk the counter is closed.

Contract: `run` gives the job's result, or raises what it raised, or TierUnavailable when the deadline is over. A thread cannot be
stopped: a job that hangs keeps its (daemon) thread, which holds up neither other jobs nor the end of the process. At most `queue_max` jobs
wait. The threads are nice: training comes first.
Rejected: ThreadPoolExecutor (its threads are joined at exit, so one hung storage call would hang the agent's end).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import queue
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

from resilient.errors import TierUnavailable

T = TypeVar("T")
log = logging.getLogger("resilient.vault")
LOST_MAX: Final = 4  # threads that may hang at the same time
WAITING_S: Final = 3600.0  # for a job's turn; the jobs before it have deadlines of their own


@dataclass
class _Job:
    work: Callable[[], Any]
    started: Future[threading.Thread] = field(default_factory=Future)
    done: Future[Any] = field(default_factory=Future)


class Lane:
    """A few threads and a bounded queue. Used from one event loop."""

    def __init__(self, name: str, *, threads: int = 1, niceness: int = 5, queue_max: int = 256) -> None:
        """`niceness`: added to the process's own, for these threads only."""
        self.name = name
        self._niceness = niceness
        self._waiting: queue.Queue[_Job | None] = queue.Queue(queue_max)
        self._threads = threads
        self._alive: set[threading.Thread] = set()
        self._lost: set[threading.Thread] = set()

    async def run(self, work: Callable[[], T], *, deadline_s: float) -> T:
        """`work()`, in a thread. The deadline begins with the work."""
        if len(self._lost) >= LOST_MAX:
            raise TierUnavailable(f"{self.name}: {len(self._lost)} operations hang already")
        job = _Job(work)
        try:
            self._waiting.put_nowait(job)
        except queue.Full:
            raise TierUnavailable(f"{self.name}: {self._waiting.maxsize} operations wait already") from None
        while len(self._alive) < self._threads:
            self._start()
        async with asyncio.timeout(WAITING_S):
            thread = await asyncio.wrap_future(job.started)
        try:
            async with asyncio.timeout(deadline_s):
                result: T = await asyncio.wrap_future(job.done)
                return result
        except TimeoutError:
            if job.done.done() and not job.done.cancelled():
                raise  # the work's own
            self._alive.discard(thread)
            self._lost.add(thread)
            raise TierUnavailable(f"{self.name}: no end after {deadline_s:.0f} s") from None

    def wanted(self) -> bool:
        """Whether this thread's work has not been given up. Asked by the work itself, before it does what cannot be undone."""
        return threading.current_thread() not in self._lost

    def close(self) -> None:
        """Let the threads end when their present work does. What waits is not done."""
        with contextlib.suppress(queue.Empty):
            while (job := self._waiting.get_nowait()) is not None:
                job.started.cancel()
        for _ in self._alive:
            self._waiting.put_nowait(None)

    def join(self, timeout_s: float) -> None:
        """After `close`: wait for the threads that still work."""
        for thread in list(self._alive):
            thread.join(timeout_s)

    def _start(self) -> None:
        thread = threading.Thread(target=self._work, name=f"lane {self.name}", daemon=True)
        self._alive.add(thread)
        thread.start()

    def _work(self) -> None:
        this = threading.current_thread()
        with contextlib.suppress(OSError):  # forbidden in some sandboxes
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), self._niceness)
        while this not in self._lost and (job := self._waiting.get()) is not None:
            if job.started.set_running_or_notify_cancel():
                job.started.set_result(this)
                _do(job)
        self._lost.discard(this)


def _do(job: _Job) -> None:
    """The top of a thread: whatever the work raises belongs to the one who waits for it."""
    if not job.done.set_running_or_notify_cancel():
        return
    try:
        job.done.set_result(job.work())
    except BaseException as error:  # noqa: BLE001
        job.done.set_exception(error)


class Errands:
    """Tasks that nobody waits for: kept until they end, ended together."""

    def __init__(self) -> None:
        """None yet."""
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self, work: Coroutine[Any, Any, None]) -> None:
        """Begin `work` on the running loop."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    async def settle(self, timeout_s: float) -> bool:
        """Wait for those under way now; whether all of them have ended."""
        if not self._tasks:
            return True
        _, left = await asyncio.wait(set(self._tasks), timeout=timeout_s)
        return not left

    async def close(self) -> None:
        """Cancel all and see them end."""
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=1.0)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("a fault of ours in the background", exc_info=error)
