"""Processes: too many zombies, processes that stand in the kernel and do not come out, descriptors that run out.

Contract: two probes. `Processes` (node) reads the state of every process once a minute: a thousand processes take 20 ms. One found in
state D in five looks in a row has hung for four minutes. `Descriptors` (run) compares open files with their limits, of the node and of
each worker.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final

from resilient.core.messages import Finding
from resilient_agents.probe import Absent
from resilient_agents.probes import limits, reading

if TYPE_CHECKING:
    from resilient_agents.probe import Surroundings

PROCESSES_MAX: Final = 20_000  # of one look


def parse(stat: str) -> tuple[str, str, str] | None:
    """Name, state and start of a process, of /proc/<pid>/stat; the name may hold anything."""
    begin, end = stat.find("("), stat.rfind(")")
    rest = stat[end + 2 :].split()
    return (stat[begin + 1 : end], rest[0], rest[19]) if 0 <= begin < end and len(rest) > 19 else None


class Processes:
    """All of a node's."""

    name = "processes"
    period_s = limits.D_STATE_PERIOD_S.value
    lasting = True

    def __init__(self, surroundings: Surroundings) -> None:
        """Raises Absent without /proc."""
        self.period_s = limits.D_STATE_PERIOD_S.value  # as it is by now: a policy file may have changed it
        self._tree = surroundings.path("/proc")
        if not reading.names(self._tree):
            raise Absent(f"{self._tree}: nothing to read")
        self._stuck: dict[tuple[str, str], int] = {}  # (pid, start) -> looks in a row

    def check(self, now: float) -> list[Finding]:
        """Who is stuck."""
        del now
        zombies, stuck, findings = 0, {}, []
        for pid in [name for name in reading.names(self._tree) if name.isdigit()][:PROCESSES_MAX]:
            seen = parse(reading.text(f"{self._tree}/{pid}/stat") or "")
            if seen is None:
                continue
            name, state, start = seen
            zombies += state == "Z"
            if state != "D" or not reading.text(f"{self._tree}/{pid}/cmdline"):  # threads of the kernel wait in D as a habit
                continue
            times = stuck[pid, start] = self._stuck.get((pid, start), 0) + 1
            if times >= limits.D_STATE_TIMES.value:
                text = f"process {pid} ({name}) has stood in the kernel (state D) in {times} looks, {self.period_s:.0f} s apart"
                findings.append(
                    Finding(seq=0, kind="hung-task", layer="process", code="D", device=f"pid:{pid}", class_="replace", text=text)
                )
        self._stuck = stuck
        if zombies >= limits.ZOMBIES.value:
            text = f"{zombies} zombies: somebody does not collect the processes that it starts"
            findings.append(Finding(seq=0, kind="zombies", layer="process", class_="ignore", role="context", text=text))
        return findings


def open_files_max(lines: list[str]) -> int | None:
    """Of /proc/<pid>/limits; None = unlimited, or not said."""
    for line in lines:
        if line.startswith("Max open files"):
            soft = line[len("Max open files") :].split()[:1]
            return int(soft[0]) if soft and soft[0].isdigit() else None
    return None


class Descriptors:
    """Of the node and of the workers."""

    name = "descriptors"
    period_s = 15.0
    scope = "run"
    lasting = True

    def __init__(self, surroundings: Surroundings) -> None:
        """Raises Absent without /proc."""
        self._surroundings = surroundings
        if reading.text(surroundings.path("/proc/sys/fs/file-nr")) is None:
            raise Absent(f"{surroundings.path('/proc/sys/fs/file-nr')}: nothing to read")

    def check(self, now: float) -> list[Finding]:
        """Who is near a limit."""
        del now
        findings = []
        words = (reading.text(self._surroundings.path("/proc/sys/fs/file-nr")) or "").split()
        if len(words) == 3 and all(word.isdigit() for word in words) and int(words[0]) > limits.FILES_SHARE.value * int(words[2]):
            findings.append(_fact("file-max", "", f"{words[0]} of {words[2]} files of this node are open"))
        for worker in self._surroundings.roster().workers:
            path = self._surroundings.path(f"/proc/{worker.pid}")
            limit = open_files_max(reading.lines(f"{path}/limits")) if worker.alive and worker.pid else None
            if limit is None:
                continue
            count = _entries(f"{path}/fd")
            if count > limits.WORKER_FILES_SHARE.value * limit:
                text = f"{worker.worker} (rank {worker.rank}, pid {worker.pid}) has {count} of its {limit} files open"
                findings.append(_fact("RLIMIT_NOFILE", f"pid:{worker.pid}", text, worker.rank))
        return findings


def _entries(path: str) -> int:
    try:
        return os.stat(path).st_size or len(os.listdir(path))  # since Linux 6.2 the size of fd/ is how many there are
    except OSError:
        return 0


def _fact(code: str, device: str, text: str, rank: int = -1) -> Finding:
    return Finding(
        seq=0, kind="fd-limit", layer="process", code=code, device=device, rank=rank, class_="app-restart", role="context", text=text
    )
