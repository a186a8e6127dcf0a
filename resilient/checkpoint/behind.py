"""Behind: one piece of work at a time, done by a thread of its own while its giver goes on.

Think of a shop with one apprentice: he is given one errand, and before he is given the next, or before the door is locked, the master
waits until he is back.

Contract: `start` returns at once; `settle` returns when the work is over, and raises what it raised; no other work begins before. Work says
whether it went well; calls that were given to `after` follow it then, on its thread, and are forgotten otherwise. Given when nothing is
under way, they are made at once if the last work went well. All methods belong to one thread. The thread is made when first needed (a
process forked later makes its own), and the interpreter waits for it at its end.
Every wait ends: after PATIENCE_S plus the time for the bytes `settle` raises TierUnavailable. The work may still be writing then, so its
memory is not to be given back.
"""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TYPE_CHECKING, Final

from resilient.errors import TierUnavailable

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Future

PATIENCE_S: Final = 60.0
PATIENCE_BYTES_S: Final = 100 << 20
THREAD: Final = "resilient-behind"


class Behind:
    """See the module's text."""

    def __init__(self) -> None:
        """No thread yet."""
        self._lock = threading.Lock()
        self._pool: ThreadPoolExecutor | None = None
        self._pid = 0
        self._future: Future[None] | None = None
        self._patience_s = PATIENCE_S
        self._under_way = False
        self._well = False
        self._calls: list[Callable[[], None]] = []

    @property
    def busy(self) -> bool:
        """Whether something was started that nobody has settled."""
        return self._future is not None

    def start(self, work: Callable[[], bool], num_bytes: int) -> None:
        """Have `work` done behind, after what is under way. num_bytes: what it moves."""
        self.settle()
        self._under_way = True
        self._patience_s = PATIENCE_S + num_bytes / PATIENCE_BYTES_S
        self._future = self._thread().submit(self._run, work)

    def do(self, work: Callable[[], bool]) -> None:
        """Do it here and now, as though it had been settled."""
        self.settle()
        self._under_way = True
        self._run(work)

    def after(self, call: Callable[[], None]) -> None:
        """Have `call` made once what was started last has gone well."""
        with self._lock:
            if self._under_way:
                self._calls.append(call)
                return
        if self._well:
            call()

    def settle(self, patience_s: float | None = None) -> None:
        """Wait until it is over. patience_s: other than its own."""
        future = self._future
        if future is None:
            return
        patience_s = self._patience_s if patience_s is None else patience_s
        if wait([future], timeout=patience_s).not_done:
            raise TierUnavailable(f"a copy that was begun is not complete after {patience_s:.0f} s")
        self._future = None
        future.result()

    def _run(self, work: Callable[[], bool]) -> None:
        well, calls = False, []
        try:
            well = work()
        finally:
            with self._lock:
                calls, self._calls = self._calls, []
                self._under_way, self._well = False, well
        if well:
            for call in calls:
                call()

    def _thread(self) -> ThreadPoolExecutor:
        if self._pool is None or self._pid != os.getpid():  # threads do not survive a fork
            self._pool = ThreadPoolExecutor(1, thread_name_prefix=THREAD)
            self._pid = os.getpid()
        return self._pool
