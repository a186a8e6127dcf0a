"""A damaged checkpoint under a real run: it goes on from the one before, ends with the bits of an undisturbed run, and mends what was damaged."""

from __future__ import annotations

import contextlib
import functools
import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable

import pytest
import tally
from launched import Launched, digests

from resilient.checkpoint.disk import DiskTier

pytestmark = [pytest.mark.process, pytest.mark.long]
WORLD, EVERY, FIRST, LAST = 2, 3, 9, 12
FEATURES = {"ddp": "bn,dropout,sched,stream", "fsdp": "dropout,sched,stream"}


def flags(kept: pathlib.Path) -> list[str]:
    return ["--nproc-per-node", str(WORLD), "--checkpoint", str(kept), "--checkpoint-every", str(EVERY)]


def job(out: pathlib.Path, kind: str, steps: int, *more: str) -> list[str]:
    return ["--out", str(out), "--kind", kind, "--features", FEATURES[kind], "--steps", str(steps), "--pause", "0.05", *more]


@functools.cache
def prepared(kind: str) -> tuple[pathlib.Path, tuple[str, ...]]:
    """The checkpoints of a run that ended at step FIRST, and what one that nobody stopped ends with at LAST."""
    where = pathlib.Path(tempfile.mkdtemp(prefix="prepared-"))
    with Launched(where, flags(where / "kept"), "job.py", job(where / "out", kind, FIRST)) as run:
        assert run.wait() == 0, run.text()
    assert DiskTier(str(where / "kept")).whole() == (3, 6, 9), run.text()
    with Launched(where, ["--nproc-per-node", str(WORLD)], "job.py", job(where / "whole", kind, LAST), name="whole-run") as run:
        assert run.wait() == 0, run.text()
    return where / "kept", tuple(digests(where / "whole", WORLD))


def flip(path: pathlib.Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 8
    path.write_bytes(data)


def swap(one: pathlib.Path, two: pathlib.Path) -> None:
    first = one.read_bytes()
    one.write_bytes(two.read_bytes())
    two.write_bytes(first)


def rank(step: pathlib.Path, number: int) -> pathlib.Path:
    return step / f"rank-{number:05d}.distcp"


DAMAGE: dict[str, Callable[[pathlib.Path], None]] = {
    "rank file: a byte flipped": lambda step: flip(rank(step, 1)),
    "rank file: cut short": lambda step: os.truncate(rank(step, 0), 1000),
    "rank file: missing": lambda step: rank(step, 1).unlink(),
    "rank files: exchanged": lambda step: swap(rank(step, 0), rank(step, 1)),
    "rank file: of the step before": lambda step: shutil.copyfile(rank(step.with_name("step-00000006"), 0), rank(step, 0)) and None,
    "COMMIT.json: a byte flipped": lambda step: flip(step / "COMMIT.json"),
    "COMMIT.json: empty": lambda step: os.truncate(step / "COMMIT.json", 0),
    "COMMIT.json: missing": lambda step: (step / "COMMIT.json").unlink(),
    "COMMIT.json: of the step before": lambda step: (
        shutil.copyfile(step.with_name("step-00000006") / "COMMIT.json", step / "COMMIT.json") and None
    ),
}


@pytest.mark.parametrize("kind", ["fsdp", "ddp"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_run_goes_on_from_the_checkpoint_before(tmp_path: pathlib.Path, kind: str, damage: str) -> None:
    kept, expected = prepared(kind)
    shutil.copytree(kept, tmp_path / "kept")
    DAMAGE[damage](tmp_path / "kept/step-00000009")
    with Launched(tmp_path, flags(tmp_path / "kept"), "job.py", job(tmp_path / "out", kind, LAST)) as run:
        assert run.wait() == 0, run.text()
    (refused,) = [f for f in run.events("finding") if f["kind"] == "refused"][:1] or [None]
    if damage != "COMMIT.json: missing":  # then there is no such step, and nothing to be told
        assert refused is not None, run.events()
        assert "\n" not in refused["text"]
        assert "step-00000009/" in refused["text"]
    assert [row["step"] for row in run.events("round_started")][-1] == 6
    assert len(run.events("round_started")) <= 2, "it was not tried again and again"
    assert tuple(digests(tmp_path / "out", WORLD)) == expected
    tier = DiskTier(str(tmp_path / "kept"))
    assert tier.steps() == (6, 9, 12), "step 9 is committed anew"
    for step in tier.steps():
        tier.verify(step)
    tally.count(f"resilient-run, {kind}", damage, "found")


@pytest.mark.parametrize("kind", ["ddp"])
def test_the_last_step_of_a_run_is_damaged(tmp_path: pathlib.Path, kind: str) -> None:
    """The run is over, is started once more, does the last steps again, and leaves a checkpoint of them that is sound."""
    kept, _ = prepared(kind)
    shutil.copytree(kept, tmp_path / "kept")
    flip(tmp_path / "kept/step-00000009/rank-00001.distcp")
    with Launched(tmp_path, flags(tmp_path / "kept"), "job.py", job(tmp_path / "out", kind, FIRST)) as run:
        assert run.wait() == 0, run.text()
    DiskTier(str(tmp_path / "kept")).verify(FIRST)
    tally.count(f"resilient-run, {kind}", "the last step of a run: a byte flipped", "found")


@pytest.mark.parametrize("kind", ["fsdp"])
def test_every_checkpoint_is_damaged(tmp_path: pathlib.Path, kind: str) -> None:
    """Then there is nothing to go on from, and a run that quietly began anew would be the worst of all."""
    kept, _ = prepared(kind)
    shutil.copytree(kept, tmp_path / "kept")
    for step in (3, 6, 9):
        flip(tmp_path / f"kept/step-{step:08d}/rank-00000.distcp")
    with Launched(tmp_path, flags(tmp_path / "kept"), "job.py", job(tmp_path / "out", kind, LAST)) as run:
        assert run.wait() == 1, run.text()
    assert "every committed checkpoint was refused" in run.text()
    with contextlib.suppress(FileNotFoundError):
        assert not list((tmp_path / "out").glob("digest-*"))
    assert DiskTier(str(tmp_path / "kept")).steps() == (3, 6, 9), "they are left as they are"
    tally.count(f"resilient-run, {kind}", "every checkpoint: a byte flipped", "found")
