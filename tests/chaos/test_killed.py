"""kill -9 at every stage of snapshot, replication, persist, commit and prune, of every process: nothing committed is lost, every bit is right.

A stage is hit deliberately: the process that comes to it kills itself (hooks/sitecustomize.py). A worker's death is made up for within
the run; after the death of the process that is agent, vault and coordinator the same command is given again, and again, until it ends.
"""

from __future__ import annotations

import functools
import os
import pathlib
import socket
import tempfile
from typing import Any

import pytest
import tally
from launched import Launched, digests

from resilient.checkpoint.disk import DiskTier
from resilient.checkpoint.retention import KEEP
from resilient.cli import main

pytestmark = [pytest.mark.process, pytest.mark.long]
HOOKS = pathlib.Path(__file__).with_name("hooks")
WORLD, EVERY = 2, 2
FEATURES = {"ddp": "bn,dropout,sched,stream", "fsdp": "dropout,sched,stream"}
ONE_THREAD = {"OMP_NUM_THREADS": "1"}  # sums of two threads have other bits; a node of one rank would take all cores
PERSIST = [
    "claim: the mark is renamed",
    "memory: a segment begins",
    "memory: a segment is renamed",
    "persist: a rank file begins",
    "persist: a rank file is renamed",
    "persist: a rank file is there",
    "commit: the index begins",
    "commit: the index is renamed",
    "commit: the marker begins",
    "commit: the marker is renamed",
    "commit: the marker is there",
    "prune: the marker goes",
    "prune: the files go",
    "prune: the directory goes",
]
WRITES = ["the old seal is broken", "all is copied", "it is sealed"]
COPIES = ["it goes", "it is on its way", "it has arrived"]


def launched(
    where: pathlib.Path, flags: list[str], arguments: list[str], name: str, *kills: str, clock: str = "", **words: Any
) -> Launched:
    env = {**ONE_THREAD, "CHAOS_KILL": "\n".join(kills), "CHAOS_TOLD": str(where / "told"), **({"CHAOS_CLOCK": clock} if clock else {})}
    run = Launched(where, flags, "job.py", arguments, name=name, env=env, **words)
    run.env["PYTHONPATH"] = os.pathsep.join([str(HOOKS), run.env["PYTHONPATH"]])
    return run


def told(where: pathlib.Path) -> list[str]:
    """The kills that fell."""
    file = where / "told"
    return file.read_text().splitlines() if file.exists() else []


def job(out: pathlib.Path, kind: str, steps: int, *more: str) -> list[str]:
    return ["--out", str(out), "--kind", kind, "--features", FEATURES[kind], "--steps", str(steps), "--pause", "0.02", *more]


def flags(kept: pathlib.Path | None) -> list[str]:
    head = ["--nproc-per-node", str(WORLD), "--standbys", "1"]
    return head if kept is None else [*head, "--checkpoint", str(kept), "--checkpoint-every", str(EVERY)]


@functools.cache
def undisturbed(kind: str, steps: int, world: int = WORLD) -> tuple[str, ...]:
    where = pathlib.Path(tempfile.mkdtemp(prefix="undisturbed-"))
    with Launched(where, ["--nproc-per-node", str(world)], "job.py", job(where / "out", kind, steps), env=ONE_THREAD) as run:
        assert run.wait() == 0, run.text()
    return tuple(digests(where / "out", world))


def acknowledged(run: Launched) -> set[int]:
    return {event["step"] for event in run.events("checkpoint_committed")}


def check(kept: pathlib.Path, promised: set[int]) -> None:
    """Every checkpoint that was told of is there and right, but for those that retention may remove; `resilient ckpt verify` says so too."""
    if not promised:
        return
    tier = DiskTier(str(kept))
    steps = tier.steps()
    assert steps == tier.whole()
    for step in steps:
        tier.verify(step)
    newest = sorted(promised | set(steps))[-KEEP.last :]
    assert promised & set(newest) <= set(steps), (promised, steps)
    assert main(["ckpt", "verify", str(kept), "--json"]) == 0


def chain(where: pathlib.Path, kind: str, kills: list[str], steps: int) -> None:
    """One command after the other on one URL, each killed at the next stage; the last one ends."""
    kept, promised, out = where / "kept", set[int](), where / "out"
    for number, kill in enumerate([*kills, ""]):
        wanted = [kill] if kill else []
        with launched(where, flags(kept), job(out, kind, steps), f"run-{number}", *wanted) as run:
            code = run.wait()
            promised |= acknowledged(run)
        if kill in told(where):
            assert code == -9, run.text()
            check(kept, promised)
            tally.count(f"agent, vault, coordinator, {kind}", kill.removeprefix("agent ").rsplit(" ", 1)[0], "survived")
        else:
            assert code == 0, f"{kill}\n{run.text()}"
            assert not kill, f"{kill}: never reached\n{run.text()}"
    assert tuple(digests(out, WORLD)) == undisturbed(kind, steps)
    check(kept, promised)
    assert len(list(kept.iterdir())) == KEEP.last, "nothing half is left behind"


@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
@pytest.mark.parametrize("number", [1, 2, 3])
def test_every_stage_of_the_agent(tmp_path: pathlib.Path, kind: str, number: int) -> None:
    """At the first, second and third time."""
    many = [f"agent {stage} {1 if stage.startswith(('claim', 'memory')) else number}" for stage in PERSIST]
    chain(tmp_path, kind, many, 150)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_every_stage_of_a_workers_snapshot(tmp_path: pathlib.Path, kind: str) -> None:
    """Many blows in one run, both ranks: each time another process takes the chair, and no step is lost."""
    steps, kept = 100, tmp_path / "kept"
    whats = ["own state", "snapshot"] if kind == "fsdp" else ["own state"]
    kills = [f"rank-{rank} {what}: {stage} 8" for what in whats for stage in WRITES for rank in range(WORLD)]
    with launched(tmp_path, flags(kept), job(tmp_path / "out", kind, steps), "run", *kills) as run:
        assert run.wait() == 0, run.text()
        promised = acknowledged(run)
    assert tuple(digests(tmp_path / "out", WORLD)) == undisturbed(kind, steps)
    assert sum(i["steps_lost"] for i in run.incidents()) == 0
    check(kept, promised)
    fallen = told(tmp_path)
    assert sorted(fallen) == sorted(kills)
    for kill in fallen:
        tally.count(f"worker, {kind}", kill.partition(" ")[2].rsplit(" ", 1)[0], "survived")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.mark.parametrize("stage", COPIES)
@pytest.mark.parametrize("what", ["own state", "snapshot"])
def test_every_stage_of_a_copy_to_another_node(tmp_path: pathlib.Path, stage: str, what: str) -> None:
    """The node that sends dies, with all of its processes; its rank goes on elsewhere. Then the other way round, by another command."""
    steps, kept, kind, out = 60, tmp_path / "kept", "fsdp", tmp_path / "out"
    kill = f"agent replicate {what}: {stage} 20"
    meet = ["--nnodes", "2", "--nproc-per-node", "1", "--standbys", "1", "--rdzv-backend", "c10d", "--rdzv-id", "pair"]
    meet += ["--rdzv-endpoint", f"127.0.0.1:{free_port()}", "--checkpoint", str(kept), "--checkpoint-every", str(EVERY)]
    first = launched(tmp_path, meet, job(out, kind, steps), "first", standalone=False)
    second = launched(tmp_path, meet, job(out, kind, steps), "second", kill, standalone=False)
    with first, second:
        host = first.until(lambda: next((r for r in (first, second) if r.events("run_started")), None), "the run to start")
        other = second if host is first else first
        second.until(lambda: kill in told(tmp_path) or None, "the blow")
        assert second.process is not None
        assert second.process.wait() == -9
        if host is first:
            assert first.wait() == 0, first.text()
        else:  # the node of the coordinator is gone: the run has ended, and the same command goes on
            assert other.wait() == 1, other.text()
        promised = acknowledged(host)
    check(kept, promised)
    if host is second:
        with launched(tmp_path, flags(kept), job(out, kind, steps), "again") as run:
            assert run.wait() == 0, run.text()
    assert tuple(digests(out, WORLD)) == undisturbed(kind, steps)
    place = "agent and vault of a node" if host is first else "vault and coordinator of a node"
    tally.count(f"{place}, {kind}", f"replicate {what}: {stage}", "survived")
