"""Snapshots that are copied beside forward and backward: real processes, killed while their copies are half done.

What a side stream does on a GPU is done here by a thread that copies host tensors (RESILIENT_CAPTURE=behind, set by the job's feature
`late`), so slowly that every copy is under way when the next body ends. The oracle: the bits of a run that copies nothing beside anything, and has no fault.
The two runs with sabotage show that the oracle would see it: without the gate's wait, and without the second net below it.
"""

from __future__ import annotations

import functools
import os
import pathlib
import random
import signal
import tempfile
import time

import pytest
from launched import Launched, digests

pytestmark = pytest.mark.process

LONG = pytest.mark.long
STEPS = 12
OFTEN = ("--snapshot-every", "1")
DDP, FSDP = "bn,dropout,sched,two,ema,average,stream", "dropout,sched,clip,stream"


def finals(where: pathlib.Path, kind: str, features: str, *more: str, world: int = 2, steps: int = STEPS) -> Launched:
    """A run through to its end; with a fault there is a standby for it."""
    flags = ["--nproc-per-node", str(world), "--standbys", str(int("--strike" in more)), *OFTEN]
    arguments = ["--out", str(where), "--kind", kind, "--features", features, "--steps", str(steps), *more]
    with Launched(where, flags, "job.py", arguments) as run:
        assert run.wait() == 0, f"{run.text()}\n{run.events()[-20:]}"
    return run


@functools.cache
def calm(kind: str, features: str, *, world: int = 2, steps: int = STEPS) -> tuple[str, ...]:
    """The digests of a run without any fault, whose snapshots are sealed before the next step begins."""
    where = pathlib.Path(tempfile.mkdtemp(prefix="calm-"))
    finals(where, kind, features, world=world, steps=steps)
    return tuple(digests(where, world))


def check(run: Launched, where: pathlib.Path, kind: str, features: str, *, world: int = 2, steps: int = STEPS) -> None:
    assert tuple(digests(where, world)) == calm(kind, features, world=world, steps=steps), f"{run.text()}\n{run.events()}"


@pytest.mark.parametrize(
    ("kind", "features", "world", "strikes"),
    [
        ("fsdp", FSDP, 2, "1:4:forward,0:8:between"),
        pytest.param("fsdp", FSDP, 3, "1:4:backward,0:7:optimizer_end", marks=LONG),
        pytest.param("fsdp", FSDP, 4, "2:4:optimizer,3:8:backward", marks=LONG),
        pytest.param("hsdp", "dropout,clip", 4, "1:5:forward,2:8:optimizer", marks=LONG),
        pytest.param("ddp", DDP, 2, "0:5:forward,1:8:optimizer_end", marks=LONG),
        pytest.param("ddp", DDP, 3, "2:3:between,0:6:backward,1:9:optimizer", marks=LONG),
        pytest.param("ddp", "bn,ema", 4, "3:5:collective,1:8:forward", marks=LONG),
    ],
)
def test_killed_while_the_copy_is_half_done(tmp_path: pathlib.Path, kind: str, features: str, world: int, strikes: str) -> None:
    run = finals(tmp_path, kind, f"{features},late", "--strike", strikes, world=world)
    check(run, tmp_path, kind, features, world=world)
    assert run.incidents(), run.text()
    assert all(incident["steps_lost"] <= 1 for incident in run.incidents())  # the one whose copy died half done
    assert "void" not in run.text()


@LONG
def test_without_the_gate_the_snapshot_would_be_torn(tmp_path: pathlib.Path) -> None:
    """The same kind of fault, with nobody waiting for the copy and nobody looking at what became of it: other weights."""
    run = finals(tmp_path, "fsdp", f"{FSDP},late,unwaited,unwatched", "--strike", "1:7:backward")
    assert [incident["steps_lost"] for incident in run.incidents()] == [1], run.text()  # back to a snapshot that was sealed too late
    assert tuple(digests(tmp_path, 2)) != calm("fsdp", FSDP)


@LONG
def test_what_was_torn_is_not_used(tmp_path: pathlib.Path) -> None:
    """Nobody waiting, but somebody looking."""
    run = finals(tmp_path, "fsdp", f"{FSDP},late,unwaited", "--strike", "1:7:backward")
    check(run, tmp_path, "fsdp", FSDP)
    assert "a snapshot is void" in run.text()


@LONG
def test_what_the_body_changes_itself_is_noticed(tmp_path: pathlib.Path) -> None:
    """Weights scaled by hand while they are copied: that snapshot is void, the next ones copy them first."""
    features = f"{FSDP},clamp"
    run = finals(tmp_path, "fsdp", f"{features},late", "--strike", "1:9:backward")
    check(run, tmp_path, "fsdp", features)
    assert run.text().count("a snapshot is void: model.") == 2, run.text()  # each of the first processes once; the third knows in time


@LONG
def test_what_is_persisted_was_complete(tmp_path: pathlib.Path) -> None:
    flags = ["--nproc-per-node", "2", "--standbys", "1", "--checkpoint", f"file://{tmp_path}/kept", "--checkpoint-every", "3", *OFTEN]
    common = ["--kind", "fsdp", "--features", f"{FSDP},late"]
    with Launched(tmp_path, flags, "job.py", ["--out", str(tmp_path / "before"), "--steps", "7", *common], name="first") as run:
        assert run.wait() == 0, run.text()
    assert sorted(path.parent.name for path in (tmp_path / "kept").glob("step-*/COMMIT.json")) == ["step-00000003", "step-00000006"]
    arguments = ["--out", str(tmp_path / "after"), "--steps", str(STEPS), "--strike", "0:8:forward", *common]
    with Launched(tmp_path, flags, "job.py", arguments, name="second") as run:
        assert run.wait() == 0, run.text()
    assert run.events("round_started")[0]["step"] == 6
    check(run, tmp_path / "after", "fsdp", FSDP)


@LONG
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_killed_at_random_moments(tmp_path: pathlib.Path, kind: str) -> None:
    """CHAOS_SEED=n repeats the choice of ranks and pauses."""
    seed = int(os.environ.get("CHAOS_SEED", random.SystemRandom().randrange(10**6)))
    print(f"seed {seed}")
    dice, world, steps, features = random.Random(seed), 3, 60, {"ddp": DDP, "fsdp": FSDP}[kind]
    arguments = ["--out", str(tmp_path), "--kind", kind, "--features", f"{features},late", "--steps", str(steps), "--pause", "0.02"]
    with Launched(tmp_path, ["--nproc-per-node", str(world), "--standbys", "1", *OFTEN], "job.py", arguments) as run:
        run.until_step(3)
        for count in range(1, 7):
            os.kill(run.pid(dice.randrange(world)), signal.SIGKILL)
            run.until(lambda count=count: len(run.incidents()) >= count, "the incident to be closed")
            time.sleep(dice.uniform(0.0, 0.3))
        assert run.wait() == 0, run.text()
    check(run, tmp_path, kind, features, world=world, steps=steps)
