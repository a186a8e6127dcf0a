"""How long a fault goes unseen (`pytest -m bench -s tests/bench/test_detection.py`).

One real run of two ranks on a written machine (kernel log, sysfs, GPUs of the stand-in for NVIDIA's library). Each fault is put where it
shows; the clock of the injection, of the finding's line and of the verdict's line in events.jsonl is one. Where the verdict has a remedy on
one node, the incident's end is told, too. Nothing is asserted but that each fault was found: the machine's load is in the figures.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import signal
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parent))
sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "process"))
from disks import small_disk
from launched import Launched
from puppets import Puppets, compiled
from test_injected import LOST, PORT, alone, job, machine
from told import summary, told

pytestmark = [pytest.mark.bench, pytest.mark.timeout(1200)]
TIMES = 5
LINES = {
    "kernel log: Xid 79": (LOST, "xid"),
    "kernel log: lockup": ("watchdog: BUG: soft lockup - CPU#3 stuck for 22s! [python:4188]", "soft-lockup"),
}


class Stopwatch:
    """From an injection to what events.jsonl says of it."""

    def __init__(self, run: Launched) -> None:
        self.run = run
        self.rows: list[dict[str, Any]] = []
        self._seen = 0

    def measure(
        self, name: str, kind: str, inject: Callable[[int], None], *, times: int = TIMES, ends: bool = False, deadline_s: float = 90
    ) -> None:
        found, judged, ended = [], [], []
        for i in range(times):
            before = len(self.run.events())
            t = time.time()
            inject(i)
            t = time.time() if name == "endless loop" else t  # it begins by itself

            def line(event: str, before: int = before) -> dict[str, Any] | None:
                return next(
                    (r for r in self.run.events()[before:] if r["event"] == event and kind in {r.get("kind"), r.get("cause")}), None
                )

            found.append(self.run.until(lambda line=line: line("finding"), f"{name} to be found", deadline_s)["t"] - t)
            judged.append(self.run.until(lambda line=line: line("verdict"), f"{name} to be judged", deadline_s)["t"] - t)
            if ends:
                ended.append(self.run.until(lambda line=line: line("incident_closed"), f"{name} to be over", deadline_s)["t"] - t)
                if times > 1:
                    self.run.until_standbys(1)
        row = {"fault": name, "times": times}
        for label, values in (("finding", found), ("verdict", judged), ("remedied", ended)):
            if values:
                row |= {f"{label}_s": summary(values)["median_s"], f"{label}_max_s": summary(values)["max_s"]}
        self.rows.append(row)


@pytest.fixture
def small(tmp_path: pathlib.Path) -> Iterator[pathlib.Path]:
    with small_disk(tmp_path / "small") as directory:
        yield directory


def test_from_the_injection_to_the_verdict(tmp_path: pathlib.Path, small: pathlib.Path) -> None:
    root = machine(tmp_path / "host")
    puppets = Puppets(tmp_path, compiled(tmp_path), count=1)
    for name in ("sys/bus", "proc"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).symlink_to(puppets.root / name)
    env = {"LD_LIBRARY_PATH": str(tmp_path), "FAKE_NVML": str(puppets.file)}
    flags = ["--probe-root", str(root), "--checkpoint", str(small), "--checkpoint-every", "1000000"]
    with alone(tmp_path, flags, job(tmp_path, "--hold", "5", steps=1_000_000), **env) as run:
        run.until_standbys(1)
        (tmp_path / "go").touch()
        run.until_step(40)
        watch = Stopwatch(run)

        def kernel(line: str) -> Callable[[int], None]:
            def say(i: int) -> None:
                with (root / "dev/kmsg").open("a") as log:
                    log.write(f"4,{1200 + i},5140900,-;{line.replace('1a:00', f'{0x1A + i:02x}:00').replace('CPU#3', f'CPU#{i}')}\n")

            return say

        def words(i: int) -> None:
            (file,) = run.directory.glob("logs/*/attempt_0/1/stderr.log")
            with file.open("a") as log:
                log.write(PORT.replace("mlx5_2", f"mlx5_{i}") + "\n")

        for name, (line, kind) in LINES.items():
            watch.measure(name, kind, kernel(line))
        watch.measure("worker's words: NCCL", "nccl-warn", words)
        watch.measure("driver: recovery action", "recovery-action", lambda _: puppets.set(0, field_230=1), times=1)
        port = root / "sys/class/infiniband/mlx5_0/ports/1"
        watch.measure("sysfs: port down", "ib-link", lambda _: (port / "state").write_text("1: DOWN\n"), times=1)

        def fill(_: int) -> None:
            with contextlib.suppress(OSError), (small / "others").open("wb", buffering=0) as file:
                while True:
                    file.write(bytes(1 << 16))

        watch.measure("checkpoint disk full", "disk-full", fill, times=1)

    def send(number: int) -> Callable[[int], None]:
        return lambda _: (watch.run.signal(1, number), None)[1]

    with alone(tmp_path / "signals", [], job(tmp_path / "signals", "--hold", "5", steps=1_000_000)) as run:
        run.until_standbys(1)
        (tmp_path / "signals" / "go").touch()
        run.until_step(40)
        watch.run = run
        watch.measure("SIGKILL", "exit", send(signal.SIGKILL), ends=True)
        watch.measure("SIGSTOP", "stopped", send(signal.SIGSTOP), ends=True)
    with alone(tmp_path / "loop", [], job(tmp_path / "loop", "--strike", "1:60:spin:forward", steps=80)) as run:
        marker = tmp_path / "loop" / "struck-1-60-spin-forward"
        watch.run = run
        watch.measure("endless loop", "stalled", lambda _: run.until(marker.exists, "the loop to begin") and None, times=1, ends=True)
        assert run.wait() == 0
    told("detection", watch.rows, steps_s=0.05, cores=os.cpu_count())
