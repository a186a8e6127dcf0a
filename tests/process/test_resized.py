"""A run that goes on with another number of ranks, from a checkpoint of its own: the losses are those of a run that never stopped."""

from __future__ import annotations

import contextlib
import json
import pathlib

import pytest
from launched import Launched
from test_faults import free_port

from resilient.checkpoint.slot import Slot

pytestmark = pytest.mark.process
EVERY, HELD, STEPS = 4, 7, 12


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
        *(
            pytest.param(*case, marks=pytest.mark.long)
            for case in (
                ("fsdp", 3, 4, 1),
                ("fsdp", 2, 4, 1),
                ("fsdp", 4, 2, 2),
                ("fsdp", 2, 4, 2),
                ("ddp", 4, 2, 1),
                ("ddp", 2, 4, 1),
                ("ddp", 3, 4, 1),
                ("ddp", 4, 2, 2),
                ("hsdp", 4, 2, 1),
                ("hsdp", 4, 2, 2),
                ("tp", 2, 1, 1),
            )
        ),
    ],
)
def test_a_killed_run_goes_on_from_memory_with_another_number_of_ranks(
    tmp_path: pathlib.Path, undisturbed: dict[int, tuple[float, float]], kind: str, before: int, after: int, nodes: int
) -> None:
    """Nothing was ever written to storage. With two nodes each has a memory of its own, and lacks what the other one has."""
    lives = Lives(tmp_path, kind, nodes, "--copies", "0")
    first = lives.killed(before)
    runs = [lives.start("after", after, node) for node in range(nodes)]
    with contextlib.ExitStack() as stack:
        for run in runs:
            stack.enter_context(run)
        assert [run.wait() for run in runs] == [0] * nodes, "".join(run.text() for run in runs)
    begun = runs[0].events("round_started")[0]
    assert begun["tier"] == ("memory" if nodes == 1 else "peer"), begun
    assert begun["step"] == HELD if kind == "fsdp" else 0 < begun["step"] <= HELD, "under DDP not every step is sealed"
    lives.check(undisturbed, first, begun["step"])


@pytest.mark.long
def test_a_byte_that_flips_in_what_was_left_is_found_and_the_checkpoint_is_used(
    tmp_path: pathlib.Path, undisturbed: dict[int, tuple[float, float]]
) -> None:
    """The second node has taken over, and looked at, what lies in its memory; then the byte flips; then the first node comes."""
    lives = Lives(tmp_path, "fsdp", 2, "--copies", "0", "--checkpoint", f"file://{tmp_path}/kept", "--checkpoint-every", "4")
    first = lives.killed(4)
    with lives.start("after", 2, 1) as second:
        second.until(lambda: "took over what" in second.text(), "all that was left to be looked at")
        for path in (tmp_path / "memory" / "1").glob("resilient.*.rank-2.slot-?"):
            slot = Slot(str(path))
            if slot.sealed_step() == HELD:
                slot.memory[slot.sealed_bytes() - 200] ^= 16
            slot.close()
        with lives.start("after", 2, 0) as run:
            assert [run.wait(), second.wait()] == [0, 0], run.text() + second.text()
    begun = run.events("round_started")
    steps = [(event["tier"], event["step"]) for event in begun]
    assert (steps[0], steps[-1]) == (("peer", HELD), ("persistent", EVERY)), (
        begun
    )  # the step before is overwritten where a rank was quicker
    assert "the payload is not what was hashed" in second.text()
    lives.check(undisturbed, first, EVERY)


class Lives:
    """One command line on some nodes, each with a memory of its own, that is killed in step HELD and started in another world."""

    def __init__(self, where: pathlib.Path, kind: str, nodes: int, *flags: str) -> None:
        self.where, self.nodes, self.out = where, nodes, where / "out"
        self.out.mkdir()
        self.arguments = ["--out", str(self.out), "--kind", kind, "--steps", str(STEPS), "--hold", str(HELD)]
        self.flags = ["--rdzv-id", f"resized-{where.name}", "--memory-keep-s", "600", "--log-level", "info", *flags]
        self.ports = {name: free_port() for name in ("before", "after")}

    def start(self, name: str, world: int, node: int) -> Launched:
        memory = self.where / "memory" / str(node)
        memory.mkdir(exist_ok=True, parents=True)
        meet = ["--nnodes", str(self.nodes), "--node-rank", str(node), "--master-addr", "127.0.0.1"]
        meet += ["--master-port", str(self.ports[name])]
        flags = ["--nproc-per-node", str(world // self.nodes), *self.flags, "--memory-dir", str(memory), *(meet if self.nodes > 1 else [])]
        return Launched(self.where, flags, "resized.py", self.arguments, name=f"{name}{node}", standalone=False)

    def killed(self, world: int) -> dict[int, tuple[float, float]]:
        """The first life. Its losses."""
        with contextlib.ExitStack() as stack:
            runs = [stack.enter_context(self.start("before", world, node)) for node in range(self.nodes)]
            runs[0].until(lambda: len(list(self.out.glob("held-*"))) == world, "all ranks to stand in the step")
            for run in runs:
                run.kill_all()
                run.process.wait()
        first = losses(self.out)
        (self.out / "losses.jsonl").unlink()
        (self.out / "go").touch()
        return first

    def check(self, undisturbed: dict[int, tuple[float, float]], first: dict[int, tuple[float, float]], begun: int) -> None:
        """Both lives together had the losses of a run that never stopped, and nothing is left."""
        rest = losses(self.out)
        assert sorted(first) == list(range(HELD))
        assert sorted(rest) == list(range(begun, STEPS))
        for step, (loss, rate) in [*first.items(), *rest.items()]:
            assert loss == pytest.approx(undisturbed[step][0], rel=1e-4, abs=1e-6), f"step {step}"
            assert rate == undisturbed[step][1]
        assert not list((self.where / "memory").glob("*/resilient.*"))
