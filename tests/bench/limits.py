"""What the machine allows: one warm pass of memory, a write to the disk past the page cache; and files that are read as if for the first time."""

from __future__ import annotations

import ctypes
import itertools
import mmap
import os
import pathlib
import statistics
import threading
import time
from collections.abc import Callable, Iterable

BLOCK = 16 << 20
LOADS = 3  # of which the median counts: how fast a disk answers differs from one time to the next


def memcpy_s(num_bytes: int, threads: int, rounds: int = 5, before: Callable[[], object] | None = None) -> float:
    """One warm pass, from private into shared memory, cut into one share for each thread; the best of several.

    before: called before each pass; the median then.
    """
    source, target = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE), mmap.mmap(-1, num_bytes, flags=mmap.MAP_SHARED)
    for one in (source, target):
        for at in range(0, num_bytes, mmap.PAGESIZE):
            one[at] = 1
    from_, to = (ctypes.addressof(ctypes.c_char.from_buffer(one)) for one in (source, target))
    shares = [num_bytes * i // threads for i in range(threads + 1)]
    found = []
    for _ in range(rounds):
        if before is not None:
            before()
        others = [threading.Thread(target=ctypes.memmove, args=(to + a, from_ + a, b - a)) for a, b in itertools.pairwise(shares)]
        begin = time.perf_counter()
        for other in others:
            other.start()
        for other in others:
            other.join()
        found.append(time.perf_counter() - begin)
    return min(found) if before is None else statistics.median(found)


def disk_s(num_bytes: int, where: pathlib.Path, rounds: int = 3) -> float:
    """So many bytes written past the page cache, and flushed; the median."""
    block, found = mmap.mmap(-1, BLOCK), []
    block.write(os.urandom(BLOCK))
    for number in range(rounds):
        path = where / f"limit-{number}"
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_DIRECT)
        begin = time.perf_counter()
        for _ in range(-(-num_bytes // BLOCK)):
            os.write(fd, block)
        os.fsync(fd)
        found.append(time.perf_counter() - begin)
        os.close(fd)
        path.unlink()
    return statistics.median(found)


def cold(paths: Iterable[pathlib.Path]) -> None:
    """Nothing of these files is in memory."""
    for path in paths:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
