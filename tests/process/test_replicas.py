"""A bit that flips in one replica's state is found, with step, tensor and rank: when a checkpoint is made, and in runs that make none."""

from __future__ import annotations

import collections
import contextlib
import pathlib
import socket

import pytest
from launched import Launched

from resilient.checkpoint.disk import DiskTier

pytestmark = pytest.mark.process


@pytest.mark.parametrize(("kind", "world"), [("ddp", 3), pytest.param("hsdp", 4, marks=pytest.mark.long)])
def test_a_flipped_bit_is_a_finding_and_never_a_checkpoint(tmp_path: pathlib.Path, kind: str, world: int) -> None:
    keep = ["--checkpoint", f"file://{tmp_path}/kept", "--checkpoint-every", "4"]
    arguments = ["--out", str(tmp_path), "--kind", kind, "--steps", "9", "--flip", "1:6", "--pace", "0.1"]  # storage has its time
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


# Where a snapshot costs little it is taken at every step or two; a second has at most fifty steps of 0.02 s, after which the moment that was
# changed is still another one: what Adam forgets of it with each step is a tenth.
AUDITED = ("--audit-every-s", "1")
PACED = ("--steps", "100000", "--pace", "0.02")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def audited(run: Launched, count: int) -> bool:
    found = run.status().get("replicas")
    return found is not None and found["audits"] >= count


def end(run: Launched) -> None:
    assert run.process is not None
    run.process.terminate()
    assert run.wait() == 1


@pytest.mark.parametrize(
    ("kind", "world", "named"),
    [
        ("ddp", 3, {1}),
        pytest.param("ddp", 2, {0, 1}, marks=pytest.mark.long),
        pytest.param("hsdp", 4, {1, 3}, marks=pytest.mark.long),
    ],
)
def test_a_flipped_bit_is_found_without_any_checkpoint(tmp_path: pathlib.Path, kind: str, world: int, named: set[int]) -> None:
    arguments = ["--out", str(tmp_path), "--kind", kind, *PACED, "--flip", "1:6"]
    with Launched(tmp_path, ["--nproc-per-node", str(world), *AUDITED], "resized.py", arguments) as run:
        found = run.until(
            lambda: len(found := [e for e in run.events("finding") if e["kind"] == "replicas_differ"]) >= len(named) and found, "findings"
        )
        assert {event["rank"] for event in found} == named
        (step,) = {event["step"] for event in found}
        assert step > 6
        assert all(f"step {step}: " in event["text"] and "exp_avg" in event["text"] for event in found)
        assert f"of {world if kind == 'ddp' else 2} replicas" in found[0]["text"]
        verdicts = [event["verdict"] for event in run.events("verdict") if event["kind"] == "replicas_differ"]
        assert set(verdicts) == {"watch"}
        known = run.status()["replicas"]["audits"]
        run.until(lambda: audited(run, known + 2), "two audits more")
        assert set(run.status()["replicas"]["differ"]) == named
        assert run.status()["replicas"]["since"] == step
        assert len(run.events("finding")) == len(named), "what is known is told once"
        end(run)


@pytest.mark.long
def test_a_flipped_bit_is_found_on_another_node(tmp_path: pathlib.Path) -> None:
    meet = ["--nnodes", "2", "--nproc-per-node", "2", "--rdzv-endpoint", f"localhost:{free_port()}", "--rdzv-id", "apart", *AUDITED]
    arguments = ["--out", str(tmp_path), *PACED, "--flip", "3:6"]
    env = {"RESILIENT_TOKEN": "0123456789abcdef"}
    with contextlib.ExitStack() as stack:
        nodes = [Launched(tmp_path, meet, "resized.py", arguments, name=name, standalone=False, env=env) for name in ("a", "b")]
        for node in nodes:
            stack.enter_context(node)
        nodes[0].until(lambda: any(node.events("finding") for node in nodes), "the finding")
        first = next(node for node in nodes if node.events("finding"))
        (found,) = first.events("finding")
        assert (found["kind"], found["rank"]) == ("replicas_differ", 3)
        assert "of 4 replicas" in found["text"]
        first.process.terminate()
        assert [node.wait() for node in nodes] == [1, 1]


def test_replicas_that_are_equal_are_no_finding(tmp_path: pathlib.Path) -> None:
    with Launched(tmp_path, ["--nproc-per-node", "2", *AUDITED], "resized.py", ["--out", str(tmp_path), *PACED]) as run:
        run.until(lambda: audited(run, 2), "two audits")
        assert run.status()["replicas"]["differ"] == []
        assert not run.events("finding")
        end(run)


@pytest.mark.long
def test_a_newcomer_is_not_given_the_state_that_the_majority_contradicts(tmp_path: pathlib.Path) -> None:
    arguments = ["--out", str(tmp_path), *PACED, "--flip", "0:6"]
    with Launched(tmp_path, ["--nproc-per-node", "3", *AUDITED], "resized.py", arguments) as run:
        run.until(lambda: [e for e in run.events("finding") if e["kind"] == "replicas_differ"], "the finding")
        run.signal(1)
        run.until(run.incidents, "the recovery")
        assert run.incidents()[0]["restored_from"] == "live"
        known = run.status()["replicas"]["audits"]
        run.until(lambda: audited(run, known + 2), "two audits more")
        assert run.status()["replicas"]["differ"] == [0]
        end(run)
