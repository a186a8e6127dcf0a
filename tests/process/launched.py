"""A run under `resilient-run`, as a test sees it: started for real, watched through its files, ended by its own pids.

with Launched(tmp_path, ["--nproc-per-node", "3"], "job.py", ["--steps", "20"]) as run:
    run.until_step(5)
    run.kill(rank=1)
    assert run.wait() == 0
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any, Self

import psutil

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

JOBS = pathlib.Path(__file__).with_name("jobs")
ROOT = pathlib.Path(__file__).parents[2]
DEADLINE_S = 180.0


class Launched:
    """One `resilient-run` process and its run directory."""

    def __init__(
        self,
        where: pathlib.Path,
        flags: Sequence[str],
        job: str,
        arguments: Sequence[str] = (),
        *,
        name: str = "run",
        standalone: bool = True,
        env: dict[str, str] | None = None,
    ) -> None:
        """Starts in `with`. where: a directory of the test's own."""
        self.directory = where / name
        self.output = where / f"{name}.out"
        program = [str(JOBS / job)] if job.endswith(".py") and "/" not in job else [job]
        head = [sys.executable, "-m", "resilient.run", *(["--standalone"] if standalone else [])]
        self.command = [*head, "--run-dir", str(self.directory), *flags, *program, *arguments]
        paths = os.pathsep.join([str(ROOT), str(ROOT / "agents"), os.environ.get("PYTHONPATH", "")])
        no_step_lost = {"RESILIENT_SNAPSHOT_EVERY": "1"}
        self.env = {**no_step_lost, **os.environ, "PYTHONPATH": paths, **(env or {})}
        self.process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        """Start."""
        with self.output.open("wb") as output:
            self.process = subprocess.Popen(self.command, stdout=output, stderr=subprocess.STDOUT, env=self.env, start_new_session=True)
        return self

    def __exit__(self, *_: object) -> None:
        """End whatever is left of it: its own descendants, and the workers its files name."""
        assert self.process is not None
        pids = {child.pid for child in self.descendants()}
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def descendants(self) -> list[psutil.Process]:
        """Every process below the launcher."""
        assert self.process is not None
        try:
            return psutil.Process(self.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []

    def kill_all(self) -> None:
        """SIGKILL for every process of this node at once: the agent first, it must not live to tell what became of the others."""
        assert self.process is not None
        below = self.descendants()
        self.process.kill()
        for child in below:
            with contextlib.suppress(psutil.NoSuchProcess):  # it died with its agent
                child.kill()

    # ------------------------------------------------------------------ watching

    def text(self) -> str:
        """All that was printed."""
        return self.output.read_text(errors="replace")

    def events(self, kind: str | None = None) -> list[dict[str, Any]]:
        """The events so far, of one kind or all."""
        file = self.directory / "events.jsonl"
        if not file.exists():
            return []
        rows = [json.loads(line) for line in file.read_text().splitlines(keepends=True) if line.endswith("\n")]
        return [row for row in rows if kind is None or row["event"] == kind]

    def status(self) -> dict[str, Any]:
        """status.json."""
        file = self.directory / "status.json"
        return json.loads(file.read_text()) if file.exists() else {"state": "forming", "ranks": [], "standbys": [], "round": 0}

    def until(self, what: Callable[[], Any], why: str, deadline_s: float = DEADLINE_S) -> Any:
        """Wait until `what()` is true, and return it; fails with the output when the run ends or the deadline passes first."""
        assert self.process is not None
        end = time.monotonic() + deadline_s
        while True:
            found = what()
            if found:
                return found
            ended = self.process.poll()
            if ended is not None:
                raise AssertionError(f"the run ended ({ended}) before {why}\n{self.text()}")
            if time.monotonic() > end:
                raise AssertionError(f"{why}: not within {deadline_s} s\n{self.text()}\n{self.status()}\n{self.events()[-20:]}")
            time.sleep(0.01)

    def until_step(self, step: int) -> None:
        """Every rank has completed `step` steps (as status.json says)."""
        self.until(lambda: self.status()["ranks"] and all(r["step"] >= step for r in self.status()["ranks"]), f"step {step}")

    def until_standbys(self, count: int) -> None:
        """So many standbys are parked."""
        self.until(lambda: sum(s["ready"] for s in self.status()["standbys"]) >= count, f"{count} standbys parked")

    def pid(self, rank: int) -> int:
        """The process that sits on `rank` now, or will soon: a chair may be empty for a moment, and 0 is no process to be signalled."""
        return int(self.until(lambda: self.pids().get(rank), f"somebody on rank {rank}"))

    def pids(self) -> dict[int, int]:
        """Rank to process."""
        return {row["rank"]: row["pid"] for row in self.status()["ranks"]}

    def signal(self, rank: int, number: int = signal.SIGKILL) -> int:
        """Send a signal to the process on `rank`; returns its pid."""
        pid = self.pid(rank)
        os.kill(pid, number)
        return pid

    def incidents(self) -> list[dict[str, Any]]:
        """The closed incidents."""
        return self.events("incident_closed")

    def wait(self, deadline_s: float = DEADLINE_S) -> int:
        """Wait for the end; the exit code."""
        assert self.process is not None
        try:
            return self.process.wait(deadline_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"the run did not end\n{self.text()}\n{self.status()}\n{self.events()[-30:]}") from None


def digests(directory: pathlib.Path, world_size: int) -> list[str]:
    """What every rank of a job wrote at its end."""
    return [(directory / f"digest-{rank}").read_text() for rank in range(world_size)]
