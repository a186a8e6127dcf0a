"""What memory the engine takes beside the training's own (`pytest -m bench -s tests/bench/test_extra_memory.py`).

The training of test_stall.py, once on one rank with checkpoints on disk, once on four ranks of two nodes that keep copies for each other. Ten
times a second: the bytes of the segments, by whose they are; and the private memory (Pss_Anon of /proc: what no file backs, shared pages
divided among those who share them) of all processes but the workers: agents, zygotes, stores. `before` is when the second step is done,
`peak` the largest after that, beside persisting or sending. Wanted: two segments per worker, the copies held, and nothing else of the
state's size. `worker beyond` is a worker's private memory beyond weights, gradients and moments, which are 4/3 of the state: python and
torch themselves are in it.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import sys
import threading

import psutil
import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from typing import Self

import fleet
from told import bound, told

pytestmark = [pytest.mark.bench, pytest.mark.timeout(600)]

WIDTH = int(os.environ.get("BENCH_WIDTH", "2048"))
PERIOD_S = 0.1
STEPS, EVERY = 25, 5
MB = 10**6


class Gauge:
    """Looks at a fleet until it is told to stop."""

    def __init__(self, running: fleet.Fleet, ranks: int) -> None:
        self.before = self.peak = self.worker = 0
        self.own = self.copies = 0  # bytes of segments: of the ranks seated there, of others
        self._running, self._ranks = running, ranks
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._stop.wait(PERIOD_S):
            ranks = self._running.jobs[0].status()["ranks"]
            if not ranks or min(row["step"] for row in ranks) < 2:
                continue
            workers = {row["pid"] for row in ranks}
            ours = [pid for job in self._running.jobs for pid in (job.process.pid, *(child.pid for child in job.descendants()))]
            taken = sum(private(pid) for pid in ours if pid not in workers)
            if not all(map(private, workers)):
                continue  # one has ended meanwhile: what it shared with the zygote that it was forked from counts as the zygote's alone
            self.worker = max([self.worker, *map(private, workers)])
            self.before = self.before or taken
            self.peak = max(self.peak, taken)
            self._segments()

    def _segments(self) -> None:
        own = copies = 0
        nodes = len(self._running.places)
        for node, place in enumerate(self._running.places):
            for path in place.glob("resilient.*.rank-*"):
                seated = int(path.name.split(".rank-")[1].split(".")[0]) * nodes // self._ranks == node
                with contextlib.suppress(FileNotFoundError):
                    size = path.stat().st_blocks * 512
                    own, copies = own + size * seated, copies + size * (not seated)
        self.own, self.copies = max(self.own, own), max(self.copies, copies)


def private(pid: int) -> int:
    """Bytes of memory that no file backs."""
    with contextlib.suppress(OSError, psutil.Error):
        for line in pathlib.Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss_Anon:"):
                return int(line.split()[1]) * 1024
    return 0


def measured(where: pathlib.Path, what: str, ranks: int, nodes: int, *flags: str) -> dict[str, object]:
    width = WIDTH // 2 if ranks > 1 else WIDTH
    arguments = ["resilient", str(where), "--steps", str(STEPS), "--every", str(EVERY), "--width", str(width)]
    with fleet.started(where, ranks, nodes, arguments, flags) as running:
        with Gauge(running, ranks) as gauge:
            running.wait()
        state = sum(one["state_bytes"] for one in running.times())
    return {
        "what": what,
        "state_mb": state // MB,
        "segments_mb": gauge.own // MB,
        "segments/state": round(gauge.own / state, 2),
        "copies_mb": gauge.copies // MB,
        "copies/state": round(gauge.copies / state, 2),
        "agents_before_mb": gauge.before // MB,
        "agents_peak_mb": gauge.peak // MB,
        "more/state": round((gauge.peak - gauge.before) / state, 3),
        "worker_beyond_mb": int(gauge.worker - state / ranks * 4 / 3) // MB,
    }


def test_extra_memory(tmp_path: pathlib.Path) -> None:
    kept = ("--checkpoint", f"file://{tmp_path / 'kept'}", "--checkpoint-every", str(EVERY))
    rows = [measured(tmp_path / "disk", "one rank, to disk", 1, 1, *kept), measured(tmp_path / "peers", "four ranks, two nodes", 4, 2)]
    bounds = [bound(f"segments, of the state: {row['what']}", float(str(row["segments/state"])), at_most=2.05) for row in rows]
    bounds += [bound(f"copies, of the state: {row['what']}", float(str(row["copies/state"])), at_most=2.05) for row in rows]
    bounds += [bound(f"more private memory, of the state: {row['what']}", float(str(row["more/state"])), at_most=0.1) for row in rows]
    told("extra_memory", rows, bounds=bounds)
