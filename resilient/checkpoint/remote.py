"""Remote: files on object stores and other places behind fsspec, in parts of which several are under way at a time.

Think of moving house with a few vans instead of one: the boxes are numbered, arrive in any order, and the door is locked when all are in.

Contract: as Output (output.py) and Input (storage.py). On s3 a file appears when its last part is there and the upload is completed; what
was begun and not completed is taken back, or, where the process was killed, left to the bucket's rule for incomplete uploads. Memory: PARTS
parts while writing, twice that while reading. Waits end by the driver's own timeouts.
Numbers: one connection to an object store carries about 100 MB/s, whatever stands behind it. S3 takes at most 10,000 parts, so parts of a
file that is announced as large are larger.
Rejected: fsspec's file objects for s3 (one part at a time, and no more than 10,000 of them); several files per rank (everything that reads
them would have to know).
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any, Final

from fsspec.spec import AbstractBufferedFile

from resilient.checkpoint.output import put
from resilient.errors import SnapshotCorrupt

PARTS: Final = 6  # being sent or fetched at a time
PART_BYTES: Final = 8 << 20
_GAP_MAX: Final = 64 << 10  # what lies between two tensors of a rank file: more than this, and the reader goes elsewhere
_PARTS_MAX: Final = 9_000  # s3 takes 10,000; the announced size need not be exact


@contextlib.contextmanager
def writing(fs: Any, path: str, about_bytes: int, failures: tuple[type[Exception], ...]) -> Iterator[Parts | Whole]:
    """A new file, in place when the block ends without an exception; that ends with `finish`. failures: what the driver raises."""
    part_bytes = max(PART_BYTES, about_bytes // _PARTS_MAX)
    output: Parts | Whole = Parts(fs, path, part_bytes) if hasattr(fs, "call_s3") else Whole(fs, path, part_bytes)
    try:
        yield output
        output.place()
    except BaseException:
        with contextlib.suppress(*failures):  # the first error is the one to be told
            output.discard()
        raise


class Parts:
    """A multi-part upload to s3."""

    def __init__(self, fs: Any, path: str, part_bytes: int) -> None:
        """Nothing is sent before a part is full."""
        self.position = 0
        self._fs, self._part_bytes = fs, part_bytes
        bucket, key, _ = fs.split_path(path)
        self._where = {"Bucket": bucket, "Key": key}
        self._upload = ""
        self._buffer = bytearray(part_bytes)
        self._used = 0
        self._spare: list[bytearray] = []
        self._sent: list[dict[str, Any]] = []
        self._under_way: deque[tuple[bytes | bytearray, Future[dict[str, Any]]]] = deque()

    def room(self, wanted: int) -> memoryview:
        """As `Output.room`."""
        return memoryview(self._buffer)[self._used : self._used + wanted]

    def filled(self, count: int) -> None:
        """As `Output.filled`."""
        self.position += count
        self._used += count
        if self._used == self._part_bytes:
            self._send(self._buffer)
            self._buffer = self._spare.pop() if self._spare else bytearray(self._part_bytes)

    def lend(self, view: memoryview) -> None:
        """As `Output.lend`: copied, for a part that fails is sent again."""
        put(self, view)

    def finish(self) -> None:
        """As `Output.finish`."""
        if self._upload and self._used:
            self._send(bytes(memoryview(self._buffer)[: self._used]))
        while self._under_way:
            self._land()

    def place(self) -> None:
        """Complete the file."""
        if self._upload:
            self._fs.call_s3("complete_multipart_upload", **self._where, UploadId=self._upload, MultipartUpload={"Parts": self._sent})
        else:
            self._fs.call_s3("put_object", **self._where, Body=bytes(memoryview(self._buffer)[: self._used]))

    def discard(self) -> None:
        """Take back what was sent."""
        for _, part in self._under_way:
            part.cancel()
        if self._upload:
            self._fs.call_s3("abort_multipart_upload", **self._where, UploadId=self._upload)

    def _send(self, data: bytes | bytearray) -> None:
        if not self._upload:
            self._upload = _word(self._fs.call_s3("create_multipart_upload", **self._where), "UploadId")
        if len(self._under_way) >= PARTS - 1:
            self._land()
        number = len(self._sent) + len(self._under_way) + 1
        work = self._fs._call_s3("upload_part", **self._where, UploadId=self._upload, PartNumber=number, Body=data)  # noqa: SLF001 - s3fs's async form
        self._under_way.append((data, asyncio.run_coroutine_threadsafe(work, self._fs.loop)))
        self._used = 0

    def _land(self) -> None:
        data, part = self._under_way.popleft()
        self._sent.append({"PartNumber": len(self._sent) + 1, "ETag": _word(part.result(), "ETag")})
        if isinstance(data, bytearray):
            self._spare.append(data)


def _word(answer: dict[str, Any], name: str) -> str:
    if name not in answer:
        raise OSError(f"s3: an answer with {name} expected, {sorted(answer)} found")
    return str(answer[name])


class Whole:
    """A file as the driver writes it, one part after the other."""

    def __init__(self, fs: Any, path: str, part_bytes: int) -> None:
        """Opened at once."""
        self.position = 0
        try:
            self._file = fs.open(path, "wb", block_size=part_bytes)
        except FileNotFoundError:  # a place with real directories
            fs.makedirs(fs._parent(path), exist_ok=True)  # noqa: SLF001 - fsspec's own arithmetic of paths
            self._file = fs.open(path, "wb", block_size=part_bytes)
        self._buffer = memoryview(bytearray(PART_BYTES))
        self._used = 0

    def room(self, wanted: int) -> memoryview:
        """As `Output.room`."""
        return self._buffer[self._used : self._used + wanted]

    def filled(self, count: int) -> None:
        """As `Output.filled`."""
        self.position += count
        self._used += count
        if self._used == len(self._buffer):
            self._flush()

    def lend(self, view: memoryview) -> None:
        """As `Output.lend`: copied, for a part that fails is sent again."""
        put(self, view)

    def finish(self) -> None:
        """As `Output.finish`."""
        self._flush()

    def place(self) -> None:
        """Complete the file."""
        self._file.close()

    def discard(self) -> None:
        """Do not complete it. Where half of it has a name already, it stays: removing it could hit a successor's."""
        if isinstance(self._file, AbstractBufferedFile):
            self._file.closed = True  # else the garbage collector would complete the upload
            self._file.discard()
        else:
            self._file.close()

    def _flush(self) -> None:
        self._file.write(bytes(self._buffer[: self._used]))
        self._used = 0


class RemoteInput:
    """As `Input`. What is read in order is read ahead, in pieces that are fetched at the same time."""

    def __init__(self, fs: Any, path: str) -> None:
        """Nothing is read yet. Raises FileNotFoundError."""
        self._fs, self._path = fs, path
        self.num_bytes = int(fs.size(path))
        self._ahead, self._ahead_at = memoryview(b""), 0
        self._next = -1  # where the last read ended

    def fill(self, view: memoryview, offset: int) -> None:
        """As `Input.fill`."""
        if offset + len(view) > self.num_bytes:
            raise SnapshotCorrupt(f"at least {offset + len(view)} bytes expected, {self.num_bytes} found")
        in_order, self._next = 0 <= offset - self._next < _GAP_MAX, offset + len(view)
        while view:
            at = offset - self._ahead_at
            if not 0 <= at < len(self._ahead):
                self._fetch(offset, PARTS * PART_BYTES if in_order else len(view))
                at = 0
            count = min(len(view), len(self._ahead) - at)
            view[:count] = self._ahead[at : at + count]
            view, offset = view[count:], offset + count

    def close(self) -> None:
        """Nothing is open."""

    def _fetch(self, offset: int, wanted: int) -> None:
        end = min(self.num_bytes, offset + min(wanted, PARTS * PART_BYTES))
        starts = list(range(offset, end, PART_BYTES))
        ends = [min(end, start + PART_BYTES) for start in starts]
        self._ahead = memoryview(b"")
        pieces = self._fs.cat_ranges([self._path] * len(starts), starts, ends, on_error="raise")
        self._ahead, self._ahead_at = memoryview(b"".join(pieces)), offset
        if len(self._ahead) != end - offset:
            raise SnapshotCorrupt(f"bytes {offset} to {end} expected, {len(self._ahead)} of them found")
