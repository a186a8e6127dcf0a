"""NVML tenants: who else has memory on the GPUs that a run uses.

Think of a bath tub that is full although nobody of the family is in it: before anybody calls the plumber, it is worth knowing that the
neighbour is. "CUDA out of memory" is the user's, except where a process of another's, or the remains of a dead worker, hold the memory.

Contract: a finding of class "ignore" and role "context" names pids and megabytes; nothing is decided by it. Told of are processes that
this name space can see and that are neither workers of the run nor their descendants; in a container NVML gives the numbers of the host,
which name nobody here, and then nothing is said. Scope "run".
"""

from __future__ import annotations

import os
from collections.abc import Collection
from typing import Any

from resilient.core.messages import Finding
from resilient_agents.probe import Surroundings
from resilient_agents.probes.nvml import GONE, NOT_FOR_US, TIMEOUT_S, session

SMALL_BYTES = 64 << 20  # a monitor's few megabytes are nobody's trouble
ANCESTORS_MAX = 64  # a limit on the walk up


class Tenants:
    """See the head of this file."""

    name = "nvml-tenants"
    period_s = 30.0
    scope = "run"
    lasting = True
    timeout_s = TIMEOUT_S

    def __init__(self, surroundings: Surroundings) -> None:
        """Raises Absent where there is no GPU."""
        self.surroundings = surroundings
        self.session = session(surroundings)
        self.nvml = self.session.nvml

    def check(self, now: float) -> list[Finding]:  # noqa: ARG002 - a state
        """See probe.py."""
        ours = {worker.pid for worker in self.surroundings.roster().workers if worker.pid and worker.alive}
        if not ours:
            return []
        found = []
        for card in self.session.cards():
            try:
                processes = self.nvml.nvmlDeviceGetComputeRunningProcesses(card.handle)
            except self.nvml.NVMLError as error:
                if error.value in NOT_FOR_US | GONE:
                    continue
                raise
            others = [process for process in processes if (process.usedGpuMemory or 0) >= SMALL_BYTES and self._stranger(process.pid, ours)]
            if others:
                found.append(self._finding(card.gpu.device, others))
        return found

    def _stranger(self, pid: int, ours: Collection[int]) -> bool:
        """Whether it is a process here, and neither a worker nor a child of one."""
        if not os.path.exists(self.surroundings.path(f"/proc/{pid}/stat")):
            return False
        for _ in range(ANCESTORS_MAX):
            if pid in ours:
                return False
            pid = self._parent(pid)
            if pid <= 1:
                return True
        return True

    def _parent(self, pid: int) -> int:
        try:
            with open(self.surroundings.path(f"/proc/{pid}/stat"), encoding="utf-8", errors="replace") as file:
                fields = file.read().rpartition(")")[2].split()
        except OSError:
            return 0
        return int(fields[1]) if len(fields) > 1 and fields[1].isdigit() else 0

    def _finding(self, device: str, others: list[Any]) -> Finding:
        told = ", ".join(f"pid {process.pid} {process.usedGpuMemory >> 20} MiB" for process in sorted(others, key=lambda p: p.pid)[:8])
        pids = ",".join(f"pid:{pid}" for pid in sorted(process.pid for process in others)[:8])
        return Finding(
            seq=0,
            kind="gpu-shared",
            text=f"others hold memory of this GPU: {told}",
            probe=self.name,
            layer="gpu",
            device=f"{device},{pids}",
            class_="ignore",
            role="context",
            count=len(others),
        )
