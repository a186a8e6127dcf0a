"""A launcher as seen from outside: started for real, looked at through /proc and its files, ended by its own pid.

A `Run` is one launcher. It is killed with SIGKILL at the end of its test, if it has not ended; its workers and its zygote then die with
it (that is one of the things we promise), and those that do not are killed one by one, by pid, and make the test fail.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest

ROOT = Path(__file__).parents[2]
T = TypeVar("T")


def environment(**extra: str) -> dict[str, str]:
    """Ours without anything of a run around us, and with the checkout on the path."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("RESILIENT_", "TORCHELASTIC_", "PET_"))}
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS"):
        clean.pop(name, None)
    path = [str(ROOT), str(ROOT / "agents"), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**clean, "PYTHONPATH": os.pathsep.join(path), **extra}


def wait_for(what: str, found: Callable[[], T], timeout_s: float = 30.0) -> T:
    """Poll until `found()` is true; its value. Fails with `what` after the timeout."""
    until = time.monotonic() + timeout_s
    while not (value := found()):
        if time.monotonic() > until:
            pytest.fail(f"waited {timeout_s} s in vain for: {what}")
        time.sleep(0.01)
    return value


def alive(pid: int) -> bool:
    """Whether the process exists and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0] not in (b"Z", b"X")
    except OSError:
        return False


def descendants(pid: int) -> set[int]:
    """Pids of all processes under `pid`."""
    parents: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                parent = int((entry / "stat").read_bytes().rpartition(b")")[2].split()[1])
                parents.setdefault(parent, []).append(int(entry.name))
    found: set[int] = set()
    front = [pid]
    while front:
        front = [child for parent in front for child in parents.get(parent, [])]
        found.update(front)
    return found


class Run:
    """One `resilient-run` process (or another launcher, for comparison)."""

    def __init__(self, command: list[str], run_dir: Path, cwd: Path, env: dict[str, str]) -> None:
        self.run_dir = run_dir
        self._out = cwd / f"out.{time.monotonic_ns()}.txt"
        self._family: set[int] = set()
        with self._out.open("wb") as out:
            self.process = subprocess.Popen(command, cwd=cwd, env=env, stdout=out, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
        self.pid = self.process.pid

    @property
    def output(self) -> str:
        """All that it has said so far."""
        return self._out.read_text(errors="replace")

    def wait(self, timeout_s: float = 60.0) -> int:
        """Its exit code."""
        self.look()
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            pytest.fail(f"no end after {timeout_s} s; it said:\n{self.output}")

    def look(self) -> set[int]:
        """Pids under it now; all that were ever seen are expected to be gone in the end."""
        now = descendants(self.pid)
        self._family |= now
        return now

    def status(self) -> dict[str, Any]:
        """status.json, {} before there is one."""
        try:
            return json.loads((self.run_dir / "status.json").read_text())
        except FileNotFoundError:
            return {}

    def events(self, name: str = "") -> list[dict[str, Any]]:
        """events.jsonl, all or those of one name."""
        try:
            lines = (self.run_dir / "events.jsonl").read_text().splitlines()
        except FileNotFoundError:
            return []
        return [event for event in map(json.loads, lines) if not name or event["event"] == name]

    def said(self, text: str, count: int = 1, timeout_s: float = 30.0) -> None:
        """Wait until the output has this text `count` times."""
        wait_for(
            f"{text!r} in the output, which is:\n{self.output}", lambda: self.output.count(text) >= count or not alive(self.pid), timeout_s
        )
        assert self.output.count(text) >= count, self.output
        self.look()

    def pids(self, count: int) -> list[int]:
        """Pids of the ranks, in order, when there are `count`."""

        def all_there() -> list[int]:
            ranks = sorted(self.status().get("ranks", ()), key=lambda row: row["rank"])
            pids = [row["pid"] for row in ranks]
            return pids if len(pids) == count and all(pids) else []

        pids = wait_for(f"{count} ranks in status.json", all_there)
        self.look()
        return pids

    def nothing_left(self, timeout_s: float = 5.0) -> None:
        """No process and no file of it is there any more."""
        left: set[int] = set()

        def gone() -> bool:
            nonlocal left
            left = {pid for pid in self._family if alive(pid)}
            return not left

        with contextlib.suppress(BaseException):
            wait_for("all processes to end", gone, timeout_s)
        assert not left, {pid: Path(f"/proc/{pid}/cmdline").read_bytes() for pid in left}
        assert not list(Path("/dev/shm").glob(f"resilient.{self.pid}-*"))

    def end(self) -> None:
        """Whatever the test did: nothing goes on."""
        self.look()
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        until = time.monotonic() + 5.0
        while any(map(alive, self._family)) and time.monotonic() < until:
            time.sleep(0.01)
        left = [pid for pid in self._family if alive(pid)]
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for path in Path("/dev/shm").glob(f"resilient.{self.pid}-*"):
            path.unlink(missing_ok=True)
        assert not left, f"outlived their launcher: {left}"
