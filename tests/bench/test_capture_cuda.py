"""What a snapshot of a GPU's state costs the training thread, beside what the bus allows (`pytest -m bench -s tests/bench/test_capture_cuda.py`).

1 GB of state in few and in many tensors, into page-locked shared memory as the slots are.

  launch    the training thread is busy until `begin` returns, the median
  done      from there until every byte is in host memory
  reached   bytes / (launch + done), and as a share of one cudaMemcpyAsync of as many bytes into pinned memory of torch's own, in the same run

Nothing is asserted about time.
"""

from __future__ import annotations

import mmap
import pathlib
import statistics
import sys
import time

import pytest
import torch
from packed import Part

from resilient.checkpoint import capture_gpu
from resilient.checkpoint.capture import Packing
from resilient.checkpoint.movers import Movers

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from told import told

pytestmark = [pytest.mark.bench, pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")]

STATE = 1 << 30
ROUNDS = 11
SHAPES = {"16 x 64 MiB": [16 << 20] * 16, "768 x 1.33 MiB": [349_525] * 768, "transformer": [], "20,000 x 52 KiB": [13_421] * 20_000}
SHAPES["transformer"] = 3 * [count for _ in range(10) for count in (1024 * 3072, 3072, 1024 * 1024, 1024, 1024, 1024, 1024 * 4096, 4096)]


def limit_s() -> float:
    """One copy of all of it, by the driver, into pinned memory."""
    source, target = torch.ones(STATE, dtype=torch.uint8, device="cuda"), torch.ones(STATE, dtype=torch.uint8).pin_memory()
    found = []
    for _ in range(ROUNDS):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        target.copy_(source, non_blocking=True)
        torch.cuda.synchronize()
        found.append(time.perf_counter() - begin)
    return min(found)


def captured(counts: list[int]) -> tuple[int, float, float]:
    """Bytes, and the medians of launch and of the time from there to the end, in s."""
    packing = Packing([Part(torch.randn(count, device="cuda")) for count in counts], Movers(1))
    memory = memoryview(mmap.mmap(-1, packing.num_bytes, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE))
    registered = capture_gpu.Registered(memory)
    launched, done = [], []
    for _ in range(ROUNDS):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        passage = packing.begin(memory)
        middle = time.perf_counter()
        assert passage is not None
        passage.finish()
        launched.append(middle - begin)
        done.append(time.perf_counter() - middle)
    registered.close()
    return packing.num_bytes, statistics.median(launched[1:]), statistics.median(done[1:])


def test_capture_cuda() -> None:
    rate = STATE / limit_s()
    rows = []
    for name, counts in SHAPES.items():
        num_bytes, launch_s, done_s = captured(counts)
        reached = num_bytes / (launch_s + done_s)
        rows.append(
            {
                "state": name,
                "tensors": len(counts),
                "GB": round(num_bytes / 1e9, 2),
                "launch_ms": round(launch_s * 1e3, 2),
                "launch_ms_per_GB": round(launch_s * 1e12 / num_bytes, 2),
                "done_ms": round(done_s * 1e3, 1),
                "GB_s": round(reached / 1e9, 1),
                "of_the_bus": round(reached / rate, 2),
            }
        )
    told("capture_cuda", rows, gpu=torch.cuda.get_device_name(), bus_GB_s=round(rate / 1e9, 1))
