"""Storage: bytes under a URL, on any place fsspec opens (a directory, s3://, gs://, memory:// ...).

Think of a goods lift: it knows nothing of what is in the crates, only how to bring them up quickly and whether they arrived.

Contract: paths are relative to the URL. A file is there whole or not at all: a local one is written under another name, fsynced, renamed,
and its directory fsynced; an object store shows an object when its upload is complete. Errors of storage are TierUnavailable with the URL;
what is not there is FileNotFoundError. Blocks: whoever must not wait calls it from a thread. Any number of threads at once.
Numbers: local files are written past the page cache (O_DIRECT) from two buffers in turn, so that nothing of training's memory is pushed
out and reading the source overlaps with the disk: twice the speed of a buffered write with fsync. Where that cannot be, as usual.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import errno
import mmap
import os
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any, Final, Protocol

import fsspec
from fsspec.implementations.local import LocalFileSystem
from fsspec.spec import AbstractBufferedFile

from resilient.errors import SnapshotCorrupt, TierUnavailable

BUFFER_BYTES: Final = 8 << 20
_BLOCK: Final = 4096  # what O_DIRECT wants lengths and addresses to be multiples of


class Output(Protocol):
    """A file that is being written, from its start to its end."""

    position: int  # bytes so far

    def room(self, wanted: int) -> memoryview:
        """Memory to be filled, of 1 to `wanted` bytes; then say `filled`."""
        ...

    def filled(self, count: int) -> None:
        """So many bytes of the last `room` are the next ones of the file."""
        ...


def put(output: Output, data: bytes | memoryview) -> None:
    """The next bytes, from memory of one's own."""
    view = memoryview(data).cast("B")
    while view:
        room = output.room(len(view))
        room[:] = view[: len(room)]
        output.filled(len(room))
        view = view[len(room) :]


class Storage:
    """What lies under one URL."""

    def __init__(self, url: str) -> None:
        """Nothing is opened yet but fsspec's own driver. Raises TierUnavailable if there is none for this kind of URL."""
        self.url = url
        try:
            fs, root = fsspec.core.url_to_fs(url)
        except (ImportError, ValueError) as error:
            raise TierUnavailable(f"checkpoint URL {url!r}: {error}") from error
        self._fs: Any = fs
        self._root = str(root).rstrip("/")
        self._local = isinstance(fs, LocalFileSystem)

    def where(self, path: str) -> str:
        """For people."""
        return f"{self._root}/{path}"

    # ------------------------------------------------------------------ writing

    @contextlib.contextmanager
    def writing(self, path: str) -> Iterator[Output]:
        """A new file, in place when the block ends without an exception."""
        with self._answering():
            if self._local:
                with _local(self.where(path)) as output:
                    yield output
            else:
                with self._remote(self.where(path)) as output:
                    yield output

    def write(self, path: str, data: bytes) -> None:
        """A small file."""
        with self.writing(path) as output:
            put(output, data)

    @contextlib.contextmanager
    def _remote(self, path: str) -> Iterator[Output]:
        file = self._fs.open(path, "wb", block_size=BUFFER_BYTES)
        try:
            output = _Remote(file)
            yield output
            output.flush()
        except BaseException:
            if isinstance(file, AbstractBufferedFile):
                file.discard()
                file.closed = True  # else the garbage collector would complete the upload
            raise
        file.close()

    def remove(self, path: str) -> None:
        """Nothing happens if it is not there."""
        with self._answering(), contextlib.suppress(FileNotFoundError):
            self._fs.rm_file(self.where(path))

    def remove_tree(self, path: str) -> None:
        """All below `path`."""
        with self._answering(), contextlib.suppress(FileNotFoundError):
            self._fs.rm(self.where(path), recursive=True)

    # ------------------------------------------------------------------ reading

    def read(self, path: str, start: int = 0, end: int | None = None) -> bytes:
        """Bytes start .. end of a file; fewer if it is shorter."""
        with self._answering():
            data: bytes = self._fs.cat_file(self.where(path), start=start, end=end)
        return data

    @contextlib.contextmanager
    def reading(self, path: str) -> Iterator[Input]:
        """A file, for many reads."""
        with self._answering():
            if self._local:
                fd = os.open(self.where(path), os.O_RDONLY | os.O_CLOEXEC)
                try:
                    yield _LocalInput(fd)
                finally:
                    os.close(fd)
            else:
                yield _RemoteInput(self._fs, self.where(path))

    def size(self, path: str) -> int:
        """Bytes of a file."""
        with self._answering():
            return int(self._fs.size(self.where(path)))

    def exists(self, path: str) -> bool:
        """Whether that file is there."""
        with self._answering():
            return bool(self._fs.exists(self.where(path)))

    def names(self, path: str = "") -> tuple[str, ...]:
        """What lies directly below `path`, none if that is not there."""
        with self._answering():
            self._fs.invalidate_cache()
            try:
                found = self._fs.ls(self.where(path).rstrip("/"), detail=False)
            except FileNotFoundError:
                return ()
        return tuple(sorted(str(name).rstrip("/").rpartition("/")[2] for name in found))

    @contextlib.contextmanager
    def _answering(self) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError:
            raise
        except _failures() as error:
            raise TierUnavailable(f"checkpoint URL {self.url!r}: {str(error) or type(error).__name__}") from error


def _failures() -> tuple[type[Exception], ...]:
    """What a storage that does not answer as it should raises: OSError, and what drivers have of their own, as far as they are loaded."""
    names = (("botocore.exceptions", "BotoCoreError"), ("botocore.exceptions", "ClientError"), ("aiohttp", "ClientError"))
    found = [getattr(sys.modules.get(module), name, None) for module, name in names]
    return OSError, *(kind for kind in found if isinstance(kind, type) and issubclass(kind, Exception))


# --------------------------------------------------------------------------- reading


class Input(Protocol):
    """A file that is there."""

    def fill(self, view: memoryview, offset: int) -> None:
        """Fill `view` from `offset` on. Raises SnapshotCorrupt if the file is too short."""
        ...


class _LocalInput:
    def __init__(self, fd: int) -> None:
        self._fd = fd

    def fill(self, view: memoryview, offset: int) -> None:
        done = 0
        while done < len(view):
            count = os.preadv(self._fd, [view[done : done + BUFFER_BYTES]], offset + done)
            if not count:
                raise _short(offset + len(view), offset + done)
            done += count


class _RemoteInput:
    def __init__(self, fs: Any, path: str) -> None:
        self._fs, self._path = fs, path

    def fill(self, view: memoryview, offset: int) -> None:
        for start in range(0, len(view), BUFFER_BYTES):
            piece = view[start : start + BUFFER_BYTES]
            data = self._fs.cat_file(self._path, start=offset + start, end=offset + start + len(piece))
            if len(data) != len(piece):
                raise _short(offset + len(view), offset + start + len(data))
            piece[:] = data


def _short(wanted: int, found: int) -> SnapshotCorrupt:
    return SnapshotCorrupt(f"at least {wanted} bytes expected, {found} found")


# --------------------------------------------------------------------------- writing


class _Remote:
    def __init__(self, file: Any) -> None:
        self.position = 0
        self._file = file
        self._buffer = memoryview(bytearray(BUFFER_BYTES))
        self._used = 0

    def room(self, wanted: int) -> memoryview:
        return self._buffer[self._used : self._used + wanted]

    def filled(self, count: int) -> None:
        self.position += count
        self._used += count
        if self._used == BUFFER_BYTES:
            self.flush()

    def flush(self) -> None:
        self._file.write(bytes(self._buffer[: self._used]))
        self._used = 0


@contextlib.contextmanager
def _local(path: str) -> Iterator[Output]:
    directory = os.path.dirname(path)
    os.makedirs(directory, exist_ok=True)
    spare = f"{path}.{os.getpid()}.part"
    output = _Local(spare)
    try:
        yield output
        output.finish()
        os.replace(spare, path)
    finally:
        output.close()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(spare)
    for changed in (directory, os.path.dirname(directory)):
        _sync_directory(changed)


class _Local:
    """Two buffers: one is filled while a thread writes the other."""

    def __init__(self, path: str) -> None:
        self.position = 0
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
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
        return self._halves[0][self._used : self._used + wanted]

    def filled(self, count: int) -> None:
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
