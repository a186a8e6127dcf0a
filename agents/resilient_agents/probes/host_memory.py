"""Host memory: processes that the kernel has killed for want of memory, and a node or a cgroup that is about to.

Contract: two probes. `HostMemory` (node) reads /proc/meminfo and /proc/vmstat; `Cgroup` (run) reads what the workers' own cgroup counts
(memory.events and pids.events of version 2, memory.oom_control and pids.max of version 1), which says "it was us" where /proc/vmstat only
says "somebody". The first reading of a counter is its zero. Who was killed stands in the kernel log; here it is context, and a proof where
that log is closed to us.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from resilient.core.messages import Finding
from resilient_agents.probe import Absent
from resilient_agents.probes import limits, reading
from resilient_agents.probes.deltas import Deltas

if TYPE_CHECKING:
    from resilient_agents.probe import Surroundings

KIB: Final = 1024
FOR_GOOD_S: Final = 1e9
KILLS: Final = ("oom_kill", "oom_group_kill")


class HostMemory:
    """The node's memory."""

    name = "host-memory"
    period_s = 5.0

    def __init__(self, surroundings: Surroundings) -> None:
        """Raises Absent without /proc."""
        self._meminfo, self._vmstat = surroundings.path("/proc/meminfo"), surroundings.path("/proc/vmstat")
        if not reading.pairs(self._meminfo) and not reading.pairs(self._vmstat):
            raise Absent(f"{self._meminfo}: nothing to read")
        self._kills = Deltas(FOR_GOOD_S)
        self.check(0.0)

    def check(self, now: float) -> list[Finding]:
        """Kills since the last call, and whether memory is short."""
        findings = []
        kills = reading.pairs(self._vmstat).get("oom_kill")
        if kills is not None and (grown := self._kills.step("oom_kill", kills, now)):
            text = f"the kernel killed {grown} process(es) of this node for want of memory"
            findings.append(Finding(seq=0, kind="oom-detail", layer="host-mem", class_="ignore", role="context", count=grown, text=text))
        free = reading.pairs(self._meminfo).get("MemAvailable")
        if free is not None and free * KIB < limits.MEMORY_FREE_BYTES.value:
            text = f"{free} KiB of this node's memory are available"
            findings.append(Finding(seq=0, kind="memory-low", layer="host-mem", class_="ignore", role="context", text=text))
        return findings


def cgroups(text: str) -> dict[str, str]:
    """Controller -> path, of /proc/<pid>/cgroup; version 2 is the controller ""."""
    found: dict[str, str] = {}
    for line in text.splitlines():
        parts = line.split(":", 2)
        if len(parts) == 3:
            found |= dict.fromkeys(parts[1].split(","), parts[2])
    return found


class Cgroup:
    """The cgroup in which the agent and its workers are."""

    name = "cgroup"
    period_s = 1.0
    scope = "run"

    def __init__(self, surroundings: Surroundings) -> None:
        """Raises Absent where nothing is counted."""
        paths = cgroups(reading.text(surroundings.path("/proc/self/cgroup")) or "")
        tree = surroundings.path("/sys/fs/cgroup")
        memory = [(f"{tree}{paths.get('', '')}", "memory.events"), (f"{tree}/unified{paths.get('', '')}", "memory.events")]
        memory += [(f"{tree}/memory{paths.get('memory', '')}", "memory.oom_control"), (f"{tree}/memory", "memory.oom_control")]
        memory.append((tree, "memory.events"))  # in a container its own cgroup is the root of the tree
        pids = [f"{tree}{paths.get('', '')}", f"{tree}/pids{paths.get('pids', '')}", f"{tree}/pids", tree]
        self._memory = next((f"{path}/{file}" for path, file in memory if "oom_kill" in reading.pairs(f"{path}/{file}")), "")
        self._pids = next((path for path in pids if reading.number(f"{path}/pids.current") is not None), "")
        if not self._memory and not self._pids:
            raise Absent(f"{tree}: neither memory nor processes of our own cgroup are counted")
        self.note = ", ".join(filter(None, (self._memory, self._pids)))
        self._counts = Deltas(FOR_GOOD_S)
        self.check(0.0)

    def check(self, now: float) -> list[Finding]:
        """Kills and refused forks since the last call."""
        findings = []
        kills = reading.pairs(self._memory).get("oom_kill") if self._memory else None
        if kills is not None and (grown := self._counts.step("oom_kill", kills, now)):
            text = f"the kernel killed {grown} process(es) of this run's cgroup for want of memory ({self._memory})"
            findings.append(_fact("oom-host", "host-mem", "memcg", text, grown))
        if self._pids:
            refused = reading.pairs(f"{self._pids}/pids.events").get("max")
            if refused is not None and (grown := self._counts.step("pids", refused, now)):
                findings.append(_fact("pid-limit", "process", "pids.max", f"{grown} fork(s) were refused: {self._pids}/pids.max", grown))
        return findings


def _fact(kind: str, layer: str, code: str, text: str, count: int) -> Finding:
    return Finding(seq=0, kind=kind, layer=layer, code=code, class_="app-restart", role="context", count=count, text=text)
