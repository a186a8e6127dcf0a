"""A bit that flips in one replica's state is found when the next checkpoint is made, with step, tensor and rank."""

from __future__ import annotations

import collections
import pathlib

import pytest
from launched import Launched

from resilient.checkpoint.disk import DiskTier

pytestmark = pytest.mark.process


@pytest.mark.parametrize(("kind", "world"), [("ddp", 3), pytest.param("hsdp", 4, marks=pytest.mark.long)])
def test_a_flipped_bit_is_a_finding_and_never_a_checkpoint(tmp_path: pathlib.Path, kind: str, world: int) -> None:
    keep = ["--checkpoint", f"file://{tmp_path}/kept", "--checkpoint-every", "4"]
    arguments = ["--out", str(tmp_path), "--kind", kind, "--steps", "9", "--flip", "1:6"]
    with Launched(tmp_path, ["--nproc-per-node", str(world), *keep], "resized.py", arguments) as run:
        assert run.wait() == 0, run.text()
    assert {event["step"] for event in run.events("checkpoint_committed")} == {4}
    found = [event for event in run.events("finding") if event["kind"] == "replicas_differ"]
    assert {event["step"] for event in found} == {8}
    assert 1 in {event["rank"] for event in found}
    if kind == "ddp":
        assert {event["rank"] for event in found} == {1}, "two of three agree, so it is the third"
    assert "exp_avg" in found[0]["text"]
    assert "step 8" in found[0]["text"]
    assert (tmp_path / "kept" / "step-00000008" / "COMMIT.json").exists() is False


@pytest.mark.parametrize(("kind", "world"), [("ddp", 3), pytest.param("hsdp", 4, marks=pytest.mark.long)])
def test_what_replicas_hold_alike_is_written_once(tmp_path: pathlib.Path, kind: str, world: int) -> None:
    keep = ["--checkpoint", f"file://{tmp_path}/kept", "--checkpoint-every", "4"]
    arguments = ["--out", str(tmp_path), "--kind", kind, "--steps", "4"]
    with Launched(tmp_path, ["--nproc-per-node", str(world), *keep], "resized.py", arguments) as run:
        assert run.wait() == 0, run.text()
    whole = DiskTier(f"{tmp_path}/kept").checkpoint(4)
    written: collections.Counter[tuple[str, tuple[int, ...]]] = collections.Counter()
    writers = set()
    for rank in range(world):
        tail, layout = whole.tail(rank)
        for item in tail.items:
            row = layout.rows[item.row]
            if row.num_bytes and row.shape:
                written[row.key, row.offsets] += 1
                writers.add(rank)
    assert set(written.values()) == {1}
    assert writers == set(range(world)), "the work is shared"
