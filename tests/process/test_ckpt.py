"""`resilient ckpt` on checkpoints of real runs: listed, verified, and read by torch.distributed.checkpoint as its own."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dist_checkpoint
from launched import Launched

from resilient.checkpoint import export as checkpoint_export
from resilient.checkpoint.disk import DiskTier
from resilient.checkpoint.layout import padded
from resilient.cli import main
from resilient.errors import CheckpointError, TierUnavailable

pytestmark = pytest.mark.process
WORLD, STEP = 3, 5


@pytest.fixture(scope="module", params=["ddp", "fsdp"])
def kept(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The checkpoints of a run."""
    where = tmp_path_factory.mktemp(request.param)
    arguments = ["--out", str(where / "out"), "--kind", request.param, "--steps", "7"]
    flags = ["--nproc-per-node", str(WORLD), "--checkpoint", f"file://{where}/kept", "--checkpoint-every", str(STEP)]
    with Launched(where, flags, "job.py", arguments) as run:
        assert run.wait() == 0, run.text()
    return where / "kept"


def whole(kept: pathlib.Path) -> dict[str, torch.Tensor]:
    """All tensors, put together from the ranks' snapshots by hand."""
    found: dict[str, torch.Tensor] = {}
    whole = DiskTier(str(kept)).checkpoint(STEP)
    for rank in range(WORLD):
        _, described = whole.tail(rank)
        payload = memoryview(bytearray(sum(padded(row.num_bytes) for row in described.rows)))
        whole.fill(rank, payload, verify=True)
        for row, (offset, size) in zip(described.rows, described.places(), strict=True):
            kind = getattr(torch, row.dtype)
            part = torch.frombuffer(bytearray(payload[offset : offset + size] or b"\0" * 8), dtype=torch.uint8)[:size]
            box = tuple(slice(begin, begin + length) for begin, length in zip(row.offsets, row.local, strict=True))
            found.setdefault(row.key, torch.zeros(row.shape, dtype=kind))[box] = part.view(kind).view(row.local)
    return found


def lines(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_an_export_is_read_by_a_program_that_knows_nothing_of_us(kept: pathlib.Path, tmp_path: pathlib.Path, capsys: Any) -> None:
    url = f"file://{kept}"
    assert main(["ckpt", "ls", url, "--json"]) == 0
    assert [(row["step"], row["ranks"]) for row in lines(capsys)] == [(STEP, WORLD)]
    assert main(["ckpt", "verify", url, "--json"]) == 0
    assert lines(capsys)[0]["verified"]
    assert main(["ckpt", "export", url, str(tmp_path / "there")]) == 0
    expected = whole(kept)
    model: dict[str, Any] = {key.removeprefix("model."): torch.zeros_like(t) for key, t in expected.items() if key.startswith("model.")}
    assert len(model) == 6
    dist_checkpoint.load({"model": model}, checkpoint_id=tmp_path / "there", no_dist=True)
    assert all(torch.equal(tensor, expected[f"model.{key}"]) for key, tensor in model.items())
    assert main(["ckpt", "export", url, str(tmp_path / "there")]) == 1, "nothing is written over"


def test_an_export_that_is_broken_off_takes_only_its_own_files_away(kept: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: Any) -> None:
    """Somebody else's come while it checks, and while it copies."""
    others, check, copy = tmp_path / ".metadata", DiskTier.verify, checkpoint_export._copy

    def checked(self: DiskTier, step: int) -> Any:
        others.write_bytes(b"another's")
        return check(self, step)

    def broken(*arguments: Any) -> None:
        copy(*arguments)
        others.write_bytes(b"another's")
        raise TierUnavailable("full")

    for owner, name, what, said in ((DiskTier, "verify", checked, "there already"), (checkpoint_export, "_copy", broken, "full")):
        with monkeypatch.context() as patched, pytest.raises(CheckpointError, match=said):
            patched.setattr(owner, name, what)
            checkpoint_export.export(DiskTier(str(kept)), STEP, str(tmp_path))
        assert [path.name for path in tmp_path.iterdir()] == [".metadata"]
        assert others.read_bytes() == b"another's"
        others.unlink()


def test_damage_is_named_and_never_handed_on(kept: pathlib.Path, tmp_path: pathlib.Path, capsys: Any) -> None:
    file = sorted(kept.glob("step-*/rank-*.distcp"))[1]
    sound = file.read_bytes()
    data = bytearray(sound)
    data[len(data) // 2] ^= 4
    file.write_bytes(data)
    try:
        assert main(["ckpt", "verify", f"file://{kept}", "--json"]) == 1
        assert file.name in lines(capsys)[0]["error"]
        assert main(["ckpt", "export", f"file://{kept}", str(tmp_path / "there")]) == 1
        assert file.name in capsys.readouterr().err
        assert not (tmp_path / "there" / ".metadata").exists()
    finally:
        file.write_bytes(sound)


@pytest.mark.parametrize("verb", [["ls"], ["verify"], ["export", "there"]])
def test_nothing_there_is_said_in_one_line(tmp_path: pathlib.Path, verb: list[str], capsys: Any) -> None:
    assert main(["ckpt", verb[0], f"file://{tmp_path}/none", *verb[1:]]) == 1
    assert "no committed checkpoint" in capsys.readouterr().err
