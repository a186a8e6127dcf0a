"""How long a killed rank costs, beside what the machine allows: `make bench`, or `pytest -m bench -s tests/bench/test_recovery_time.py`.

One run of the example GPT (4 ranks, DDP, Adam, gloo) is killed again and again, in turn on a chair that a parked standby shadows and on one
that none does. Measured in the same run: the step time, the script's own set-up (a standby from its fork to its parking place),
and the loopback bandwidth for the bytes of the state. The bound of a shadowed chair is 3 steps + 250 ms + bytes / bandwidth; of another
chair, the set-up on top. Nothing is asserted about time: these machines are shared; that no step is lost is asserted.
"""

from __future__ import annotations

import itertools
import os
import pathlib
import signal
import socket
import statistics
import threading
import time

import pytest
from launched import ROOT, Launched

pytestmark = pytest.mark.bench

KILLS = int(os.environ.get("BENCH_KILLS", "10"))
FLAGS = ["--nproc-per-node", "4", "--standbys", "1"]


def loopback_bytes_s(num_bytes: int = 256 << 20) -> float:
    """Bytes a second through one TCP connection on this machine, now."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        left = num_bytes

        def serve() -> None:
            connection, _ = server.accept()
            with connection:
                chunk = bytes(4 << 20)
                for _ in range(num_bytes // len(chunk)):
                    connection.sendall(chunk)

        thread = threading.Thread(target=serve)
        thread.start()
        begin = time.monotonic()
        with socket.create_connection(server.getsockname()) as client:
            buffer = bytearray(4 << 20)
            while left > 0:
                left -= client.recv_into(buffer)
        thread.join()
        return num_bytes / (time.monotonic() - begin)


def step_s(run: Launched) -> float:
    """Median time between two steps of rank 0, as its log lines were taken in."""
    times = [e["t"] for e in run.events("log") if e["rank"] == 0]
    return statistics.median(b - a for a, b in itertools.pairwise(times))


def setups_s(run: Launched) -> list[float]:
    """From a standby's fork to its parking place."""
    started = {e["worker"]: e["t"] for e in run.events("worker_started")}
    return [e["t"] - started[e["worker"]] for e in run.events("standby_ready")]


def row(name: str, downtimes: list[float], bound: float) -> str:
    """One line of the table."""
    ordered = sorted(downtimes)
    median, largest = statistics.median(ordered), ordered[-1]
    return f"{name:<16} n={len(ordered):<3} median {median:6.3f} s  max {largest:6.3f} s  bound {bound:6.3f} s  max/bound {largest / bound:5.2f}"


def test_recovery_time(tmp_path: pathlib.Path) -> None:
    arguments = ["--steps", "100000", "--batch", "1", "--context", "64"]
    with Launched(tmp_path, FLAGS, str(ROOT / "examples" / "train_gpt.py"), arguments) as run:
        run.until_step(20)
        downtimes: dict[bool, list[float]] = {True: [], False: []}
        for number in range(2 * KILLS):
            run.until_standbys(1)
            time.sleep(0.5)
            shadowed = number % 2 == 0
            shadow = run.status()["standbys"][0]["shadow"]
            rank = shadow if shadowed else (shadow + 1 + number // 2 % 3) % 4
            closed = len(run.incidents())
            run.signal(rank, signal.SIGKILL)
            run.until(lambda closed=closed: len(run.incidents()) > closed, "the incident to be closed")
            incident = run.incidents()[-1]
            assert incident["steps_lost"] == 0, incident
            downtimes[shadowed].append(incident["downtime_s"])
        step, setup, bandwidth = step_s(run), statistics.median(setups_s(run)), loopback_bytes_s()
        state = 3 * 4 * 10_788_864  # parameters and Adam's two moments, fp32
        bound = 3 * step + 0.25 + state / bandwidth
        print(f"\nstep {step:.3f} s, set-up {setup:.3f} s, state {state / 1e6:.0f} MB, loopback {bandwidth / 1e9:.2f} GB/s")
        print(row("shadowed chair", downtimes[True], bound))
        print(row("another chair", downtimes[False], bound + setup))
