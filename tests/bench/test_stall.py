"""What saving costs the training thread, beside `torch.save`, torch's own async saves, and what the machine allows
(`pytest -m bench -s tests/bench/test_stall.py`).

One rank trains 92 million fp32 parameters with Adam, 1.1 GB of state, on all cores, and saves every ten steps (`jobs/stalled.py`); engine
after engine, in one run, after the limits were measured: one warm pass of memcpy over the state with 1 and with 2 threads, and a write to
the same disk past the page cache.

  stall       between two bodies the thread is blocked; `first_stall`: by the first save
  slow-down   what the bodies cost, from a save until it is durable, above an undisturbed body (the median of all others)
  cost        both, per save
  durable     from the end of the body until the checkpoint would survive a power cut (ours: committed and checksummed too)

"memory" is the snapshot at every step, "resilient" the checkpoint on disk; "restore" verifies every byte and puts it back. Nothing is asserted
about time. BENCH_WIDTH=w: of the layers, the state grows with its square (2048); BENCH_SAVES=n: saves of each engine (4).
"""

from __future__ import annotations

import ctypes
import itertools
import json
import mmap
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import threading
import time

import pytest
from launched import Launched

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from told import told

pytestmark = [pytest.mark.bench, pytest.mark.timeout(1800)]

JOB = pathlib.Path(__file__).parent / "jobs" / "stalled.py"
WIDTH = os.environ.get("BENCH_WIDTH", "2048")
SAVES = int(os.environ.get("BENCH_SAVES", "4"))
EVERY = 10
FLAGS = ["--steps", str(SAVES * EVERY + EVERY // 2), "--every", str(EVERY), "--width", WIDTH]
STATE = 22 * (int(WIDTH) + 1) * int(WIDTH) * 4 * 3
PEERS = ("torch.save", "dcp-thread", "dcp-process")
ENV = {**os.environ, "OMP_NUM_THREADS": str(os.cpu_count())}
BLOCK = 16 << 20


def memcpy_s(threads: int, rounds: int = 5) -> float:
    """One warm pass over the state, from private into shared memory, cut into one share for each thread; the best of several."""
    source, target = mmap.mmap(-1, STATE, flags=mmap.MAP_PRIVATE), mmap.mmap(-1, STATE, flags=mmap.MAP_SHARED)
    for one in (source, target):
        for at in range(0, STATE, mmap.PAGESIZE):
            one[at] = 1
    from_, to = (ctypes.addressof(ctypes.c_char.from_buffer(one)) for one in (source, target))
    shares = [STATE * i // threads for i in range(threads + 1)]
    found = []
    for _ in range(rounds):
        others = [threading.Thread(target=ctypes.memmove, args=(to + a, from_ + a, b - a)) for a, b in itertools.pairwise(shares)]
        begin = time.perf_counter()
        for other in others:
            other.start()
        for other in others:
            other.join()
        found.append(time.perf_counter() - begin)
    return min(found)


def disk_s(where: pathlib.Path, rounds: int = 3) -> float:
    """The state written past the page cache, and flushed; the median."""
    block, found = mmap.mmap(-1, BLOCK), []
    block.write(os.urandom(BLOCK))
    for number in range(rounds):
        path = where / f"limit-{number}"
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_DIRECT)
        begin = time.perf_counter()
        for _ in range(-(-STATE // BLOCK)):
            os.write(fd, block)
        os.fsync(fd)
        found.append(time.perf_counter() - begin)
        os.close(fd)
        path.unlink()
    return statistics.median(found)


def measured(name: str, times: dict, durable: dict[int, float]) -> dict[str, object]:
    """One line of the table; `durable`: step -> when."""
    bodies = times["bodies"]
    stalls = [after[0] - before[1] for before, after in itertools.pairwise(bodies)]
    windows = [(bodies[step][1], at) for step, at in durable.items()]
    lasting = [end - begin for begin, end in bodies[:-1]]
    disturbed = [any(begin < to and end > from_ for from_, to in windows) for begin, end in bodies[:-1]]
    calm = statistics.median(body for body, hit in zip(lasting[2:], disturbed[2:], strict=True) if not hit)
    slow = sum(body - calm for body, hit in zip(lasting, disturbed, strict=True) if hit) / len(windows)
    saves = [stalls[step] for step in sorted(durable)]
    stall = statistics.median(saves[1:] or saves)
    return {
        "engine": name,
        "saves": len(durable),
        "first_stall_s": round(saves[0], 3),
        "stall_s": round(stall, 3),
        "stall_max_s": round(max(saves), 3),
        "slow_down_s": round(slow, 3),
        "cost_s": round(stall + slow, 3),
        "durable_s": round(statistics.median(to - from_ for from_, to in windows), 3),
        "step_s": round(calm, 3),
    }


def ours(where: pathlib.Path) -> tuple[list[dict[str, object]], dict[str, float]]:
    """Under resilient-run with a directory as persistent tier; rows, and the seconds of snapshots and restores themselves."""
    flags = ["--nproc-per-node", "1", "--checkpoint", f"file://{where / 'kept'}", "--checkpoint-every", str(EVERY)]
    with Launched(where, flags, str(JOB), ["resilient", str(where), *FLAGS], env={"OMP_NUM_THREADS": ENV["OMP_NUM_THREADS"]}) as run:
        assert run.wait(600) == 0, run.text()
        durable = {event["step"] - 1: event["t"] for event in run.events("checkpoint_committed")}
    times = json.loads((where / "times.json").read_text())
    bodies, snapshots = times["bodies"], times["snapshots"]
    stalls = [after[0] - before[1] for before, after in itertools.pairwise(bodies[:-1])]
    later = [stall for step, stall in enumerate(stalls) if (step + 1) % EVERY and step]
    memory = {
        "engine": "memory",
        "saves": len(snapshots),
        "first_stall_s": round(stalls[0], 3),
        "stall_s": round(statistics.median(later), 3),
        "stall_max_s": round(max(later), 3),
    }
    facts = {"first": snapshots[0], "snapshot": statistics.median(snapshots[1:]), "restore": statistics.median(times["restores"])}
    return [memory, measured("resilient", times, durable)], facts


def theirs(where: pathlib.Path, engine: str) -> dict[str, object]:
    """The same training in plain python."""
    command = [sys.executable, str(JOB), engine, str(where), *FLAGS]
    done = subprocess.run(command, capture_output=True, text=True, env=ENV, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    times = json.loads((where / "times.json").read_text())
    return measured(engine, times, {int(step): at for step, at in times["durable"].items()})


def test_stall(tmp_path: pathlib.Path) -> None:
    one, two, disk = memcpy_s(1), memcpy_s(2), disk_s(tmp_path)
    rows, facts = ours(tmp_path)
    shutil.rmtree(tmp_path / "kept")
    for engine in PEERS:
        where = tmp_path / engine
        where.mkdir()
        rows.append(theirs(where, engine))
        shutil.rmtree(where)
    threads = len(os.sched_getaffinity(0))
    memcpy = one if threads == 1 else two
    for row in rows:
        row["stall/memcpy"] = round(float(str(row["stall_s"])) / memcpy, 2)
    told(
        "stall",
        rows,
        state_mb=STATE // 10**6,
        memcpy_1_s=round(one, 3),
        memcpy_2_s=round(two, 3),
        disk_direct_s=round(disk, 3),
        **{f"{name}/memcpy": round(seconds / memcpy, 2) for name, seconds in facts.items()},
    )
