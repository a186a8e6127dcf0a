"""Local: files in a directory, written and read past what training has in memory.

Think of the back door of a warehouse: goods that nobody will ask for soon are not carried through the shop.

Contract: as Output (output.py) and Input (storage.py). A file is written under another name, made durable, and renamed.
Numbers: written past the page cache (O_DIRECT), so that nothing of training's memory is pushed out, while the next bytes are hashed: twice
the speed of a buffered write with fsync. What lies in memory as in the file is written from there, for a third of what a copy costs. Beside
training on all cores as fast as a bare loop of O_DIRECT writes, hashing included. Read through the page cache with a wide read-ahead: as
fast as O_DIRECT from two threads (1.6 - 1.9 GB/s where a plain read has 0.8 - 1.2), and it takes any address.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import ctypes
import errno
import mmap
import os
import queue
import secrets
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Final

from resilient.checkpoint.output import put
from resilient.errors import SnapshotCorrupt

BUFFER_BYTES: Final = 8 << 20
_BATCH_BYTES: Final = 32 << 20  # that are lent: a thread of low priority has to be waked for each batch, in the middle of training
_BLOCK: Final = 4096  # what O_DIRECT wants lengths and addresses to be multiples of
_LENT_MIN: Final = 64 << 10  # less than this is copied sooner than its pages are pinned
_VIEWS_MAX: Final = 512  # in one call; Linux takes 1024


def in_the_way(directory: str) -> str:
    """The file that stands where this directory, or one above it, should be; "" if none does."""
    place = directory or "/"
    while not os.path.exists(place):
        place = os.path.dirname(place)
    return "" if os.path.isdir(place) else place


class LocalInput:
    """As `Input`."""

    def __init__(self, path: str) -> None:
        """Raises FileNotFoundError, OSError."""
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self.num_bytes = os.fstat(self._fd).st_size
        os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_SEQUENTIAL)

    def fill(self, view: memoryview, offset: int) -> None:
        """As `Input.fill`."""
        done = 0
        while done < len(view):
            count = os.preadv(self._fd, [view[done : done + BUFFER_BYTES]], offset + done)
            if not count:
                raise SnapshotCorrupt(f"at least {offset + len(view)} bytes expected, {offset + done} found")
            done += count

    def close(self) -> None:
        """Once."""
        os.close(self._fd)


@contextlib.contextmanager
def writing(path: str) -> Iterator[LocalOutput]:
    """A new file, in place when the block ends without an exception; that ends with `finish`."""
    directory = os.path.dirname(path)
    os.makedirs(directory, exist_ok=True)
    spare = f"{path}.{secrets.token_hex(4)}.part"  # a write that was given up, and hangs, may still be at its own
    output = LocalOutput(spare)
    try:
        yield output
        os.replace(spare, path)
    finally:
        output.close()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(spare)
    for changed in (directory, os.path.dirname(directory)):
        _sync_directory(changed)


class LocalOutput:
    """As `Output`. While a thread writes one batch, the next one is gathered: what was put into a buffer, and pages that were lent."""

    def __init__(self, path: str) -> None:
        """Raises OSError."""
        self.position = 0
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        try:
            self._fd = os.open(path, flags | os.O_DIRECT, 0o666)
        except OSError as error:
            if error.errno != errno.EINVAL:  # a file system that has no O_DIRECT (tmpfs)
                raise
            self._fd = os.open(path, flags, 0o666)
        self._memory = mmap.mmap(-1, 2 * BUFFER_BYTES)
        self._halves = [memoryview(self._memory)[i * BUFFER_BYTES : (i + 1) * BUFFER_BYTES] for i in range(2)]
        self._used = self._taken = 0  # of the first half: filled, and in `_batch` already
        self._batch: list[memoryview] = []  # what follows `_begin` in the file, in whole blocks
        self._begin = 0
        self._writer = _Writer(self._fd)

    def room(self, wanted: int) -> memoryview:
        """As `Output.room`."""
        return self._halves[0][self._used : self._used + wanted]

    def filled(self, count: int) -> None:
        """As `Output.filled`."""
        self.position += count
        self._used += count
        if self._used == BUFFER_BYTES:
            self._flush()

    def lend(self, view: memoryview) -> None:
        """As `Output.lend`. Whole blocks that lie in memory as in the file are written from there, the others are copied."""
        edge = -self.position % _BLOCK
        inside = (len(view) - edge) // _BLOCK * _BLOCK
        if inside < _LENT_MIN or (_address(view) + edge) % _BLOCK:
            put(self, view)
            return
        put(self, view[:edge])
        self._gather()
        self._batch.append(view[edge : edge + inside])
        self.position += inside
        if self.position - self._begin >= _BATCH_BYTES:
            self._flush()
        put(self, view[edge + inside :])

    def finish(self) -> None:
        """Write what is left, cut to the true length, make it durable."""
        whole = -(-self._used // _BLOCK) * _BLOCK
        self._halves[0][self._used : whole] = bytes(whole - self._used)
        self._used = whole
        self._flush()
        self._writer.wait()
        os.ftruncate(self._fd, self.position)
        os.fsync(self._fd)

    def close(self) -> None:
        """Once, whether finished or not."""
        self._writer.close()
        os.close(self._fd)

    def _gather(self) -> None:
        """What was copied goes before what comes. In whole blocks."""
        if self._taken < self._used:
            self._batch.append(self._halves[0][self._taken : self._used])
            self._taken = self._used

    def _flush(self) -> None:
        """Hand on what there is, in whole blocks."""
        self._gather()
        self._writer.write(self._batch, self._begin)
        self._halves.reverse()
        self._batch, self._begin = [], self.position
        self._used = self._taken = 0


class _Writer:
    """A thread that writes one batch at a time."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._under_way: Future[None] | None = None
        self._waiting: queue.SimpleQueue[tuple[Future[None], list[memoryview], int] | None] = queue.SimpleQueue()  # of one at most
        self._thread = threading.Thread(target=self._work, name="writer", daemon=True)  # an executor's would be joined at exit
        self._thread.start()

    def write(self, batch: list[memoryview], offset: int) -> None:
        """When the one before is there. Raises what became of that one."""
        self.wait()
        self._under_way = Future()
        self._waiting.put((self._under_way, batch, offset))

    def wait(self) -> None:
        """For what is under way. Raises OSError."""
        under_way, self._under_way = self._under_way, None
        if under_way is not None:
            under_way.result()  # the lane that runs all this has the deadline (agents/resilient_agents/lane.py)

    def close(self) -> None:
        """Afterwards nothing is being written."""
        if self._under_way is not None:
            concurrent.futures.wait([self._under_way])
        self._waiting.put(None)

    def _work(self) -> None:
        while (job := self._waiting.get()) is not None:
            end, batch, offset = job
            try:
                _write_all(self._fd, batch, offset)
            except OSError as error:
                end.set_exception(error)
            else:
                end.set_result(None)


def _write_all(fd: int, batch: list[memoryview], offset: int) -> None:
    while batch:
        count = os.pwritev(fd, batch[:_VIEWS_MAX], offset)
        offset += count
        while batch and count >= len(batch[0]):
            count -= len(batch.pop(0))
        if count:
            batch[0] = batch[0][count:]


class _View(ctypes.Structure):
    """Py_buffer: ctypes gives addresses of writable memory only."""

    _fields_ = (
        ("buf", ctypes.c_void_p),
        ("obj", ctypes.py_object),
        ("sizes", ctypes.c_ssize_t * 2),
        ("flags", ctypes.c_int * 2),
        ("others", ctypes.c_void_p * 5),
    )


def _address(view: memoryview) -> int:
    """Where it lies."""
    found = _View()
    ctypes.pythonapi.PyObject_GetBuffer(ctypes.py_object(view), ctypes.byref(found), 0)
    address = int(found.buf or 0)
    ctypes.pythonapi.PyBuffer_Release(ctypes.byref(found))
    return address


def _sync_directory(path: str) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
