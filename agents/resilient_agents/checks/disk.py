"""Disk: whether what is written to the places of a run is there afterwards, and is what was written; and whether there is room.

Think of a test page from the printer, held against the original.

Contract: in each place (the run's directory, the checkpoints', the temporary one; the nearest directory above it that exists) a file of
random bytes is written, fsynced, put out of the page cache, read back and compared; the same past the cache (O_DIRECT) where the file
system can. The file has no name anybody could meet, and is gone afterwards. Free space and inodes by others' rules (gpud: 10 %, 500 MB).
A place that hangs hangs this check, and its deadline tells. A URL is not looked at.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import tempfile
import time
from typing import TYPE_CHECKING, Final

from resilient_agents.check import Reading, grade
from resilient_agents.probe import Absent

if TYPE_CHECKING:
    from resilient_agents.check import Patient

FREE_MIN: Final = 500 << 20
FREE_SHARE: Final = 0.1
INODES_MIN: Final = 1000
LONG_S: Final = 3.0  # a slow disk is known by then
_PIECE: Final = 4 << 20
_SYNC_EVERY: Final = 4  # pieces
_SMALL, _LARGE = 16 << 20, 256 << 20


class Disk:
    """The places that a run writes to."""

    timeout_s = 20.0
    alone = True

    def __init__(self, patient: Patient) -> None:
        """Raises Absent if none of them is a directory."""
        self._num_bytes = _SMALL if patient.quick else _LARGE
        self._places = [(name, directory) for name, path in patient.places if "://" not in path and (directory := nearest(path))]
        if not self._places:
            raise Absent("no directory among the places of the run")

    def run(self) -> list[Reading]:
        """Write, read, compare, in one place after the other; what lies on one file system is looked at once."""
        readings, seen = [], set()
        for name, directory in self._places:
            device = os.stat(directory).st_dev
            if device in seen:
                readings.append(
                    Reading(what=name, layer="storage", state="skipped", text=f"{directory}: on a file system already looked at")
                )
                continue
            seen.add(device)
            readings += [room(name, directory), *self._place(name, directory)]
        return readings

    def _place(self, name: str, directory: str) -> list[Reading]:
        found = os.statvfs(directory)
        num_bytes = min(self._num_bytes, found.f_bavail * found.f_frsize // 4 // _PIECE * _PIECE)
        num_bytes = max(num_bytes, _PIECE)  # where even that has no room, the write says so
        try:
            fd, path = tempfile.mkstemp(prefix=".resilient-doctor.", dir=directory)
            os.unlink(path)
        except OSError as error:
            return [_failed(name, directory, error)]
        try:
            written, read, same = _there_and_back(fd, num_bytes)
        except OSError as error:
            return [_failed(name, directory, error)]
        finally:
            os.close(fd)
        if not same:
            text = f"{directory}: what was read back is not what was written"
            return [Reading(what=f"{name} content", layer="storage", state="fail", value="differs", expected="equal bytes", text=text)]
        return [
            Reading(what=f"{name} content", layer="storage", value="equal bytes", expected="equal bytes"),
            Reading(what=f"{name} write+fsync", layer="storage", number=written, unit="MB/s", better="more"),
            Reading(what=f"{name} read", layer="storage", number=read, unit="MB/s", better="more"),
            *_direct(name, directory, num_bytes),
        ]


def nearest(path: str) -> str:
    """The directory itself, or the nearest above it that exists."""
    path = os.path.abspath(path)
    while not os.path.isdir(path) and path != "/":
        path = os.path.dirname(path)
    return path


def room(name: str, directory: str) -> Reading:
    """Free space and inodes."""
    found = os.statvfs(directory)
    free, whole = found.f_bavail * found.f_frsize, found.f_blocks * found.f_frsize
    short = free < FREE_MIN or (found.f_files > 0 and found.f_favail < INODES_MIN)
    little = whole > 0 and free < FREE_SHARE * whole
    inodes = f", {found.f_favail} inodes" if found.f_files else ""
    return Reading(
        what=f"{name} room",
        layer="storage",
        state=grade(fail=short, warn=little),
        value=f"{free / 1e9:.1f} GB, {free / max(whole, 1):.0%}{inodes}",
        expected=f">= {FREE_MIN >> 20} MiB, {FREE_SHARE:.0%}, {INODES_MIN} inodes",
        text=f"{directory}: make room, or name another place" if short or little else "",
    )


def _there_and_back(fd: int, num_bytes: int) -> tuple[float, float, bool]:
    """MB/s to write and sync, to read, and whether it was the same. A slow disk is given less."""
    pieces = [os.urandom(_PIECE) for _ in range(2)]
    began = time.monotonic()
    for at in range(0, num_bytes, _PIECE):
        rest = memoryview(pieces[at // _PIECE % 2])
        while rest:
            rest = rest[os.write(fd, rest) :]
        if (at // _PIECE) % _SYNC_EVERY == 0:
            os.fdatasync(fd)
            if time.monotonic() - began > LONG_S:
                num_bytes = at + _PIECE
                break
    os.fsync(fd)
    written = time.monotonic()
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    os.lseek(fd, 0, os.SEEK_SET)
    same, at, reading_s = True, 0, 0.0
    while at < num_bytes:
        since = time.monotonic()
        data = os.pread(fd, _PIECE, at)
        reading_s += time.monotonic() - since
        piece = pieces[at // _PIECE % 2]
        same = same and bool(data) and data == piece[at % _PIECE : at % _PIECE + len(data)]
        at += len(data) or num_bytes
    return _rate(num_bytes, written - began), _rate(num_bytes, reading_s), same


def _direct(name: str, directory: str, num_bytes: int) -> list[Reading]:
    """Past the page cache, where the file system can."""
    path = os.path.join(directory, f".resilient-doctor.{os.getpid()}.{time.monotonic_ns()}")
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_DIRECT, 0o600)
    except OSError as error:
        with contextlib.suppress(OSError):
            os.unlink(path)
        return [Reading(what=f"{name} direct write", layer="storage", state="absent", text=f"O_DIRECT: {error.strerror}")]
    try:
        os.unlink(path)
        with mmap.mmap(-1, _PIECE) as piece:  # aligned to a page
            piece.write(os.urandom(_PIECE))
            began = time.monotonic()
            done = 0
            while done < num_bytes and time.monotonic() - began < LONG_S:
                done += os.write(fd, piece)
            speed = _rate(done, time.monotonic() - began)
        return [Reading(what=f"{name} direct write", layer="storage", number=speed, unit="MB/s", better="more")]
    except OSError as error:
        if error.errno == errno.EINVAL:
            return [Reading(what=f"{name} direct write", layer="storage", state="absent", text="O_DIRECT: not as large a block as ours")]
        return [_failed(name, directory, error)]
    finally:
        os.close(fd)


def _failed(name: str, directory: str, error: OSError) -> Reading:
    return Reading(
        what=f"{name} content", layer="storage", state="fail", value=error.strerror or str(error), expected="a file", text=directory
    )


def _rate(num_bytes: int, seconds: float) -> float:
    return num_bytes / 1e6 / max(seconds, 1e-9)
