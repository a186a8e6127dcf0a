"""From a fork of the zygote to the first backward, beside a cold start of the same script (`pytest -m bench -s tests/bench/test_zygote.py`).

The script does not use this library: what is measured is the process alone. A killed rank makes its agent fork both ranks again.
"""

from __future__ import annotations

import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import pytest
from launched import Launched

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from told import summary, told

pytestmark = [pytest.mark.bench, pytest.mark.timeout(600)]

TIMES = 7
SCRIPT = """
import os, time, torch
torch.manual_seed(0)
net = torch.nn.Sequential(torch.nn.Linear(256, 256), torch.nn.ReLU(), torch.nn.Linear(256, 1))
net(torch.randn(8, 256)).sum().backward()
print(f"first backward at {time.time():.6f} pid {os.getpid()}", flush=True)
while "RANK" in os.environ:
    time.sleep(1)
"""


def backwards(text: str) -> dict[int, float]:
    """pid -> unix seconds."""
    return {int(pid): float(at) for at, pid in re.findall(r"first backward at ([\d.]+) pid (\d+)", text)}


def test_zygote(tmp_path: pathlib.Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    cold, warm = [], []
    env = {name: value for name, value in os.environ.items() if name != "RANK"}
    for _ in range(TIMES):
        begin = time.time()
        done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=True, env=env)
        cold.append(next(iter(backwards(done.stdout).values())) - begin)
    with Launched(tmp_path, ["--nproc-per-node", "1", "--max-restarts", "1000"], str(script)) as run:
        for number in range(TIMES):
            run.until(lambda number=number: len(backwards(run.text())) > number, "a first backward")
            os.kill(list(backwards(run.text()))[-1], signal.SIGKILL)
        run.until(lambda: len(backwards(run.text())) > TIMES, "the last first backward")
        seen, started = backwards(run.text()), run.events("worker_started")
        warm = [seen[e["pid"]] - e["t"] for e in started[1:] if e["pid"] in seen]
    told("zygote", [{"start": "a fork of the zygote", **summary(warm)}, {"start": "cold", **summary(cold)}])
