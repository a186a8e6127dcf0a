"""Limits: what the system allows a process that is started as we are.

Think of the sign at the door of a lift, read before the furniture is carried in.

Contract: reads only. File descriptors: each rank holds one or more for every peer. Locked memory: without it RDMA and pinned memory fail
late, with a strange message. Processes: data loaders are processes. The rest is told: it is missed when somebody looks for a core file.
"""

from __future__ import annotations

import os
import resource
from typing import TYPE_CHECKING, Final

from resilient_agents.check import Reading, grade

if TYPE_CHECKING:
    from resilient_agents.check import Patient

FILES_MIN: Final = 4096  # ulimit -n; 1024 is many systems' default, and too few for a world of some hundred ranks
FILES_LEAST: Final = 256
PROCESSES_MIN: Final = 4096


class Limits:
    """Of this process, which its children inherit."""

    def __init__(self, patient: Patient) -> None:
        """`patient.root`: where /proc and /sys are."""
        self._patient = patient

    def run(self) -> list[Reading]:
        """Read them."""
        rdma = os.path.isdir(self._patient.path("/sys/class/infiniband")) and bool(os.listdir(self._patient.path("/sys/class/infiniband")))
        return [
            files(resource.getrlimit(resource.RLIMIT_NOFILE)[0]),
            locked(resource.getrlimit(resource.RLIMIT_MEMLOCK)[0], rdma=rdma),
            processes(resource.getrlimit(resource.RLIMIT_NPROC)[0]),
            Reading(what="core size", layer="os", value=_shown(resource.getrlimit(resource.RLIMIT_CORE)[0])),
            *self._told("core pattern", "/proc/sys/kernel/core_pattern"),
            Reading(what="processors", layer="os", value=f"{len(os.sched_getaffinity(0))} of {os.cpu_count()}"),
        ]

    def _told(self, what: str, path: str) -> list[Reading]:
        try:
            with open(self._patient.path(path), encoding="utf-8", errors="replace") as file:
                return [Reading(what=what, layer="os", value=file.read(200).strip())]
        except OSError:
            return []


def files(limit: int) -> Reading:
    """ulimit -n."""
    few = 0 <= limit < FILES_MIN
    state = grade(fail=0 <= limit < FILES_LEAST, warn=few)
    text = "raise it: ulimit -n 65536, LimitNOFILE= in a systemd unit, --ulimit nofile= for docker" if few else ""
    return Reading(what="open files", layer="os", state=state, value=_shown(limit), expected=f">= {FILES_MIN}", text=text)


def locked(limit: int, *, rdma: bool) -> Reading:
    """ulimit -l. rdma: there is a card whose memory must be locked."""
    short = rdma and limit != resource.RLIM_INFINITY
    text = "RDMA locks what it sends from: ulimit -l unlimited, --ulimit memlock=-1 for docker" if short else ""
    expected = "unlimited" if rdma else ""
    return Reading(what="locked memory", layer="os", state=grade(warn=short), value=_shown(limit, "bytes"), expected=expected, text=text)


def processes(limit: int) -> Reading:
    """ulimit -u."""
    few = 0 <= limit < PROCESSES_MIN
    return Reading(what="processes", layer="os", state=grade(warn=few), value=_shown(limit), expected=f">= {PROCESSES_MIN}")


def _shown(limit: int, unit: str = "") -> str:
    return "unlimited" if limit in {-1, resource.RLIM_INFINITY} else f"{limit} {unit}".strip()
