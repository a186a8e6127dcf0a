"""What a fault-free run pays: CPU per collective and per step (`pytest -m bench -s tests/bench/test_overhead.py`).

One process each, so that nothing but our own work is measured: 10,000 collectives through a `Group` in loopback, beside the same number
on a plain gloo group of one; and the gate, own state and page of a step of an empty body. The bound: all of it together below 1 %
of a step of 100 ms with 16 collectives.
"""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from told import told

pytestmark = pytest.mark.bench

PROGRAM = """
import json, time, torch, torch.distributed as dist
from resilient.train.comm import Comm
from resilient.train.recorder import Recorder
from resilient.train.scope import Scope
from resilient.train.state import Tracked
from resilient.wire.page import Page
import tempfile, os

N = 10_000
page = Page(os.path.join(tempfile.mkdtemp(), "page"), create=True)
comm = Comm(rank=0, world_size=2, kind="gloo", scope=Scope(), recorder=Recorder(0, print, "off"), page=page)
group = comm.add(0, (0, 1))
plain = dist.ProcessGroupGloo(dist.HashStore(), 0, 1, dist.default_pg_timeout)
x = torch.ones(1)
def cpu(call, n=N):
    for _ in range(n // 10): call()
    begin = time.process_time()
    for _ in range(n): call()
    return (time.process_time() - begin) / n * 1e6
options = dist.AllreduceOptions()
ours = cpu(lambda: group.allreduce([x], options).wait())
gloo = cpu(lambda: plain.allreduce([x], options).wait())
model = torch.nn.Sequential(*[torch.nn.Linear(64, 64) for _ in range(24)])
opt = torch.optim.Adam(model.parameters())
tracked = Tracked(); tracked.add("model", model); tracked.add("opt", opt)
model(torch.ones(1, 64)).sum().backward(); opt.step()
own = cpu(tracked.own, 1000)
versions = cpu(tracked.versions, 1000)
write = cpu(lambda: page.write(round=1, step=1, phase="running", torn=False, marks_ns=(0, 0, 0, 0)))
def counted():
    page.enter(0)
    page.leave(0, time.monotonic_ns())
counters = cpu(counted)
step = 2 * own + versions + 3 * write + 16 * (ours + counters)
print(json.dumps([
    {"what": "a collective", "us": round(ours, 1), "times": 16, "gloo group of one, us": round(gloo, 1)},
    {"what": "its counters and how long it was waited for", "us": round(counters, 2), "times": 16},
    {"what": "own state", "us": round(own, 1), "times": 2},
    {"what": "versions of tracked tensors", "us": round(versions, 1), "times": 1},
    {"what": "record in the page", "us": round(write, 1), "times": 3},
    {"what": "a step", "us": round(step, 1), "share of 100 ms, %": round(step / 1000, 2), "bound, %": 1.0},
]))
"""


def test_overhead() -> None:
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    told("overhead", json.loads(done.stdout))
