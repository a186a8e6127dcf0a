"""How soon the state of four ranks lies on another node, beside NVRx's local checkpoint with clique replication
(`pytest -m bench -s tests/bench/test_peer_safe.py`).

Four ranks with a quarter of 1.1 GB each train on two agents of this machine, as two nodes of two ranks; NVRx's ranks are paired in the
same way. In turn: one agent with all four (memory alone), two agents, NVRx.

  stall      from the end of a body until the next one begins, on the last of the ranks
  peer-safe  from the end of the last rank's body until the snapshots of all four lie on the other side: ours when their seals are there,
             which are stored after every byte has been hashed, as seen in the copies themselves; NVRx's when the file has its name
  step       median of a body and what lies behind it; of all steps that are not a stall of their own

Nothing is asserted about time. On one machine both sides share the cores, which two machines would not. BENCH_WIDTH, BENCH_SAVES as in
test_stall.py.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import statistics
import sys
import threading
import time

import pytest

from resilient.checkpoint.slot import Slot
from resilient.errors import CheckpointError

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import itertools
from typing import Self

import fleet
import peers
from limits import memcpy_s
from stalls import gaps, measured, sealed, together
from told import bound, told

pytestmark = [pytest.mark.bench, pytest.mark.timeout(1800)]

WIDTH = int(os.environ.get("BENCH_WIDTH", "2048")) // 2
SAVES = int(os.environ.get("BENCH_SAVES", "3"))
EVERY = 10
RANKS, NODES = 4, 2
FLAGS = ["--steps", str(SAVES * EVERY + 8), "--every", str(EVERY), "--width", str(WIDTH)]
OFTEN = ["--steps", str(3 * (SAVES * EVERY + 8)), "--width", str(WIDTH)]  # ours seals when it is worth it: about every 25th step
STATE = 22 * (WIDTH + 1) * WIDTH * 4 * 3 * RANKS
POLL_S = 0.002


class Watch:
    """Looks into the memory of two nodes: which steps of which ranks lie sealed on the node where the rank does not sit."""

    def __init__(self, nodes: list[pathlib.Path]) -> None:
        self.seen: dict[tuple[int, int], float] = {}  # rank, step -> when first
        self._nodes = nodes
        self._slots: dict[tuple[str, int], tuple[int, Slot]] = {}  # path, inode -> rank
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        for _, slot in self._slots.values():
            slot.close()

    def _look(self) -> None:
        find_at = 0.0
        while not self._stop.wait(POLL_S):
            if time.monotonic() > find_at:
                self._find()
                find_at = time.monotonic() + 0.3
            now = time.time()
            for rank, slot in self._slots.values():
                if (step := slot.sealed_step()) > 0:
                    self.seen.setdefault((rank, step), now)

    def _find(self) -> None:
        for node, directory in enumerate(self._nodes):
            for path in directory.glob("resilient.*.rank-*.slot-?"):
                rank = int(path.name.split(".rank-")[1].split(".")[0])
                with contextlib.suppress(CheckpointError, FileNotFoundError):
                    place = (str(path), path.stat().st_ino)
                    if rank * NODES // RANKS != node and place not in self._slots:
                        self._slots[place] = (rank, Slot(str(path), num_bytes=4096, writable=False))


def ours(where: pathlib.Path, nodes: int) -> tuple[list, list[int], dict[tuple[int, int], float]]:
    """Bodies of all ranks together, which steps had a snapshot behind them, and what was seen on the other side."""
    with fleet.started(where, RANKS, nodes, ["resilient", str(where), *OFTEN]) as running:
        with Watch(running.places) as watch:
            running.wait()
        times = running.times()
        return together([one["bodies"] for one in times]), list(sealed(times[0]["snapshots"])), watch.seen


def row(engine: str, bodies: list, steps: list[int], safe: dict[int, float]) -> dict[str, object]:
    """Ours: as often as it likes, so there may be no undisturbed step to compare with."""
    blocked = [gaps(bodies)[step - 1] for step in steps]
    whole = [after[0] - before[0] for before, after in itertools.pairwise(bodies[2:-1])]
    late = [at - bodies[step - 1][1] for step, at in safe.items()]
    found: dict[str, object] = {
        "engine": engine,
        "saves": len(blocked),
        "first_stall_s": round(blocked[0], 3),
        "stall_s": round(statistics.median(blocked[1:]), 3),
        "stall_max_s": round(max(blocked), 3),
        "step_s": round(statistics.median(whole), 3),
    }
    return found | ({"arrived": len(late), "peer_safe_s": round(statistics.median(late), 3), "worst": round(max(late), 3)} if late else {})


def theirs(where: pathlib.Path, engine: str) -> dict[str, object]:
    if not peers.python(engine):
        return peers.left_out(engine)
    times = peers.trained(where, engine, FLAGS, RANKS)
    safe = {int(step): max(one["safe"][step] for one in times) for step in times[0]["safe"]}
    found = measured(engine, times[0]["where"], together([one["bodies"] for one in times]), safe)
    return {**found, "arrived": len(safe), "peer_safe_s": found["safe_s"]}


def test_peer_safe(tmp_path: pathlib.Path) -> None:
    memcpy = memcpy_s(STATE, min(RANKS, len(os.sched_getaffinity(0))))
    alone, often, _ = ours(tmp_path / "alone", 1)
    bodies, steps, seen = ours(tmp_path / "pair", NODES)
    arrived = sorted(step for step in {step for _, step in seen} if all((rank, step) in seen for rank in range(RANKS)))
    safe = {
        step: max(seen[rank, step] for rank in range(RANKS)) for step in arrived if 2 < step < len(bodies) - 1
    }  # behind the last: an idle machine
    rows = [row("memory alone", alone, often, {}), row("two nodes", bodies, steps, safe), theirs(tmp_path / "nvrx", "nvrx-clique")]
    for one in rows:
        if "stall_s" in one:
            one["stall/memcpy"] = round(float(str(one["stall_s"])) / memcpy, 2)
    bounds = [bound("stall, of that with memory alone", rows[1]["stall_s"] / rows[0]["stall_s"], at_most=1.2)]
    if "peer_safe_s" in rows[2] and safe:
        bounds.append(bound("NVRx's time until peer-safe, of ours", rows[2]["peer_safe_s"] / rows[1]["peer_safe_s"], at_least=3))
    told("peer_safe", rows, bounds=bounds, state_mb=STATE // 10**6, ranks=RANKS, nodes=NODES, memcpy_s=round(memcpy, 3))
