"""A run that goes on with another number of ranks, from a checkpoint of its own: the losses are those of a run that never stopped."""

from __future__ import annotations

import contextlib
import json
import pathlib

import pytest
from launched import Launched
from test_faults import free_port

pytestmark = pytest.mark.process
EVERY, STEPS = 4, 12


def trained(tmp_path: pathlib.Path, name: str, kind: str, world: int, steps: int, kept: str = "") -> dict[int, tuple[float, float]]:
    """step -> (loss, learning rate) of one run."""
    out = tmp_path / name
    out.mkdir()
    keep = ["--checkpoint", f"file://{tmp_path}/{kept}", "--checkpoint-every", str(EVERY)] if kept else []
    flags = ["--nproc-per-node", str(world), *keep]
    with Launched(tmp_path, flags, "resized.py", ["--out", str(out), "--kind", kind, "--steps", str(steps)], name=name) as run:
        assert run.wait() == 0, run.text()
        begun = run.events("round_started")[0]
        if (out / "losses.jsonl").exists() and kept and name != "first":
            assert (begun["tier"], begun["step"]) == ("persistent", EVERY)
    return losses(out)


def losses(out: pathlib.Path) -> dict[int, tuple[float, float]]:
    """step -> (loss, learning rate), as rank 0 wrote them."""
    rows = [json.loads(line) for line in (out / "losses.jsonl").read_text().splitlines()]
    return {row["step"]: (row["loss"], row["lr"]) for row in rows}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[int, tuple[float, float]]:
    """The losses of one rank alone: those of any number of ranks, up to rounding."""
    return trained(tmp_path_factory.mktemp("alone"), "undisturbed", "ddp", 1, STEPS)


@pytest.mark.parametrize(
    ("kind", "before", "after"),
    [
        ("ddp", 4, 2),
        ("fsdp", 3, 4),
        *(pytest.param(*case, marks=pytest.mark.long) for case in (("fsdp", 4, 2), ("fsdp", 2, 4), ("tp", 2, 1), ("hsdp", 4, 2))),
    ],
)
def test_the_losses_go_on_as_if_nothing_had_happened(
    tmp_path: pathlib.Path, undisturbed: dict[int, tuple[float, float]], kind: str, before: int, after: int
) -> None:
    first = trained(tmp_path, "first", kind, before, EVERY, "kept")
    rest = trained(tmp_path, "rest", kind, after, STEPS, "kept")
    assert sorted(first) == list(range(EVERY))
    assert sorted(rest) == list(range(EVERY, STEPS))
    for step, (loss, rate) in {**first, **rest}.items():
        assert loss == pytest.approx(undisturbed[step][0], rel=1e-4, abs=1e-6), f"step {step}"
        assert rate == undisturbed[step][1]
    assert undisturbed[STEPS - 1][0] < undisturbed[0][0]


@pytest.mark.parametrize(
    ("kind", "before", "after", "nodes"),
    [
        ("fsdp", 4, 2, 1),
        pytest.param("ddp", 2, 4, 1, marks=pytest.mark.long),
        pytest.param("fsdp", 3, 4, 1, marks=pytest.mark.long),
        pytest.param("fsdp", 2, 4, 1, marks=pytest.mark.long),
        pytest.param("fsdp", 4, 2, 2, marks=pytest.mark.long),
        pytest.param("fsdp", 2, 4, 2, marks=pytest.mark.long),
    ],
)
def test_a_killed_run_goes_on_from_memory_with_another_number_of_ranks(
    tmp_path: pathlib.Path, undisturbed: dict[int, tuple[float, float]], kind: str, before: int, after: int, nodes: int
) -> None:
    """Nothing was ever written to storage. With two nodes each has a memory of its own, and lacks what the other one has."""
    out, job, held = tmp_path / "out", f"resized-{tmp_path.name}", 7
    out.mkdir()
    (tmp_path / "memory").mkdir()
    arguments = ["--out", str(out), "--kind", kind, "--steps", str(STEPS), "--hold", str(held)]

    def life(name: str, world: int) -> list[Launched]:
        flags = ["--nproc-per-node", str(world // nodes), "--rdzv-id", job, "--memory-keep-s", "600", "--copies", "0"]
        port = free_port()
        runs = []
        for node in range(nodes):
            memory = tmp_path / "memory" / str(node)
            memory.mkdir(exist_ok=True)
            meet = ["--nnodes", str(nodes), "--node-rank", str(node), "--master-addr", "127.0.0.1", "--master-port", str(port)]
            flags_here = [*flags, "--memory-dir", str(memory), *(meet if nodes > 1 else [])]
            runs.append(Launched(tmp_path, flags_here, "resized.py", arguments, name=f"{name}{node}", standalone=False))
        return runs

    with contextlib.ExitStack() as stack:
        runs = [stack.enter_context(run) for run in life("before", before)]
        runs[0].until(lambda: len(list(out.glob("held-*"))) == before, "all ranks to stand in the step")
        for run in runs:
            run.kill_all()
            run.process.wait()
    first = losses(out)
    (out / "losses.jsonl").unlink()
    (out / "go").touch()
    with contextlib.ExitStack() as stack:
        runs = [stack.enter_context(run) for run in life("after", after)]
        assert [run.wait() for run in runs] == [0] * nodes, "".join(run.text() for run in runs)
    begun = runs[0].events("round_started")[0]
    assert begun["tier"] == ("memory" if nodes == 1 else "peer"), begun
    assert begun["step"] == held if kind == "fsdp" else 0 < begun["step"] <= held, "under DDP not every step is sealed"
    rest = losses(out)
    assert sorted(first) == list(range(held))
    assert sorted(rest) == list(range(begun["step"], STEPS))
    for step, (loss, rate) in {**first, **rest}.items():
        assert loss == pytest.approx(undisturbed[step][0], rel=1e-4, abs=1e-6), f"step {step}"
        assert rate == undisturbed[step][1]
    assert not list((tmp_path / "memory").glob("*/resilient.*"))
