"""Memory: the files in /dev/shm that hold a run's state, and who may remove them.

Think of a cloakroom: every coat has a tag with its owner's name. The attendant who opens in the morning looks through the coats left
from yesterday; those whose owner is no longer in the building are cleared away, the others are left alone.

Contract: a segment is `resilient.<key>.<what>` with key = "<agent pid>-<its start time in clock ticks>-<4 hex digits>", mode 0600, all
of its bytes really there (`posix_fallocate`: a sparse file on a full tmpfs would be a SIGBUS in the training process, later).
`clean_stale` removes the files of owners that are gone: no process of that pid, or one that started at another time. Where the
directory is shared between containers, pids say nothing: so an owner also holds a lock on `resilient.<key>.lock`, and who holds it lives.
Whoever removes a dead owner's files, or takes them over (deed.py), holds that lock meanwhile: of two, one has it.
Rejected: memfd only (dies with the agent, cannot be adopted); POSIX shared memory's Python module (its tracker unlinks behind our back).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import secrets
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final, Self

from resilient.checkpoint import room
from resilient.errors import TierUnavailable

PREFIX: Final = "resilient."
_NAME: Final = re.compile(r"resilient\.(?P<key>\d+-\d+-[0-9a-f]{4})\..+")
_LOCK: Final = "lock"
_LOOK_S: Final = 0.5  # removing a dead owner's files takes less
_ROOM_LEFT: Final = 1 << 20  # of the memory file system: others (torch's store, gloo, NCCL) live there too
_PIECE: Final = 256 << 20  # 0.1 s


def new_key() -> str:
    """A key for the segments of this process: no other process, living or dead, has the same."""
    pid = os.getpid()
    return f"{pid}-{_start_ticks(pid)}-{secrets.token_hex(2)}"


def segment_path(directory: Path | str, key: str, what: str) -> str:
    """Where the segment `what` of the owner `key` lies."""
    return str(Path(directory) / f"{PREFIX}{key}.{what}")


def create(path: str, num_bytes: int, of_bytes: int = 0) -> str:
    """Make a file of `num_bytes` zeros, every page allocated. Returns `path`. `of_bytes`: with others that will be asked for at once.

    Raises TierUnavailable if there is no room or the name is taken; nothing is left behind then. Room is looked at again before every
    piece: several segments grow at the same time, and a container that goes past its limit would not be told, but killed.
    """
    directory, wanted = os.path.dirname(path), max(num_bytes, of_bytes)
    try:
        _check_room(path, wanted)  # ask first: an allocation that fails half-way takes the room from others meanwhile
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise TierUnavailable(f"memory tier: {path}: {error.strerror} (see --memory-dir)") from error
    try:
        for done in range(0, num_bytes, _PIECE):
            _check_room(path, wanted, done)
            os.posix_fallocate(fd, done, min(_PIECE, num_bytes - done))
    except TierUnavailable:
        os.unlink(path)
        raise
    except OSError as error:
        os.unlink(path)
        if error.errno in (errno.ENOSPC, errno.ENOMEM, errno.EDQUOT, errno.EFBIG):
            raise _no_room(path, wanted, room.left(directory)) from None
        raise TierUnavailable(f"memory tier: {path}: {error.strerror}") from error
    finally:
        os.close(fd)
    return path


def remove(path: str) -> None:
    """Unlink; mapped memory stays valid for those who have it. Nothing happens if it is gone already."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


def remove_all(directory: Path | str, key: str, *, but: Callable[[str], bool] = lambda _: False) -> list[str]:
    """Remove every file of the owner `key`, its lock last; the paths removed. but: what is to stay."""
    removed = []
    for path in (segment_path(directory, key, what) for what in segments(directory, key) if not but(what)):
        with contextlib.suppress(FileNotFoundError, PermissionError):  # another user's are left to him
            os.unlink(path)
            removed.append(path)
    return removed


def segments(directory: Path | str, key: str) -> list[str]:
    """All that there is of the owner `key`, in order, its lock last."""
    found = (path.name.removeprefix(f"{PREFIX}{key}.") for path in Path(directory).glob(f"{PREFIX}{key}.*"))
    return sorted(found, key=lambda what: (what == _LOCK, what))


class Claim:
    """As long as this is held, and this process lives, the files of `key` are not stale."""

    def __init__(self, directory: Path | str, key: str, *, fd: int = -1) -> None:
        """Make and lock `resilient.<key>.lock`. fd: of the file, if it is locked already."""
        self.path = segment_path(directory, key, _LOCK)
        self._fd = fd
        if fd < 0:
            self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)

    @classmethod
    def of_dead(cls, directory: Path | str, key: str) -> Self | None:
        """The claim of an owner that is gone; None if it lives, somebody else has the claim, or there never was one."""
        if _runs(key):
            return None
        until = time.monotonic() + _LOOK_S  # somebody may just be looking whether the owner lives: he holds the lock for a moment
        while (fd := _lock(segment_path(directory, key, _LOCK))) is None and time.monotonic() < until:
            time.sleep(0.01)
        return None if fd is None or fd < 0 else cls(directory, key, fd=fd)

    def release(self, *, leave: bool = False) -> None:
        """Give it up and remove the lock file, or `leave` it to an heir. May be called again."""
        if self._fd >= 0:
            if not leave:
                remove(self.path)
            os.close(self._fd)
            self._fd = -1


def owners(directory: Path | str) -> list[str]:
    """The keys of all who have something here, living or dead."""
    found = (_NAME.fullmatch(path.name) for path in Path(directory).glob(f"{PREFIX}*"))
    return sorted({match["key"] for match in found if match is not None})


def clean_stale(directory: Path | str, *, but: Callable[[str], bool] = lambda _: False) -> list[str]:
    """Remove the segments of owners that are gone; the paths removed. Files of other users are left to them. but: keys that are to stay."""
    removed: list[str] = []
    for key in owners(directory):
        if _runs(key) or (fd := _lock(segment_path(directory, key, _LOCK))) is None:
            continue
        if not but(key):
            removed += remove_all(directory, key)
        if fd >= 0:
            os.close(fd)
    return removed


def _runs(key: str) -> bool:
    """Whether the process that made this key can be seen, and lives."""
    pid, start, _ = key.split("-")
    return _start_ticks(int(pid)) == int(start)


def _start_ticks(pid: int) -> int:
    """When the process started, in clock ticks since boot; -1 if there is none, or only its remains."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return -1
    fields = stat.rpartition(b")")[2].split()  # the name before it may hold anything, also ")" and blanks
    return -1 if fields[0] in (b"Z", b"X") else int(fields[19])


def _lock(path: str) -> int | None:
    """The file, locked; -1 if there is none, so that nobody can hold it; None if somebody does, or it is another user's."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return -1
    except PermissionError:
        return None  # not ours to judge
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(fd).st_nlink:
            return fd
    except BlockingIOError:
        pass  # held
    os.close(fd)  # or removed by who held it until now: with it went the rest
    return None


def _check_room(path: str, wanted: int, done: int = 0) -> None:
    found = room.left(os.path.dirname(path))
    if wanted - done + _ROOM_LEFT > found.num_bytes:
        raise _no_room(path, wanted, found._replace(num_bytes=found.num_bytes + done))


def _no_room(path: str, wanted: int, found: room.Room) -> TierUnavailable:
    return TierUnavailable(
        f"memory tier: {wanted} bytes wanted, {found.num_bytes} free {found.where} (for {os.path.basename(path)}); {found.cure}"
    )
