"""Checkpoints handed to and taken from others, for real: unmodified torch programs, safetensors files, runs that start from them."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys

import pytest
import torch
from launched import JOBS, Launched

from resilient.checkpoint import safetensors
from resilient.checkpoint.disk import DiskTier
from resilient.cli import main

sys.path.append(str(JOBS))
import nets  # what the jobs import as their neighbour

pytestmark = pytest.mark.process
WORLD, STEPS = 2, 4
STRIKE = ["--strike"]
DECORATED = ["--form", "decorated"]


@pytest.fixture(scope="module", params=[pytest.param("ddp", marks=pytest.mark.long), "fsdp", pytest.param("tp", marks=pytest.mark.long)])
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


@pytest.mark.parametrize(("world", "more"), [pytest.param(2, [], marks=pytest.mark.long), (3, ["--flat"])])
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


def imported_weights(where: pathlib.Path) -> torch.nn.Module:
    """A model that somebody else trained, in a safetensors file; tied weights once, as such files have them."""
    torch.manual_seed(50)
    model = nets.Net()
    model.norm.running_mean.normal_()
    tensors = {name: tensor for name, tensor in model.state_dict().items() if name != "head.weight"}
    front, places = safetensors.header((n, str(t.dtype).removeprefix("torch."), tuple(t.shape)) for n, t in tensors.items())
    data = b"".join(tensors[place.name].reshape(-1).view(torch.uint8).numpy().tobytes() for place in places)
    (where / "model.safetensors").write_bytes(front + data)
    return model


def expected_losses(model: torch.nn.Module, begin: int, end: int) -> dict[int, float]:
    """Of plain torch in one process, with a fresh optimizer, from these weights on."""
    other, optimizer = nets.built("none", 50)
    other.load_state_dict(model.state_dict())
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
    found = {}
    for step in range(begin, end):
        optimizer.zero_grad()
        loss = nets.loss_of(other, step)
        loss.backward()
        optimizer.step()
        scheduler.step()
        found[step] = loss.item()
    return found


@pytest.mark.parametrize(
    ("kind", "world", "standbys", "more"),
    [
        pytest.param("ddp", 1, 0, [], marks=pytest.mark.long),
        pytest.param("ddp", 2, 0, [*STRIKE, *DECORATED], marks=pytest.mark.long),
        ("fsdp", 2, 1, STRIKE),
        pytest.param("fsdp", 3, 0, STRIKE, marks=pytest.mark.long),
        pytest.param("tp", 2, 0, DECORATED, marks=pytest.mark.long),
    ],
)
def test_a_run_of_any_size_starts_from_imported_weights(kind, world, standbys, more, tmp_path):
    """Weights and buffers are those of the file; optimizer, schedule and random numbers those of the script; also if a rank dies at once."""
    model = imported_weights(tmp_path)
    begin, end = 3, 8
    assert main(["ckpt", "import", str(tmp_path), f"file://{tmp_path}/kept", "--step", str(begin)]) == 0
    out = tmp_path / "out"
    flags = [
        "--nproc-per-node",
        str(world),
        "--checkpoint",
        f"file://{tmp_path}/kept",
        "--checkpoint-every",
        "4",
        "--standbys",
        str(standbys),
    ]
    arguments = ["--out", str(out), "--kind", kind, "--steps", str(end), *more]
    with Launched(tmp_path, flags, "exchanged.py", arguments) as run:
        assert run.wait() == 0, run.text()
        begun = run.events("round_started")[0]
        assert (begun["tier"], begun["step"]) == ("persistent", begin)
        assert len(run.incidents()) == more.count("--strike")
    assert json.loads((out / "begin-0.json").read_text()) == [begin, 0, [0.02, 0.003]]
    found = together(out, "begin", world)
    assert found.keys() == model.state_dict().keys(), "no optimizer state"
    for name, tensor in model.state_dict().items():
        assert torch.equal(found[name], tensor), name
    rows = [json.loads(line) for line in (out / "losses.jsonl").read_text().splitlines()]
    losses = {row["step"]: row["loss"] for row in rows}
    assert losses == {step: pytest.approx(loss, rel=1e-4) for step, loss in expected_losses(model, begin, end).items()}
    assert main(["ckpt", "ls", f"file://{tmp_path}/kept"]) == 0
    assert DiskTier(f"{tmp_path}/kept").steps() == (begin, 4, 8)


def test_an_import_of_another_model_ends_the_run_with_the_tensors_name(tmp_path):
    tensors = {"embed.weight": torch.zeros(3, 3)}
    front, _ = safetensors.header((n, "float32", tuple(t.shape)) for n, t in tensors.items())
    (tmp_path / "model.safetensors").write_bytes(front + bytes(36))
    assert main(["ckpt", "import", str(tmp_path), f"file://{tmp_path}/kept"]) == 0
    flags = ["--nproc-per-node", "1", "--checkpoint", f"file://{tmp_path}/kept"]
    with Launched(tmp_path, flags, "exchanged.py", ["--out", str(tmp_path / "out")]) as run:
        assert run.wait() != 0
        assert "model.embed.weight: float32 [21, 12] expected, float32 [3, 3] found" in run.text()
