"""Peermem: whether the network card reaches the memory of the GPU.

Contract: reads <root>/proc/modules. Where there are NVIDIA GPUs and InfiniBand cards, and neither nvidia_peermem is loaded nor the open
kernel module with DMA-BUF, NCCL copies through the host without a word and all-reduce is several times slower. That is configuration: it
is counted and noted, never a reason to take a node out of a run.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from resilient.core.messages import Finding
from resilient_agents.probe import Absent
from resilient_agents.probes import reading

if TYPE_CHECKING:
    from resilient_agents.probe import Surroundings


def reachable(modules: list[str], version: str) -> bool:
    """Whether one of the two ways is open. version: /proc/driver/nvidia/version."""
    loaded = {line.split(" ", 1)[0] for line in modules}
    return bool({"nvidia_peermem", "nv_peer_mem"} & loaded) or "Open Kernel Module" in version


class Peermem:
    """Looks once in ten minutes: modules are loaded by hand."""

    name = "peermem"
    period_s = 600.0
    lasting = True

    def __init__(self, surroundings: Surroundings) -> None:
        """Raises Absent without NVIDIA's driver and InfiniBand."""
        self._surroundings = surroundings
        needed = ("/proc/driver/nvidia", "/sys/class/infiniband")
        if missing := [path for path in needed if not reading.names(surroundings.path(path))]:
            raise Absent(f"{surroundings.path(missing[0])}: not here")

    def check(self, now: float) -> list[Finding]:
        """Whether it can."""
        del now
        path = self._surroundings.path
        if reachable(reading.lines(path("/proc/modules")), reading.text(path("/proc/driver/nvidia/version")) or ""):
            return []
        text = "nvidia_peermem is not loaded and the driver is not the open one: NCCL copies through the host (no GPUDirect RDMA)"
        return [Finding(seq=0, kind="peermem", layer="driver", class_="ignore", role="context", text=text)]
