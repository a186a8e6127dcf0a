"""NVML state through the probe engine, in real time: from the change of a GPU to the finding, and to its end. Prints how long each took."""

from __future__ import annotations

import importlib.util
import json
import os
import select
import subprocess
import sys
import time
from typing import Self

import pytest
from puppets import ROOT, Puppets, compiled, device, entries

pytestmark = [
    pytest.mark.process,
    pytest.mark.long,
    pytest.mark.skipif(importlib.util.find_spec("pynvml") is None, reason="needs nvidia-ml-py"),
    pytest.mark.skipif(importlib.util.find_spec("resilient_agents.engine") is None, reason="needs the probe engine"),
]
PATIENCE_S = 60  # twice the longest period

WATCH = """
import importlib, json, select, sys
import msgspec
from resilient_agents import engine, instruments
from resilient_agents.probes import nvml
from resilient_agents.sightings import Begin
entries, root = json.loads(sys.argv[1]), sys.argv[2]
def loader(place):
    module, _, kind = place.partition(":")
    return lambda: getattr(importlib.import_module(module), kind)
instruments.find = lambda only=(), without=(): {name: loader(place) for name, place in entries.items()}
nvml.Gauge.timeout_s = 3.0  # the test has less patience than a node
watch = engine.Engine()
watch.start(Begin(root=root, scopes=("node",)))
while True:
    ready = select.select([watch.fd, sys.stdin], [], [], 1.0)[0]
    if sys.stdin in ready:
        break
    for found in watch.news():
        print(json.dumps(msgspec.to_builtins(found)), flush=True)
"""


def test_from_the_gpu_to_the_finding(tmp_path):
    puppets = Puppets(tmp_path, compiled(tmp_path))
    ours = {name: place for name, place in entries().items() if name.startswith("nvml-")}
    paths = {"LD_LIBRARY_PATH": str(tmp_path), "FAKE_NVML": str(puppets.file), "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'agents'}"}
    command = [sys.executable, "-c", WATCH, json.dumps(ours), str(puppets.root)]
    watch = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, **paths})
    try:
        with Awaited(watch) as awaited:
            assert awaited.quiet(3)
            puppets.set("", event_1="3 8 79")
            awaited("xid", "79", "replace", device(3))
            puppets.set(2, lost=15)
            awaited("gpu-lost", "15", "replace", device(2))
            puppets.set(2, lost=None)
            awaited("gpu-lost", "15", "ignore", device(2), clears=True)
            puppets.set(3, field_230=1)
            awaited("recovery-action", "reset", "gpu-reset", device(3))
            puppets.set(5, field_145=1)
            awaited("ecc", "row-remap-failure", "cordon", device(5))
            puppets.lines["4.hang.nvmlDeviceGetCurrPcieLinkWidth"] = 1
            puppets.write()
            awaited("nvml-hang", "", "gpu-reset", device(4))
            puppets.drop("4.hang")
            awaited("nvml-hang", "", "ignore", device(4), clears=True)
    finally:
        watch.kill()
        watch.wait()


class Awaited:
    """What the watcher says, line by line, each with a limit."""

    def __init__(self, watch: subprocess.Popen[str]) -> None:
        self.watch = watch

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for pipe in (self.watch.stdin, self.watch.stdout):
            assert pipe is not None
            pipe.close()

    def quiet(self, seconds: float) -> bool:

        return not select.select([self.watch.stdout], [], [], seconds)[0]

    def __call__(self, kind: str, code: str, class_: str, where: str, *, clears: bool = False) -> None:

        began = time.monotonic()
        assert not self.quiet(PATIENCE_S), f"{kind} {code} expected within {PATIENCE_S} s, nothing found"
        found = json.loads(self.watch.stdout.readline())
        assert (found["kind"], found.get("code", ""), found["class"], found["device"], found.get("clears", False)) == (
            kind,
            code,
            class_,
            where,
            clears,
        )
        print(f"{kind} {code}{' is over' if clears else ''}: {time.monotonic() - began:.2f} s")
