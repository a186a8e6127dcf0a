"""NVML probes on a machine with GPUs: the real library and driver (`pytest -m gpu tests/gpu`). Prints what a look costs."""

from __future__ import annotations

import importlib
import sys
import time
import tomllib
from pathlib import Path

import pytest
import torch

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]
ROOT = Path(__file__).parents[2]


def probes():
    """Those of the project that find something to look at here."""
    from resilient_agents.probe import Absent, Surroundings

    found, absent = [], {}
    for name, place in sorted(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]["resilient.probes"].items()):
        if name.startswith("nvml-"):
            module, _, kind = place.partition(":")
            try:
                found.append(getattr(importlib.import_module(module), kind)(Surroundings()))
            except Absent as error:
                absent[name] = str(error)
    return found, absent


def test_a_healthy_node_is_healthy_and_cheap():
    found, absent = probes()
    print("\nabsent:", absent, file=sys.stderr)
    assert len(found) >= 8
    for _ in range(3):
        for probe in found:
            began, cpu = time.perf_counter(), time.process_time()
            said = [finding for finding in probe.check(time.monotonic()) if finding.class_ != "ignore"]
            wall, cpu = time.perf_counter() - began, time.process_time() - cpu
            print(
                f"{probe.name:16} {1e3 * wall:8.2f} ms, {1e3 * cpu:7.2f} ms of CPU, {100 * cpu / probe.period_s:.4f} % of a core",
                file=sys.stderr,
            )
            assert said == [], said


def test_every_gauge_reads_something():
    from resilient_agents.probes.nvml import Gauge

    for probe in probes()[0]:
        if isinstance(probe, Gauge):
            for card in probe.session.cards():
                print(probe.name, card.gpu, probe.read(card), file=sys.stderr)


def test_gpus_are_those_that_torch_sees():
    import os

    from resilient_agents.devices import visible
    from resilient_agents.probe import Surroundings
    from resilient_agents.probes.nvml import session

    gpus = [card.gpu for card in session(Surroundings()).open()]
    seen = visible(gpus, os.environ.get("CUDA_VISIBLE_DEVICES"))
    assert len(seen) == torch.cuda.device_count()
    for number, gpu in enumerate(seen):
        assert gpu.uuid.removeprefix("GPU-") == str(torch.cuda.get_device_properties(number).uuid)


def test_our_own_memory_is_not_a_stranger():
    import os

    from resilient_agents.probe import Roster, Surroundings, Watched
    from resilient_agents.probes.nvml_tenants import Tenants

    held = torch.zeros(64 << 20, device="cuda")  # 256 MiB
    probe = Tenants(Surroundings(roster=lambda: Roster(workers=(Watched(worker="w0", pid=os.getpid()),))))
    assert f"pid:{os.getpid()}" not in [part for finding in probe.check(0.0) for part in finding.device.split(",")]
    assert held.device.type == "cuda"
