"""How long a killed rank costs, beside what the machine allows and what torchrun takes: `make bench`, or
`pytest -m bench -s tests/bench/test_recovery_time.py`.

One run of the example GPT (4 ranks, DDP, Adam, gloo) is killed again and again, in turn on a chair that a parked standby shadows and on one
that none does. Measured in the same run: the step time, the script's own set-up (a standby from its fork to its parking place),
and the loopback bandwidth for the bytes of the state. The bound of a shadowed chair is 3 steps + 250 ms + bytes / bandwidth; of another
chair, the set-up on top. Then the same training under torchrun with a checkpoint every ten steps: from the kill until the step that was
under way is done. Nothing is asserted about time: these machines are shared; that no step is lost is asserted. BENCH_KILLS=n: blows (50).
"""

from __future__ import annotations

import contextlib
import itertools
import os
import pathlib
import random
import re
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time

import psutil
import pytest
from launched import ROOT, Launched

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from told import summary, told

pytestmark = [pytest.mark.bench, pytest.mark.timeout(1800)]

KILLS = int(os.environ.get("BENCH_KILLS", "50"))
TORCHRUN_KILLS = max(1, KILLS // 10)
FLAGS = ["--nproc-per-node", "4", "--standbys", "1"]
SIZE = ["--steps", "100000", "--batch", "1", "--context", "64"]
STATE = 3 * 4 * 10_788_864  # parameters and Adam's two moments, fp32
PHASES = ("detect", "decide", "regroup", "restore", "replay")


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


def row(name: str, incidents: list[dict[str, float]], bound: float) -> dict[str, object]:
    """One line of the table."""
    found = summary([incident["downtime_s"] for incident in incidents])
    phases = {phase: round(statistics.median(incident[phase] for incident in incidents), 3) for phase in PHASES}
    return {"killed": name, **found, "bound_s": round(bound, 3), "max/bound": round(float(found["max_s"]) / bound, 2), **phases}


def under_torchrun(where: pathlib.Path) -> list[float]:
    """Seconds from a SIGKILL of a rank until the step that was under way is done, under torchrun."""
    script, output = ROOT / "tests" / "bench" / "jobs" / "checkpointed.py", where / "torchrun.out"
    head = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4", "--max-restarts", "1000"]
    env = {**os.environ, "PYTHONPATH": str(ROOT / "examples"), "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "OMP_NUM_THREADS": "1"}
    dice, found = random.Random(KILLS), []

    def steps() -> list[tuple[int, float]]:
        return [(int(step), float(at)) for step, at in re.findall(r"step (\d+) at ([\d.]+)", output.read_text())]

    def until(what: str, condition: object) -> None:
        end = time.monotonic() + 180
        while not condition():  # type: ignore[operator]
            assert time.monotonic() < end, f"{what}: not in 180 s\n{output.read_text()[-2000:]}"
            time.sleep(0.01)

    with output.open("wb") as out:
        process = subprocess.Popen([*head, str(script), str(where / "kept.pt"), *SIZE], stdout=out, stderr=subprocess.STDOUT, env=env)
    try:
        for _ in range(TORCHRUN_KILLS):
            seen = len(steps())
            until("twelve further steps", lambda seen=seen: len(steps()) > seen + 12)
            time.sleep(dice.uniform(0.0, 3.0))
            victim = dice.choice(psutil.Process(process.pid).children())
            reached, killed = steps()[-1][0], time.time()
            victim.kill()
            until("the step again", lambda reached=reached, killed=killed: any(s > reached and t > killed + 0.5 for s, t in steps()))
            found.append(next(t for s, t in steps() if s > reached and t > killed + 0.5) - killed)
    finally:
        with contextlib.suppress(psutil.NoSuchProcess):
            children = psutil.Process(process.pid).children(recursive=True)
            process.kill()
            for child in children:
                child.kill()
        process.wait()
    return found


def test_recovery_time(tmp_path: pathlib.Path) -> None:
    with Launched(tmp_path, FLAGS, str(ROOT / "examples" / "train_gpt.py"), SIZE) as run:
        run.until_step(20)
        dice, incidents = random.Random(KILLS), {True: [], False: []}
        for number in range(KILLS):
            run.until_standbys(1)
            time.sleep(dice.uniform(0.3, 1.0))
            shadowed = number % 2 == 0
            shadow = run.status()["standbys"][0]["shadow"]
            rank = shadow if shadowed else (shadow + 1 + number // 2 % 3) % 4
            closed = len(run.incidents())
            run.signal(rank, signal.SIGKILL)
            run.until(lambda closed=closed: len(run.incidents()) > closed, "the incident to be closed")
            incident = run.incidents()[-1]
            assert incident["steps_lost"] == 0, incident
            incidents[shadowed].append(incident)
        step, setup, bandwidth = step_s(run), statistics.median(setups_s(run)), loopback_bytes_s()
    bound = 3 * step + 0.25 + STATE / bandwidth
    theirs = summary(under_torchrun(tmp_path))
    deaths = [e["detect"] for e in (*incidents[True], *incidents[False])]
    told(
        "recovery",
        [
            row("shadowed chair", incidents[True], bound),
            row("another chair", incidents[False], bound + setup),
            {"killed": "under torchrun", **theirs},
        ],
        step_s=round(step, 3),
        setup_s=round(setup, 3),
        state_mb=STATE // 10**6,
        loopback_gb_s=round(bandwidth / 1e9, 2),
        death_seen_max_s=round(max(deaths), 4),
    )
