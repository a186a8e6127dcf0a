"""Movers: memory copied from here to there by several threads.

Think of removal men: one of them carries down the small things himself, for handing them round takes longer than carrying them; the big
ones stand in the yard, and whoever has his hands free takes the next.

Contract: every byte of every move is copied before `move` returns, whatever it raises: no thread writes into memory that its caller has
given away. Sources and targets do not overlap, and stay where they are meanwhile. The caller is one of the threads. The others are made
when first needed, never at import (workers are forked from a process with one thread), and once; a forked child makes its own.
Numbers: one pass of memory (stream.py); a hundred microseconds to call the others; 0.3 us for each small move. Large moves are cut, so
that the work is shared by bytes and nobody waits for longer than one piece takes (0.5 ms).
Rejected: tensor.copy_ (half of memcpy's speed on one thread of some machines: it reads what it is about to overwrite); one share per
thread cut beforehand (a thread that is late, or sits on a busy core, keeps all others waiting).
"""

from __future__ import annotations

import ctypes
import os
from collections import deque
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TYPE_CHECKING, Final

from resilient.checkpoint import stream
from resilient.errors import TierUnavailable

if TYPE_CHECKING:
    from collections.abc import Sequence

Move = tuple[int, int, int]  # address of the target, address of the source, bytes

SMALL: Final = 64 << 10  # up to this a thread has copied before another one has taken the lock of the interpreter
PIECE: Final = 4 << 20
THREADS_MAX: Final = 8  # a socket's memory is busy with fewer
_ALONE: Final = 2 * PIECE  # less than this is copied before the others are awake
_PATIENCE_S: Final = 60.0  # with a thread that does not come back, plus the time for the bytes
_PATIENCE_BYTES_S: Final = 100 << 20

_copy_small = ctypes.PyDLL(None).memmove  # with it: nobody is woken for a few bytes
_copy_small.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
_copy_small.restype = None


def threads_for(ranks_here: int) -> int:
    """How many threads a rank may copy with where `ranks_here` share the cores that this process may use."""
    return min(max(len(os.sched_getaffinity(0)) // max(ranks_here, 1), 1), THREADS_MAX)


class Movers:
    """Up to `threads` threads, the caller's among them. One call of `move` at a time."""

    def __init__(self, threads: int) -> None:
        """No thread is made yet."""
        self.threads = threads
        self._pool: ThreadPoolExecutor | None = None
        self._pid = 0

    def move(self, small: Sequence[Move], large: Sequence[Move]) -> None:
        """Do all of it. `small` is copied by the caller alone. Raises what a thread raised, TierUnavailable if one does not come back."""
        pieces = deque(large)
        num_bytes = sum(count for _, _, count in large)
        helpers = min(self.threads - 1, len(pieces) - 1) if num_bytes > _ALONE else 0
        called = [self._others().submit(_work, pieces) for _ in range(helpers)]
        try:
            for target, source, count in small:
                _copy_small(target, source, count)
            _work(pieces)
        finally:
            _, late = wait(called, timeout=_PATIENCE_S + num_bytes / _PATIENCE_BYTES_S)
        if late:
            raise TierUnavailable(f"copy of {num_bytes} bytes: {len(late)} of {helpers} threads did not come back")
        for one in called:
            one.result()

    def _others(self) -> ThreadPoolExecutor:
        if self._pool is None or self._pid != os.getpid():  # threads do not survive a fork
            self._pool = ThreadPoolExecutor(self.threads - 1, thread_name_prefix="resilient-mover")
            self._pid = os.getpid()
        return self._pool


def cut(move: Move) -> list[Move]:
    """One move in pieces that threads can share."""
    target, source, num_bytes = move
    return [(target + at, source + at, min(PIECE, num_bytes - at)) for at in range(0, num_bytes, PIECE)]


def _work(pieces: deque[Move]) -> None:
    while pieces:
        try:
            target, source, count = pieces.popleft()
        except IndexError:
            return  # somebody else took the last one
        stream.copy(target, source, count)
