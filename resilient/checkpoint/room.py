"""Room: how many bytes of memory may still be taken, and which limit is met first.

Think of a lift: a plate tells how many people may enter and another one how many kilograms; who wants to know whether the piano fits
reads both. A full tmpfs says so; a container that goes past its memory limit is killed without a word, and shared memory counts.

Contract: of a directory in memory (tmpfs) the least of what its file system, the machine and every memory cgroup above this process
have left counts; of one on a disk the file system alone. What the kernel can drop (page cache) counts as free, and so does swap for the
machine. A limit that cannot be read is none. Costs half a millisecond. An answer is out of date when it is given: ask again on the way.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

_MEMORY_FILE_SYSTEMS: Final = ("tmpfs", "ramfs")
_V1: Final = ("sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", ("total_inactive_file", "total_active_file"))
_V2: Final = ("sys/fs/cgroup", "memory.max", "memory.current", ("inactive_file", "active_file", "slab_reclaimable"))
_V2_BESIDE_V1: Final = ("sys/fs/cgroup/unified", *_V2[1:])


class Room(NamedTuple):
    """Bytes left under one limit."""

    num_bytes: int
    where: str
    cure: str


def left(directory: Path | str, root: Path | str = "/") -> Room:
    """The least of all that count. `root`: where proc and sys are. Raises OSError if there is no such directory."""
    found = os.statvfs(directory)
    cure = f"enlarge it (mount -o remount,size=... {directory}) or name another place with --memory-dir DIR"
    rooms = [Room(found.f_bavail * found.f_frsize, f"in {directory}", cure)]
    if _lies_in_memory(directory, Path(root)):
        rooms += [*_of_machine(Path(root)), *_of_cgroups(Path(root))]
    return min(rooms, key=lambda room: room.num_bytes)


def _lies_in_memory(directory: Path | str, root: Path) -> bool:
    device = os.stat(directory).st_dev
    name = f"{os.major(device)}:{os.minor(device)}"
    for line in _lines(root / "proc/self/mountinfo"):
        before, _, after = line.partition(" - ")
        if before.split()[2] == name:
            return after.split()[0] in _MEMORY_FILE_SYSTEMS
    return False


def _of_machine(root: Path) -> Iterator[Room]:
    rows = dict(line.split()[:2] for line in _lines(root / "proc/meminfo"))
    if "MemAvailable:" in rows:
        free = (int(rows["MemAvailable:"]) + int(rows.get("SwapFree:", "0"))) << 10
        yield Room(free, "of this machine's memory", "shard the state over more nodes, or name a directory on a disk with --memory-dir DIR")


def _of_cgroups(root: Path) -> Iterator[Room]:
    """Every level counts. In a container the names of the upper ones may be hidden: what is there is looked at."""
    for line in _lines(root / "proc/self/cgroup"):
        number, controllers, path = line.split(":", 2)
        kinds = (_V1,) if "memory" in controllers.split(",") else (_V2, _V2_BESIDE_V1) if number == "0" else ()
        for mount, limit, used, droppable in kinds:
            names = [name for name in path.split("/") if name]
            for depth in range(len(names) + 1):
                yield from _of_cgroup(root.joinpath(mount, *names[:depth]), limit, used, droppable)


def _of_cgroup(group: Path, limit: str, used: str, droppable: tuple[str, ...]) -> Iterator[Room]:
    most, now = "".join(_lines(group / limit)), "".join(_lines(group / used))
    if not most.isdigit() or not now.isdigit():
        return  # "max", or none
    dropped = sum(int(count) for name, count in (line.split() for line in _lines(group / "memory.stat")) if name in droppable)
    cure = (
        "raise the container's memory limit (docker --memory, Kubernetes resources.limits.memory, Slurm --mem): shared memory counts there"
    )
    yield Room(max(int(most) - int(now) + dropped, 0), f"below the limit of {most} bytes in {group / limit}", cure)


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []  # not there, or not for us
