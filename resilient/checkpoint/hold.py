"""Hold: who copies a slot asks its writer for patience.

Think of a hand raised in a lecture: whoever wipes the board sees it and waits until the sentence is written down, but not for ever.

Contract: a **hold** is a lock (flock) of the slot's file, so the kernel drops it when the one who copies dies. It only asks: what is whole
is said by the seal alone, with or without a hold, and where there are no such locks all goes on as if nobody asked. A **mark** (an open
file description lock) makes nobody wait: it lets the writer see that somebody will read here for long, before it decides to write at all.
Rejected: no hold (a writer whose two seals come faster than a copy would overtake every copy, and none would ever be whole); a word in
the slot (stays when its owner dies); a third slot (memory, and still no bound).
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct
import time
from collections.abc import Callable, Iterator
from typing import Final

PATIENCE_S: Final = 2.0  # of a writer with a copy under way, plus the time for the bytes
PATIENCE_BYTES_S: Final = 500 << 20  # a copy within memory into fresh pages has twice that
_POLL_S: Final = 0.0002
_FLOCK: Final = struct.Struct("@hhqqi4x")  # fcntl(2): l_type, l_whence, l_start, l_len, l_pid


@contextlib.contextmanager
def held(fd: int, payload_bytes: int) -> Iterator[None]:
    """Within this, a writer of the file waits. Any number may hold it. Without payload nobody need: the copy is shorter than the asking."""
    if not payload_bytes:
        yield
        return
    with _locked(fd, _share, _let_go):
        yield


def is_held(fd: int) -> bool:
    """Whether somebody copies from this file just now."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    fcntl.flock(fd, fcntl.LOCK_UN)
    return False


def marked(fd: int) -> contextlib.AbstractContextManager[None]:
    """Within this, `is_marked` is true for every other opening of the file. Any number may mark it."""
    return _locked(fd, _mark, _wipe)


def is_marked(fd: int) -> bool:
    """Whether somebody else has marked the file."""
    try:
        answer = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0))
    except OSError:
        return False
    return bool(_FLOCK.unpack(answer)[0] != fcntl.F_UNLCK)


def wait(fd: int, payload_bytes: int) -> None:
    """Until nobody holds the file, at most as long as a copy of `payload_bytes` may take."""
    until = time.monotonic() + PATIENCE_S + payload_bytes / PATIENCE_BYTES_S
    while payload_bytes and is_held(fd) and time.monotonic() < until:
        time.sleep(_POLL_S)


@contextlib.contextmanager
def _locked(fd: int, lock: Callable[[int], None], unlock: Callable[[int], None]) -> Iterator[None]:
    own = -1
    with contextlib.suppress(OSError):
        own = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC)  # anew: a lock belongs to an opening of a file
        lock(own)
    try:
        yield
    finally:
        if own >= 0:
            with contextlib.suppress(OSError):
                unlock(own)  # said, because a process forked meanwhile has this opening as well
            os.close(own)


def _share(fd: int) -> None:
    fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)


def _let_go(fd: int) -> None:
    fcntl.flock(fd, fcntl.LOCK_UN)


def _mark(fd: int) -> None:
    fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_RDLCK, os.SEEK_SET, 0, 0, 0))


def _wipe(fd: int) -> None:
    fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_UNLCK, os.SEEK_SET, 0, 0, 0))
