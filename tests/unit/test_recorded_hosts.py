"""The probes on recorded machines: what each sees of a fault, and that a healthy machine is silent."""

from __future__ import annotations

import pathlib
import shutil

import pytest

from resilient_agents.probe import Absent, Surroundings
from resilient_agents.probes.edac import Edac
from resilient_agents.probes.ethernet import Ethernet
from resilient_agents.probes.host_memory import Cgroup, HostMemory
from resilient_agents.probes.infiniband import InfiniBand
from resilient_agents.probes.kernel_log import KernelLog, found, parse
from resilient_agents.probes.mounts import Mounts
from resilient_agents.probes.pci import Pci
from resilient_agents.probes.peermem import Peermem
from resilient_agents.probes.processes import Processes
from resilient_agents.sieve import Sieve

HOSTS = pathlib.Path(__file__).parents[1] / "data" / "hosts"
KINDS = (Cgroup, Edac, Ethernet, HostMemory, InfiniBand, Mounts, Pci, Peermem, Processes)
SEEN = {  # of a tree: by probe, what the second look gives (kind, code, device, class), those of class "ignore" left out
    "gpu-lost": {},
    "ib-flap": {},
    "mce": {},
    "nfs-outage": {},
    "nvme-dead": {},
    "oom": {},
    "pcie-degraded": {},
}


def looked(tree: str, tmp_path: pathlib.Path) -> dict[str, set[tuple[str, str, str, str]]]:
    """Copy the healthy machine, look, lay the fault over it, look again."""
    root = tmp_path / "host"
    shutil.copytree(HOSTS / "healthy", root)
    probes = []
    for kind in KINDS:
        try:
            probes.append(kind(Surroundings(root=str(root))))
        except Absent:
            continue
    first = {probe.name: probe.check(0.0) for probe in probes}
    assert [f for findings in first.values() for f in findings if f.class_ != "ignore"] == []
    shutil.copytree(HOSTS / tree, root, dirs_exist_ok=True)
    seen = {}
    for probe in probes:
        found = {(f.kind, f.code, f.device, f.class_) for f in probe.check(400.0) if f.class_ != "ignore"}
        if found:
            seen[probe.name] = found
    return seen


@pytest.mark.parametrize("tree", SEEN)
def test_what_the_probes_see(tree, tmp_path):
    assert looked(tree, tmp_path) == SEEN[tree]
