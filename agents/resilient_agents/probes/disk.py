"""Disk: places that are full, or nearly, by bytes and by inodes; and shared memory, where full means a signal and not an error.

Contract: scope "run": the run directory, that of the checkpoints, that of the shared memory, /tmp and /dev/shm. What is nearly full is
counted; what is full is told, as context: it explains why a worker failed, and nobody is restarted for it. A `statvfs` may hang (NFS): the
engine sees to that.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, NamedTuple

from resilient.core.messages import Finding
from resilient_agents.probes import limits

if TYPE_CHECKING:
    from resilient_agents.probe import Surroundings


class Room(NamedTuple):
    """What is left of one file system."""

    path: str
    free: int  # bytes
    size: int
    inodes_free: int
    inodes: int  # 0 = it does not count them
    memory: bool = False  # in memory: a write to a page that is not there is SIGBUS


def judge(room: Room) -> Finding | None:
    """What it means."""
    kind, layer, code = ("shm-full", "host-mem", "shm") if room.memory else ("disk-full", "fs", "ENOSPC")
    device = f"dev:{room.path}"
    full = room.free < (room.size * limits.SHM_FULL_SHARE.value if room.memory else min(limits.DISK_FULL_BYTES.value, room.size / 100))
    if full and room.size:
        text = f"{room.path}: {room.free >> 10} KiB of {room.size >> 20} MiB are free"
        return Finding(seq=0, kind=kind, layer=layer, code=code, device=device, class_="app-restart", role="context", text=text)
    if room.inodes and room.inodes_free < limits.INODES_FULL.value:
        text = f"{room.path}: {room.inodes_free} of {room.inodes} inodes are free"
        return Finding(seq=0, kind=kind, layer=layer, code="inodes", device=device, class_="app-restart", role="context", text=text)
    if not room.memory and room.size and room.free < min(room.size * limits.DISK_LOW_SHARE.value, limits.DISK_LOW_BYTES.value):
        text = f"{room.path}: {room.free >> 20} of {room.size >> 20} MiB are free"
        return Finding(seq=0, kind="disk-low", layer=layer, device=device, class_="ignore", role="context", text=text)
    return None


def room(path: str, shown: str, *, memory: bool) -> Room | None:
    """Of the file system that holds it; None if there is no such place."""
    try:
        found = os.statvfs(path)
    except OSError:
        return None
    free = found.f_bavail if os.geteuid() else found.f_bfree
    return Room(shown, free * found.f_frsize, found.f_blocks * found.f_frsize, found.f_favail, found.f_files, memory)


class Disk:
    """All places that a run needs."""

    name = "disk"
    period_s = 10.0
    scope = "run"
    lasting = True

    def __init__(self, surroundings: Surroundings) -> None:
        """Any node has disks."""
        self._surroundings = surroundings

    def check(self, now: float) -> list[Finding]:
        """Which are full."""
        del now
        roster = self._surroundings.roster()
        places = {  # path -> as it is shown
            **{path: path for path in (roster.run_dir, roster.checkpoint, roster.memory_dir) if path},
            **{self._surroundings.path(path): path for path in ("/tmp", "/dev/shm")},  # noqa: S108 - looked at, not written to
        }
        found = [room(path, shown, memory="/dev/shm" in shown or shown == roster.memory_dir) for path, shown in places.items()]  # noqa: S108
        return [finding for it in found if it is not None and (finding := judge(it)) is not None]
