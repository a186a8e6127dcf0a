"""Probes under a real run: what they see is in events.jsonl, and nothing that they do to themselves hurts the run."""

from __future__ import annotations

import contextlib
import functools
import pathlib
import time

import psutil
import pytest
from installed import path_with
from launched import Launched
from resilient_agents.probe import Roster, Surroundings
from resilient_agents.probes.storage import Storage

pytestmark = pytest.mark.process

LOST = "NVRM: Xid (PCI:0000:3b:00): 79, pid='<unknown>', name=<unknown>, GPU has fallen off the bus."
NCCL = "[rank1]:[E1122 09:00:00.1 ProcessGroupNCCL.cpp:2057] [PG ID 0 PG GUID 0 Rank 1] Process group watchdog thread terminated with exception: NCCL error: remote process exited or there was a network error"
SCRIPT = f"""
import os, pathlib, sys, time
here = pathlib.Path(sys.argv[1])
while not (here / "enough").exists():
    time.sleep(0.02)
    if os.environ["RANK"] == "1" and (here / "say").exists():
        (here / "say").unlink()
        print({NCCL!r}, file=sys.stderr, flush=True)
"""
PROBE = """
import ctypes, time
class Probe:
    name = NAME
    period_s = 0.2
    timeout_s = 1.0
    def __init__(self, surroundings):
        pass
    def check(self, now):
        ACT
"""


def bad(name: str, act: str) -> tuple[dict[str, str], dict[str, str]]:
    """A package with one probe that does this."""
    return {name: f"{name}_probe:Probe"}, {f"{name}_probe": PROBE.replace("NAME", repr(name)).replace("ACT", act)}


def host(where: pathlib.Path) -> pathlib.Path:
    """A machine with a kernel log and nothing else."""
    (where / "dev").mkdir(parents=True)
    (where / "dev/kmsg").touch()
    return where


def fails(run: Launched, name: str, text: str) -> bool:
    return any(name in str(row["text"]) and text in str(row["text"]) for row in found(run, "probe-fails"))


def found(run: Launched, kind: str, **more: object) -> list[dict[str, object]]:
    return [row for row in run.events("finding") if row["kind"] == kind and all(row.get(k) == v for k, v in more.items())]


def test_what_probes_see_is_told_and_what_they_suffer_is_theirs_alone(tmp_path):
    root = host(tmp_path / "host")
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    path = path_with(
        tmp_path / "site",
        hangs=bad("hangs", "time.sleep(3600)"),
        raises=bad("raises", "raise ValueError('not today')"),
        crashes=bad("crashes", "time.sleep(1) or ctypes.string_at(0)"),
        leaves=bad("leaves", "raise SystemExit(3)"),
        lies=bad("lies", "return ['no finding']"),
        missing=({"missing": "no_such_module:Probe"}, {}),
    )
    flags = ["--nproc-per-node", "2", "--probe-root", str(root), "--probe-socket", ""]
    with Launched(tmp_path, flags, str(script), [str(tmp_path)], env={"PYTHONPATH": path}) as run:
        run.until(lambda: run.text().count("prober has ended") >= 2, "the prober was brought down twice")
        (tmp_path / "say").touch()
        assert run.text().count("in the probe crashes") == 2
        assert found(run, "prober-lost")  # what is the same within seconds is told once
        stamp = int(time.monotonic() * 1e6)  # while there is no prober
        with (root / "dev/kmsg").open("a") as log:
            log.write(f"4,1201,{stamp},-;{LOST}\n")
        run.until(lambda: found(run, "xid"), "the kernel's line is a finding")
        run.until(lambda: [row for row in run.events("finding") if row["rank"] == 1], "what rank 1 said is a finding")
        run.until(lambda: found(run, "probe-hangs"), "one hangs")
        for name, text in {
            "raises": "not today",
            "leaves": "SystemExit",
            "lies": "a known message expected",
            "missing": "no_such_module",
        }.items():
            run.until(functools.partial(fails, run, name, text), f"{name} fails")
        assert run.text().count("prober has ended") == 2
        (tmp_path / "enough").touch()
        assert run.wait() == 0, run.text()
        assert not run.descendants()


def test_a_prober_dies_with_its_run_and_may_be_switched_off(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)

    def probers(run: Launched) -> list[psutil.Process]:
        return [child for child in run.descendants() if "resilient_agents.prober" in " ".join(child.cmdline())]

    with Launched(tmp_path, ["--probe-root", str(host(tmp_path / "host"))], str(script), [str(tmp_path)]) as run:
        (prober,) = run.until(lambda: probers(run), "there is a prober")
        assert run.process is not None
        run.process.kill()
        prober.wait(10)
    with Launched(tmp_path, ["--probes", "off"], str(script), [str(tmp_path)], name="off") as run:
        run.until(lambda: run.status()["ranks"], "it runs")
        assert probers(run) == []
        (tmp_path / "enough").touch()
        assert run.wait() == 0, run.text()


def test_a_checkpoint_directory_that_is_full_says_so(small):
    with (small / "rest").open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(b"x" * 4096)
    probe = Storage(Surroundings(roster=lambda: Roster(checkpoint=str(small))))
    assert [(f.code, f.class_, f.role) for f in probe.check(0.0)] == [("ENOSPC", "app-restart", "context")]
