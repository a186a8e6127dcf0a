"""Checkpoints handed to and taken from others, for real: unmodified torch programs, safetensors files, runs that start from them."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

import pytest
import torch
from launched import JOBS, Launched

pytestmark = pytest.mark.process
WORLD, STEPS = 2, 4


@pytest.fixture(scope="module", params=["ddp", "fsdp", "tp"])
def trained(request, tmp_path_factory):
    """(kind, directory of the checkpoints, the run's final tensors)."""
    where = tmp_path_factory.mktemp(request.param)
    flags = ["--nproc-per-node", str(WORLD), "--checkpoint", f"file://{where}/kept", "--checkpoint-every", str(STEPS)]
    with Launched(where, flags, "exchanged.py", ["--out", str(where / "out"), "--kind", request.param, "--steps", str(STEPS)]) as run:
        assert run.wait() == 0, run.text()
    return request.param, where / "kept", together(where / "out", "state", WORLD)


def together(out: pathlib.Path, name: str, world: int) -> dict[str, torch.Tensor]:
    """Whole tensors from the boxes that the ranks wrote; buffers that are own state: rank 0's."""
    found: dict[str, torch.Tensor] = {}
    for rank in reversed(range(world)):
        for key, (shape, offsets, part) in torch.load(out / f"{name}-{rank}.pt").items():
            place = tuple(slice(begin, begin + size) for begin, size in zip(offsets, part.shape, strict=True))
            found.setdefault(key, torch.zeros(shape, dtype=part.dtype))[place] = part
    return found


def plain_torch(kinds: str, world: int, checkpoint: pathlib.Path, out: pathlib.Path, *more: str) -> None:
    """A torch program, started by torchrun itself, reads it as each of these kinds."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)]
    command += [str(JOBS / "plain_torch.py"), "--kinds", kinds, "--checkpoint", str(checkpoint), "--out", str(out), *more]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=240, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert ended.returncode == 0, ended.stdout + ended.stderr


@pytest.mark.parametrize(("world", "more"), [(2, []), (3, ["--flat"])])
def test_unmodified_torch_programs_read_a_committed_step(trained, world, more, tmp_path):
    """In the same and in another world size, in the same and in other kinds of parallelism."""
    _, kept, expected = trained
    plain_torch("ddp,fsdp,tp", world, kept / f"step-{STEPS:08d}", tmp_path, *more)
    for kind in ("ddp", "fsdp", "tp"):
        found = torch.load(tmp_path / f"{kind}.pt")
        assert set(found["model"]) == {key for key in expected if not key.startswith("optim.")}
        for key, tensor in found["model"].items():
            assert torch.equal(tensor, expected[key]), (kind, key)
        moments = {f"optim.{key}.{what}": value for key, values in found["state"].items() for what, value in values.items()}
        assert set(moments) == {key for key in expected if key.startswith("optim.")}
        for key, tensor in moments.items():
            assert torch.equal(tensor, expected[key]), (kind, key)
        assert found["rates"] == pytest.approx([0.02 / 4, 0.003 / 4])
        assert found["last_epoch"] == STEPS
