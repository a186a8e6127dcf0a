"""What looking at eight GPUs costs, at the periods that the probes have: processor time of the probes and of the stand-in for the library.

A call of the real library goes to the driver and may take longer; tests/gpu/test_nvml_gpu.py prints that on a machine with GPUs.
"""

from __future__ import annotations

import importlib
import statistics
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "process"))

from puppets import Puppets, Watcher, compiled, entries
from told import bound, told

pytestmark = [pytest.mark.bench, pytest.mark.skipif(importlib.util.find_spec("pynvml") is None, reason="needs nvidia-ml-py")]
LOOKS = 50
NAMES = [name for name in sorted(entries()) if name.startswith("nvml-") and name not in {"nvml-events", "nvml-tenants"}]


def cost(watcher, name, looks=LOOKS):
    """Processor seconds of one look, after the first."""
    watcher.look(name, 0.0)
    return statistics.median(watcher.ask(name, float(30 * (n + 1)))["cpu_s"] for n in range(looks))


def test_a_sweep_over_eight_gpus(tmp_path):
    puppets = Puppets(tmp_path, compiled(tmp_path))
    puppets.set("*", **{f"field_{number}": 0 for number in (38, 45, 52, 59, 160, 206, 207, 208, 214, 215, 295)})  # all that any GPU has
    watcher = Watcher(puppets, entries())
    rows, total = [], 0.0
    try:
        for name in NAMES:
            module, _, kind = watcher.entries[name].partition(":")
            period_s = getattr(importlib.import_module(module), kind).period_s
            seconds = cost(watcher, name)
            total += seconds / period_s
            rows.append(
                {"probe": name, "period_s": period_s, "cpu_ms": round(seconds * 1e3, 3), "core_percent": round(100 * seconds / period_s, 4)}
            )
    finally:
        watcher.end()
    rows.append({"probe": "all", "core_percent": round(100 * total, 4)})
    told("nvml", rows, gpus=8, bounds=[bound("percent of a core", 100 * total, at_most=0.5)])
