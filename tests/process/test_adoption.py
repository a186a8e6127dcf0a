"""Agents that are killed, and started again: what they held in memory is taken over, and the run goes on from there.

The oracle is that of test_recovery.py: every bit of every rank's state is that of an undisturbed run.
"""

from __future__ import annotations

import pathlib
import random
import time
import uuid
from collections.abc import Sequence

import pytest
from launched import Launched, digests
from test_faults import job
from test_recovery import undisturbed

pytestmark = pytest.mark.process
WORLD, STEPS, FEATURES = 2, 70, "dropout,sched,stream"
PAUSE = ("--pause", "0.03")


class Killed:
    """One command line that is started again and again; what it holds in memory lies in a directory of the test's own."""

    def __init__(self, where: pathlib.Path, kind: str, *more: str, steps: int = STEPS) -> None:
        self.where, self.memory, self.run_id = where, where / "memory", f"job-{uuid.uuid4().hex[:6]}"
        self.memory.mkdir()
        self.arguments = job(where, *PAUSE, *more, kind=kind, features=FEATURES, steps=steps)
        self.keep = ["--checkpoint", f"file://{where}/kept", "--checkpoint-every", "0"]
        self.starts = 0

    def start(self, *flags: str, world: int = WORLD, arguments: Sequence[str] | None = None) -> Launched:
        """The next life of it."""
        self.starts += 1
        head = [
            "--nproc-per-node",
            str(world),
            "--rdzv-id",
            self.run_id,
            "--memory-dir",
            str(self.memory),
            "--log-level",
            "info",
            *self.keep,
            *flags,
        ]
        return Launched(self.where, head, "job.py", arguments or self.arguments, name=f"life{self.starts}", standalone=False)

    def segments(self) -> list[pathlib.Path]:
        """What lies in memory."""
        return sorted(self.memory.glob("resilient.*"))


def kill(run: Launched) -> None:
    run.kill_all()
    assert run.process is not None
    run.process.wait()


def begun(run: Launched) -> tuple[str, int]:
    """From where its first round had its state, and at which step."""
    first = run.events("round_started")[0]
    return first["tier"], first["step"]


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_a_killed_run_goes_on_from_memory(tmp_path: pathlib.Path, kind: str) -> None:
    """Killed at a random moment, and once more: hardly a step is lost although there is no checkpoint."""
    number = random.SystemRandom().randrange(1 << 30)
    print(f"seed {number}")
    dice = random.Random(number)
    lives = Killed(tmp_path, kind)
    with lives.start() as run:
        run.until_step(2)
        time.sleep(dice.uniform(0.0, 0.5))
        kill(run)
    done = max(row["step"] for row in run.status()["ranks"])
    with lives.start() as run:
        run.until(lambda: run.events("round_started"), "the first round")
        assert begun(run)[0] == "memory", f"{run.text()} {run.events()} {lives.segments()}"
        assert begun(run)[1] >= done - 2, (done, run.events("round_started"))
        run.until_step(begun(run)[1] + 1)
        time.sleep(dice.uniform(0.0, 0.3))
        kill(run)
    with lives.start() as run:
        assert run.wait() == 0, run.text()
        assert begun(run)[0] == "memory"
    rounds = [event["round"] for event in run.events("round_started")]
    assert rounds[0] >= 3, "rounds only grow, over all lives"
    assert tuple(digests(tmp_path, WORLD)) == undisturbed(kind, FEATURES, world=WORLD, steps=STEPS)
    assert not lives.segments(), "the run is over"
