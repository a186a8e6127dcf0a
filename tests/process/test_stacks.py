"""What a process does is read from outside also when it cannot answer; where that cannot be, it is said why."""

from __future__ import annotations

import asyncio
import os
import pathlib
import signal
import subprocess
import sys
import time

import psutil
import pytest
from resilient_agents import stacks
from resilient_agents.evidence import Flight

pytestmark = pytest.mark.process

PROGRAM = """
import re
def stuck():
    print("here", flush=True)
    re.match(r"(a+)+$", "a" * 60 + "b")
stuck()
"""


@pytest.mark.parametrize("number", [0, signal.SIGSTOP])
def test_a_process_that_holds_the_gil_and_one_that_is_stopped(number: int) -> None:
    if stacks.program() is None:
        pytest.skip("py-spy is not installed")
    with subprocess.Popen([sys.executable, "-c", PROGRAM], stdout=subprocess.PIPE) as child:
        try:
            assert child.stdout is not None
            child.stdout.readline()
            os.kill(child.pid, number)
            until = time.monotonic() + 10
            while number and psutil.Process(child.pid).status() != psutil.STATUS_STOPPED and time.monotonic() < until:
                pass
            found, why = asyncio.run(stacks.peep(child.pid))
        finally:
            child.kill()
    if "ermission" in why:
        pytest.skip(why)
    assert "stuck (<string>:" in found, why


def test_why_there_is_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    with subprocess.Popen(["true"]) as child:
        child.wait()
    found, why = asyncio.run(stacks.peep(child.pid))
    assert not found
    assert why
    slow = tmp_path / "py-spy"
    slow.write_text("#!/bin/sh\nexec sleep 60\n")
    slow.chmod(0o755)
    monkeypatch.setattr(stacks, "program", lambda: str(slow))
    monkeypatch.setattr(stacks, "PEEP_S", 0.2)
    assert asyncio.run(stacks.peep(os.getpid())) == ("", "py-spy took more than 0 s")
    monkeypatch.setattr(stacks, "program", lambda: None)
    assert "not installed" in asyncio.run(stacks.peep(os.getpid()))[1]


def test_a_dump_of_the_flight_recorder_is_kept_if_it_is_of_now(tmp_path: pathlib.Path) -> None:
    flight = Flight.of(
        {"TORCH_NCCL_DEBUG_INFO_TEMP_FILE": str(tmp_path / "trace_"), "TORCH_NCCL_DEBUG_INFO_PIPE_FILE": str(tmp_path / "p")}
    )
    (tmp_path / "trace_3").write_bytes(b"dump")
    flight.copy(3, tmp_path / "kept", time.time() - 5)
    assert (tmp_path / "kept").read_bytes() == b"dump"
    flight.copy(3, tmp_path / "old", time.time() + 5)
    flight.copy(4, tmp_path / "none", 0.0)
    assert not (tmp_path / "old").exists()
    assert not (tmp_path / "none").exists()
    flight.ask(3)  # nobody listens
    os.mkfifo(tmp_path / "p3.pipe")
    reader = os.open(tmp_path / "p3.pipe", os.O_RDONLY | os.O_NONBLOCK)
    flight.ask(3)
    assert os.read(reader, 8) == b"1\n"
    os.close(reader)
    Flight().ask(3)
    Flight().copy(3, tmp_path / "none", 0.0)
