"""What the probes cost: CPU time of a whole prober as a share of one core, what 50,000 lines cost, and what a training step feels of it.

Two probers look for a minute, at the same time: one at this machine, one at a written one of the size of an 8-GPU node (8 InfiniBand ports with
all counters, 24 PCI devices, 16 memory controllers, 2000 processes, 8 workers that write a line each second).
"""

from __future__ import annotations

import asyncio
import os
import pathlib
import signal
import statistics
import sys
import time

import numpy as np
import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parent))
sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "process"))
from installed import path_with
from resilient_agents import kernel
from resilient_agents.probe import Roster, Surroundings, Watched
from resilient_agents.probes.limits import COUNTERS
from resilient_agents.probes.worker_log import WorkerLog
from resilient_agents.probing import Probing, senses
from told import bound, told

pytestmark = pytest.mark.bench
WARM_S, LOOK_S = 6.0, 60.0
SHARE = 0.5  # per cent of one core
LINES = 50_000


def write(path: pathlib.Path, text: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{text}\n")


def large(root: pathlib.Path) -> pathlib.Path:
    """An 8-GPU node, as far as files go."""
    for i in range(8):
        port = root / f"sys/class/infiniband/mlx5_{i}/ports/1"
        for name, text in {
            "state": "4: ACTIVE",
            "phys_state": "5: LinkUp",
            "rate": "400 Gb/sec (4X NDR)",
            "link_layer": "InfiniBand",
        }.items():
            write(port / name, text)
        for name in ["counters/link_downed", *(row.name for row in COUNTERS)]:
            write(port / name, 0)
    for i in range(24):
        card = root / f"sys/bus/pci/devices/0000:{i:02x}:00.0"
        for name, text in {
            "class": "0x030200",
            "current_link_width": 16,
            "current_link_speed": "32.0 GT/s PCIe",
            "vendor": "0x10de",
            "device": "0x2330",
        }.items():
            write(card / name, text)
        for name in ("fatal", "nonfatal", "correctable"):
            write(card / f"aer_dev_{name}", "Undefined 0\nDLP 0\nSDES 0\nTLP 0\nFCP 0\nTOTAL_ERR 0")
    for i in range(4):
        for name, text in {
            "carrier": 1,
            "operstate": "up",
            "flags": "0x1003",
            "speed": 100000,
            "carrier_down_count": 1,
            "device/x": 1,
        }.items():
            write(root / f"sys/class/net/eth{i}" / name, text)
    for i in range(16):
        write(root / f"sys/devices/system/edac/mc/mc{i}/ue_count", 0)
        write(root / f"sys/devices/system/edac/mc/mc{i}/ce_count", 0)
    for pid in range(1, 2000):
        write(root / f"proc/{pid}/stat", f"{pid} (python3) S 1 1 1 0 -1 0 0 0 0 0 1 1 0 0 20 0 1 0 5 0 0")
    for name in ("meminfo", "vmstat", "self/mounts", "sys/fs/file-nr", "self/cgroup"):
        write(root / "proc" / name, pathlib.Path("/proc", name).read_text())
    (root / "dev").mkdir()
    os.mkfifo(root / "dev/kmsg")
    return root


def workers(where: pathlib.Path) -> tuple[Watched, ...]:
    for i in range(8):
        write(where / f"{i}.out", "")
        write(where / f"{i}.err", "")
    return tuple(
        Watched(worker=f"w{i}", rank=i, pid=os.getpid(), stdout=str(where / f"{i}.out"), stderr=str(where / f"{i}.err")) for i in range(8)
    )


def cpu_s(pid: int) -> float:
    seen = kernel.stat(pid)
    assert seen is not None
    return seen.cpu_s


async def minute(tmp_path: pathlib.Path) -> list[dict[str, object]]:
    found: list = []
    probers = {}
    for name, root in {"this machine": "/", "8 GPUs, written": str(large(tmp_path / "host"))}.items():
        probers[name] = probing = Probing(senses("auto", root, "", str(tmp_path), str(tmp_path), "/dev/shm"))
        probing.start(found.extend)
        probing.watch(workers(tmp_path / "logs"))
    await asyncio.sleep(WARM_S)
    before, begun = {name: cpu_s(probing.pid) for name, probing in probers.items()}, time.monotonic()
    for second in range(int(LOOK_S)):
        for i in range(8):
            with (tmp_path / "logs" / f"{i}.out").open("a") as file:
                file.write(f"step {second} loss 2.34{i} grad_norm 0.98 tokens/s 31245\n")
        await asyncio.sleep(1.0)
    wall = time.monotonic() - begun
    rows = [
        {
            "prober looks at": name,
            "cpu ms in a minute": round(1000 * (cpu_s(p.pid) - before[name])),
            "% of a core": round(100 * (cpu_s(p.pid) - before[name]) / wall, 3),
        }
        for name, p in probers.items()
    ]
    for p in probers.values():
        await p.close()
    print([(f.kind, f.text) for f in found])
    return rows


def lines(tmp_path: pathlib.Path) -> list[dict[str, object]]:
    """Of a worker that writes more than anybody should."""
    rows = []
    texts = {
        "mean nothing": "step {i} | loss 2.3412 | lr 3.0e-04 | tokens per second 31245.2",
        "have a word that might": "INFO step {i}: no error, GPU memory 71.2 GB, timeout in 600 s, connection alive",
    }
    for name, text in texts.items():
        log = tmp_path / "flood.out"
        log.write_bytes(b"")
        roster = Roster(workers=(Watched(worker="w", rank=0, pid=1, stdout=str(log)),))
        probe = WorkerLog(Surroundings(roster=lambda roster=roster: roster))
        probe.check(0.0)
        with log.open("a") as file:
            file.writelines(text.format(i=i) + "\n" for i in range(LINES))
        begun = time.process_time()
        for _ in range(4):
            probe.check(1.0)
        spent = time.process_time() - begun
        rows.append({"50,000 lines that": name, "cpu s": round(spent, 3), "lines per cpu s": round(LINES / spent)})
    return rows


async def felt(tmp_path: pathlib.Path) -> float:
    """Step time with the prober over that without it (stopped), in turn, while every core multiplies."""
    probing = Probing(senses("auto", str(tmp_path / "host"), "", str(tmp_path), str(tmp_path), "/dev/shm"))
    probing.start(lambda _: None)
    probing.watch(workers(tmp_path / "logs"))
    await asyncio.sleep(WARM_S)
    a = np.random.default_rng(0).random((384, 384))
    times: dict[bool, list[float]] = {True: [], False: []}
    for turn in range(16):
        looks = turn % 2 == 0
        os.kill(probing.pid, signal.SIGCONT if looks else signal.SIGSTOP)
        end = time.monotonic() + 1.5
        while time.monotonic() < end:
            begun = time.perf_counter()
            a @ a
            times[looks].append(time.perf_counter() - begun)
        await asyncio.sleep(0)
    os.kill(probing.pid, signal.SIGCONT)
    await probing.close()
    return statistics.mean(times[True]) / statistics.mean(times[False])


def test_cost(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", path_with(tmp_path / "site"))
    rows = asyncio.run(minute(tmp_path))
    flood = lines(tmp_path)
    ratio = asyncio.run(felt(tmp_path))
    bounds = [bound(f"% of a core: {row['prober looks at']}", float(str(row["% of a core"])), at_most=SHARE) for row in rows]
    bounds.append(bound("step time with / without", ratio, at_most=1.01))
    told("probe_cost", rows, bounds=bounds, flood=flood)
