"""Snapshots that are copied beside forward and backward: real processes, killed while their copies are half done.

What a side stream does on a GPU is done here by a thread that copies host tensors (RESILIENT_CAPTURE=behind, set by the job's feature
`late`), so slowly that every copy is under way when the next body ends. The oracle: the bits of a run that copies nothing beside anything, and has no fault.
The two runs with sabotage show that the oracle would see it: without the gate's wait, and without the second net below it.
"""

from __future__ import annotations

import os
import pathlib
import random
import signal
import time

import pytest
from launched import Launched, digests

pytestmark = pytest.mark.process

STEPS = 12
DDP, FSDP = "bn,dropout,sched,two,ema,average,stream", "dropout,sched,clip,stream"


def finals(where: pathlib.Path, kind: str, features: str, *more: str, world: int = 3) -> Launched:
    """A run through to its end."""
    flags = ["--nproc-per-node", str(world), "--standbys", "1" if "--strike" in more else "0"]
    where.mkdir(exist_ok=True)
    arguments = ["--out", str(where), "--kind", kind, "--features", features, "--steps", str(STEPS), *more]
    with Launched(where, flags, "job.py", arguments) as run:
        assert run.wait() == 0, f"{run.text()}\n{run.events()[-20:]}"
    return run


def lost(run: Launched) -> int:
    assert run.incidents(), run.text()
    return sum(incident["steps_lost"] for incident in run.incidents())


LONG = pytest.mark.long


@pytest.mark.parametrize(
    ("kind", "features", "world", "strikes"),
    [
        ("ddp", DDP, 2, "0:5:forward,1:8:optimizer_end"),
        pytest.param("ddp", DDP, 3, "2:3:between,0:6:backward,1:9:optimizer", marks=LONG),
        pytest.param("ddp", "bn,ema", 4, "3:5:collective,1:8:forward", marks=LONG),
        ("fsdp", FSDP, 3, "1:4:forward,0:8:between"),
        pytest.param("fsdp", FSDP, 2, "0:4:backward,1:7:optimizer_end", marks=LONG),
        pytest.param("fsdp", FSDP, 4, "2:4:optimizer,3:8:backward", marks=LONG),
        pytest.param("hsdp", "dropout,clip", 4, "1:5:forward,2:8:optimizer", marks=LONG),
    ],
)
def test_killed_while_the_copy_is_half_done(tmp_path: pathlib.Path, kind: str, features: str, world: int, strikes: str) -> None:
    finals(tmp_path / "calm", kind, features, world=world)
    run = finals(tmp_path / "struck", kind, f"{features},late", "--strike", strikes, world=world)
    assert digests(tmp_path / "struck", world) == digests(tmp_path / "calm", world), f"{run.text()}\n{run.events()}"
    assert lost(run) <= len(strikes.split(","))  # a step whose copy died half done is made again, and no other one
    assert "void" not in run.text()


def test_without_the_gate_the_snapshot_would_be_torn(tmp_path: pathlib.Path) -> None:
    """The same kill, with nobody waiting for the copy and nobody looking at what became of it: other weights."""
    finals(tmp_path / "calm", "fsdp", FSDP, world=2)
    finals(tmp_path / "struck", "fsdp", f"{FSDP},late,unwaited,unwatched", "--strike", "1:7:backward", world=2)
    assert digests(tmp_path / "struck", 2) != digests(tmp_path / "calm", 2)


def test_what_the_body_changes_itself_is_noticed(tmp_path: pathlib.Path) -> None:
    """Weights scaled by hand while they are copied: that snapshot is void, the next ones copy them first."""
    finals(tmp_path / "calm", "fsdp", f"{FSDP},clamp", world=2)
    run = finals(tmp_path / "struck", "fsdp", f"{FSDP},clamp,late", "--strike", "1:9:backward", world=2)
    assert digests(tmp_path / "struck", 2) == digests(tmp_path / "calm", 2), f"{run.text()}\n{run.events()}"
    assert 1 <= run.text().count("a snapshot is void: model.") <= 3, run.text()  # each process once


def test_what_is_persisted_was_complete(tmp_path: pathlib.Path) -> None:
    url = f"file://{tmp_path}/kept"
    flags = ["--nproc-per-node", "2", "--standbys", "1", "--checkpoint", url, "--checkpoint-every", "3"]
    common = ["--kind", "fsdp", "--features", f"{FSDP},late"]
    finals(tmp_path / "calm", "fsdp", FSDP, world=2)
    before, after = tmp_path / "before", tmp_path / "after"
    with Launched(tmp_path, flags, "job.py", ["--out", str(before), "--steps", "7", *common], name="first") as run:
        assert run.wait() == 0, run.text()
    assert sorted(path.parent.name for path in (tmp_path / "kept").glob("step-*/COMMIT.json")) == ["step-00000003", "step-00000006"]
    arguments = ["--out", str(after), "--steps", str(STEPS), "--strike", "0:8:forward", *common]
    with Launched(tmp_path, flags, "job.py", arguments, name="second") as run:
        assert run.wait() == 0, run.text()
    assert run.events("round_started")[0]["step"] == 6
    assert digests(after, 2) == digests(tmp_path / "calm", 2)


@pytest.mark.long
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_killed_at_random_moments(tmp_path: pathlib.Path, kind: str) -> None:
    """CHAOS_SEED=n repeats the choice of ranks and pauses."""
    seed = int(os.environ.get("CHAOS_SEED", random.SystemRandom().randrange(10**6)))
    print(f"seed {seed}")
    dice, world, features = random.Random(seed), 3, {"ddp": DDP, "fsdp": FSDP}[kind]
    finals(tmp_path / "calm", kind, features, "--steps", "60", world=world)
    out = tmp_path / "struck"
    arguments = ["--out", str(out), "--kind", kind, "--features", f"{features},late", "--steps", "60", "--pause", "0.02"]
    with Launched(tmp_path, ["--nproc-per-node", str(world), "--standbys", "1"], "job.py", arguments) as run:
        run.until_step(3)
        for count in range(1, 9):
            os.kill(run.pid(dice.randrange(world)), signal.SIGKILL)
            run.until(lambda count=count: len(run.incidents()) >= count, "the incident to be closed")
            time.sleep(dice.uniform(0.0, 0.3))
        assert run.wait() == 0, run.text()
    assert digests(out, world) == digests(tmp_path / "calm", world), f"seed {seed}\n{run.text()}\n{run.events()}"
