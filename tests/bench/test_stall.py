"""What saving costs the training thread, beside `torch.save`, torch's own async saves, dlrover's flash checkpoint, NVRx, and what the machine
allows (`pytest -m bench -s tests/bench/test_stall.py`).

One rank trains 92 million fp32 parameters with Adam, 1.1 GB of state, on all cores, and saves every ten steps (`jobs/stalled.py`); engine
after engine, in one run, after the limits were measured: one warm pass of memcpy over the state with 1 and with 2 threads, and a write to
the same disk past the page cache.

  stall       the thread is blocked, between two bodies or before it may change the weights; `first_stall`: by the first save
  slow-down   what the steps cost, from a save until it is safe, above an undisturbed one (the median of all others)
  cost        both, per save
  safe        from the end of the body until the checkpoint would survive what `where` says: on the disk a power cut (ours: committed and
              checksummed too), in memory the loss of the worker
  load        from there (the disk is cold), once; ours verified, into the memory from which `restore/memcpy` goes on, verified again

"memory" is the snapshot alone, "resilient" the checkpoint on disk. Nothing is asserted about time.
BENCH_WIDTH=w: of the layers, the state grows with its square (2048; 3906 is 4 GB); BENCH_SAVES=n: saves of each engine (3);
BENCH_ENGINES=a,b: these of the others alone (each takes half a minute).
"""

from __future__ import annotations

import os
import pathlib
import shutil
import statistics
import sys
import time

import pytest

from resilient.checkpoint import memory
from resilient.checkpoint.disk import DiskTier
from resilient.checkpoint.ring import Ring
from resilient.checkpoint.tier import SnapshotKey

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import fleet
import peers
from limits import LOADS, cold, disk_s, memcpy_s
from stalls import gaps, measured, sealed
from told import bound, told

pytestmark = [pytest.mark.bench, pytest.mark.timeout(1800)]

WIDTH = os.environ.get("BENCH_WIDTH", "2048")
SAVES = int(os.environ.get("BENCH_SAVES", "3"))
EVERY = 10
FLAGS = ["--steps", str(SAVES * EVERY + 8), "--every", str(EVERY), "--width", WIDTH]  # the last save is looked after as well
STATE = 22 * (int(WIDTH) + 1) * int(WIDTH) * 4 * 3
STAGED = ("dcp-staged", "dcp-staged-process")
ENGINES = ("torch.save", "dcp-thread", "dcp-process", *STAGED, "nvrx-async", "nvrx-local", "dlrover-memory", "dlrover-disk")
ASKED = [engine for engine in os.environ.get("BENCH_ENGINES", ",".join(ENGINES)).split(",") if engine]


def ours(where: pathlib.Path) -> tuple[list[dict[str, object]], dict[str, float]]:
    """Under resilient-run with a directory as persistent tier; rows, and the seconds of snapshots and restores themselves."""
    kept = where / "kept"
    flags = ("--checkpoint", f"file://{kept}", "--checkpoint-every", str(EVERY))
    with fleet.started(where, 1, 1, ["resilient", str(where), *FLAGS], flags) as running:
        running.wait()
        safe = {event["step"]: event["t"] for event in running.jobs[0].events("checkpoint_committed")}
    (times,) = running.times()
    load_s = restored(kept, max(safe), times["state_bytes"])
    shutil.rmtree(kept)
    bodies, snapshots = times["bodies"], sealed(times["snapshots"])
    blocked = {step: gaps(bodies)[step - 1] for step in snapshots}
    first, *others = snapshots
    later = [blocked[step] for step in others if step not in safe] or [blocked[step] for step in others]
    sealing = {
        "engine": "memory",
        "where": "agent's memory",
        "saves": len(snapshots),
        "first_stall_s": round(blocked[first], 3),
        "stall_s": round(statistics.median(later), 3),
        "stall_max_s": round(max(later), 3),
    }
    costs = [snapshots[step] for step in others]
    facts = {
        "memcpy_after_a_body": times["memcpy_s"],
        "first": snapshots[first],
        "snapshot": statistics.median(costs),
        "restore": statistics.median(times["restores"]),
    }
    return [sealing, {**measured("resilient", "disk", bodies, safe), "load_s": round(load_s, 2)}], facts


def restored(kept: pathlib.Path, step: int, state: int) -> float:
    """Seconds from the cold disk to verified bytes in the chair's memory, where the worker takes them from (restore)."""
    path, taken = memory.create(memory.segment_path("/dev/shm", memory.new_key(), "bench"), state + (64 << 20)), []
    try:
        room = Ring.open([path], populate=True)
        for _ in range(LOADS):
            cold((kept / f"step-{step:08}").iterdir())
            begin = time.perf_counter()
            DiskTier(str(kept)).get(SnapshotKey(0, step), room)
            taken.append(time.perf_counter() - begin)
        room.close()
    finally:
        memory.remove(path)
    return statistics.median(taken)


def theirs(where: pathlib.Path, engine: str) -> dict[str, object]:
    """The same training in plain python."""
    if not peers.python(engine):
        return peers.left_out(engine)
    (times,) = peers.trained(where, engine, FLAGS)
    shutil.rmtree(where)
    row = measured(engine, times["where"], times["bodies"], {int(step): at for step, at in times["safe"].items()})
    return {**row, "load_s": round(times["load_s"], 2)}


def bounds(rows: list[dict[str, object]], facts: dict[str, float], memcpy: float) -> list[dict[str, object]]:
    """What is wanted of all this."""
    by = {str(row["engine"]): {key: float(value) for key, value in row.items() if isinstance(value, float)} for row in rows}
    sealing, disk = by["memory"], by["resilient"]
    found = [
        bound("stall to memory, of a memcpy pass", sealing["stall_s"] / memcpy, at_most=1.2),
        bound("stall to memory, of such a pass after a body", sealing["stall_s"] / facts["memcpy_after_a_body"], at_most=1.2),
        bound("first stall, of a later one", sealing["first_stall_s"] / sealing["stall_s"], at_most=2),
        bound("slow-down, steps", disk["slow_down_s"] / disk["step_s"], at_most=1),
        bound("restore from memory, verified, of a memcpy pass", facts["restore"] / memcpy, at_most=2.5),
    ]
    loads = [by[engine]["load_s"] for engine in ("torch.save", "dcp-thread", *STAGED) if engine in by]
    if loads:
        found.append(bound("cold load of torch, the fastest, of ours verified", min(loads) / disk["load_s"], at_least=1))
    for name, engines, cost, safe in (("DCP as it comes", ("dcp-thread",), 2.5, 2), ("DCP's best variant", STAGED, 1.6, 1.5)):
        there = [by[engine] for engine in engines if engine in by]
        if there:
            found.append(bound(f"cost of {name}, of ours", min(row["cost_s"] for row in there) / disk["cost_s"], at_least=cost))
            found.append(bound(f"time to durable of {name}, of ours", min(row["safe_s"] for row in there) / disk["safe_s"], at_least=safe))
    return found


def test_stall(tmp_path: pathlib.Path) -> None:
    one, two, disk = memcpy_s(STATE, 1), memcpy_s(STATE, 2), disk_s(STATE, tmp_path)
    rows, facts = ours(tmp_path / "ours")
    for engine in ASKED:
        rows.append(theirs(tmp_path / engine, engine))
        print(*rows[-1].values(), flush=True)  # it takes minutes
    memcpy = one if len(os.sched_getaffinity(0)) == 1 else two
    for row in rows:
        if "stall_s" in row:
            row["stall/memcpy"] = round(float(str(row["stall_s"])) / memcpy, 2)
    told(
        "stall" if WIDTH == "2048" else f"stall-{WIDTH}",
        rows,
        bounds=bounds(rows, facts, memcpy),
        state_mb=STATE // 10**6,
        memcpy_1_s=round(one, 3),
        memcpy_2_s=round(two, 3),
        disk_direct_s=round(disk, 3),
        **{f"{name}/memcpy": round(seconds / memcpy, 2) for name, seconds in facts.items()},
    )
