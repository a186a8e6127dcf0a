"""Local: files in a directory, written and read past what training has in memory.

Think of the back door of a warehouse: goods that nobody will ask for soon are not carried through the shop.

Contract: as Output and Input (storage.py). A file is written under another name, made durable, and renamed.
Numbers: written past the page cache (O_DIRECT) from two buffers in turn, so that nothing of training's memory is pushed out and reading the
source overlaps with the disk: twice the speed of a buffered write with fsync. Read through the page cache with a wide read-ahead: as fast
as O_DIRECT from two threads (1.6 - 1.9 GB/s where a plain read has 0.8 - 1.2), and it takes any address.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import errno
import mmap
import os
import secrets
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Final

from resilient.errors import SnapshotCorrupt

BUFFER_BYTES: Final = 8 << 20
_BLOCK: Final = 4096  # what O_DIRECT wants lengths and addresses to be multiples of


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
    """As `Output`, with two buffers: one is filled while a thread writes the other."""

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
        self._used = 0
        self._under_way: Future[None] | None = None

    def room(self, wanted: int) -> memoryview:
        """As `Output.room`."""
        return self._halves[0][self._used : self._used + wanted]

    def filled(self, count: int) -> None:
        """As `Output.filled`."""
        self.position += count
        self._used += count
        if self._used == BUFFER_BYTES:
            self._flush(BUFFER_BYTES)

    def finish(self) -> None:
        """Write what is left, cut to the true length, make it durable."""
        whole = -(-self._used // _BLOCK) * _BLOCK
        self._halves[0][self._used : whole] = bytes(whole - self._used)
        if whole:
            self._flush(whole)
        self._wait()
        os.ftruncate(self._fd, self.position)
        os.fsync(self._fd)

    def close(self) -> None:
        """Once, whether finished or not."""
        if self._under_way is not None:
            concurrent.futures.wait([self._under_way])
        os.close(self._fd)

    def _flush(self, count: int) -> None:
        self._wait()
        start = self.position - self._used
        self._under_way = Future()
        work = (self._under_way, self._fd, self._halves[0][:count], start)
        threading.Thread(target=_write_all, args=work, daemon=True).start()  # an executor's would be joined at exit
        self._halves.reverse()
        self._used = 0

    def _wait(self) -> None:
        under_way, self._under_way = self._under_way, None
        if under_way is not None:
            under_way.result()  # the lane that runs all this has the deadline (agents/resilient_agents/lane.py)


def _write_all(end: Future[None], fd: int, view: memoryview, offset: int) -> None:
    done = 0
    try:
        while done < len(view):
            done += os.pwrite(fd, view[done:], offset + done)
    except OSError as error:
        end.set_exception(error)
    else:
        end.set_result(None)


def _sync_directory(path: str) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
