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
    "gpu-lost": {
        "pci": {
            ("aer", "Fatal", "pci:0000:3a:00", "replace"),
            ("aer", "Non-Fatal", "pci:0000:3a:00", "replace"),
            ("pcie-link-down", "lost", "pci:0000:3b:00", "replace"),
        },
    },
    "ib-flap": {
        "infiniband": {
            ("ib-link", "down", "dev:mlx5_0", "replace"),
            ("ib-flap", "", "dev:mlx5_0", "cordon"),
            ("ib-errors", "link_error_recovery", "dev:mlx5_0", "cordon"),
            ("ib-errors", "local_ack_timeout_err", "dev:mlx5_0", "app-restart"),
            ("ib-errors", "req_transport_retries_exceeded", "dev:mlx5_0", "replace"),
        },
    },
    "mce": {"edac": {("edac", "CE", "dev:mc1", "cordon"), ("edac", "UE", "dev:mc1", "cordon")}},
    "nfs-outage": {},
    "nvme-dead": {"mounts": {("fs-readonly", "ro", "dev:nvme1n1", "replace")}},
    "oom": {"cgroup": {("oom-host", "memcg", "", "app-restart")}},
    "pcie-degraded": {
        "pci": {
            ("aer-corrected", "rate", "pci:0000:5c:00", "cordon"),
            ("aer-corrected", "rate", "pci:0000:5d:00", "cordon"),
            ("pcie-width", "", "pci:0000:5d:00", "cordon"),
        },
    },
}
SAID = {  # by the kernel's log, from its first line: those that are told, in the order in which their kind was first told
    "healthy": [],
    "gpu-lost": ["aer", "xid", "gpu-lost", "sxid"],
    "ib-flap": ["ib-link"],
    "mce": ["edac", "mce", "memory-failure"],
    "nfs-outage": ["nfs", "hung-task"],
    "nvme-dead": ["nvme", "io-error", "fs-error", "fs-readonly", "hung-task"],
    "oom": ["oom-host"],
    "pcie-degraded": [],
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
        facts = {(f.kind, f.code, f.device, f.class_) for f in probe.check(400.0) if f.class_ != "ignore"}
        if facts:
            seen[probe.name] = facts
    return seen


@pytest.mark.parametrize("tree", SEEN)
def test_what_the_probes_see(tree, tmp_path):
    assert looked(tree, tmp_path) == SEEN[tree]


@pytest.mark.parametrize("tree", SAID)
def test_what_the_kernel_said(tree):
    rows = (HOSTS / tree / "dev/kmsg").read_bytes().splitlines()
    lines = [line for row in rows if not row.startswith(b" ") and (line := parse(row)) is not None]
    sieve, told = Sieve(), []
    for line in lines:
        told += sieve.take("kernel-log", found([line], line.t), line.t)
    assert list(dict.fromkeys(finding.kind for finding in told if not finding.clears)) == SAID[tree]
    assert len(told) <= 20


def test_a_log_is_read_from_where_a_predecessor_was_lost():
    probe = KernelLog(Surroundings(root=str(HOSTS / "oom"), since=1e-6))
    assert "pid:4103" in {finding.device for finding in probe.check(0.0)}
