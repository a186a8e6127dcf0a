"""Agents that are killed, and started again: what they held in memory is taken over, and the run goes on from there.

The oracle is that of test_recovery.py: every bit of every rank's state is that of an undisturbed run.
"""

from __future__ import annotations

import pathlib
import random
import time
import uuid
from collections.abc import Sequence

import pytest
from launched import Launched, digests
from test_faults import free_port, job
from test_recovery import undisturbed

from resilient.checkpoint.slot import Slot

pytestmark = pytest.mark.process
WORLD, STEPS, FEATURES = 2, 70, "dropout,sched,stream"
PAUSE = ("--pause", "0.03")


class Killed:
    """One command line that is started again and again; what it holds in memory lies in a directory of the test's own."""

    def __init__(self, where: pathlib.Path, kind: str, *more: str, steps: int = STEPS) -> None:
        self.where, self.memory, self.run_id = where, where / "memory", f"job-{uuid.uuid4().hex[:6]}"
        self.memory.mkdir()
        self.arguments = job(where, *PAUSE, *more, kind=kind, features=FEATURES, steps=steps)
        self.keep = ["--checkpoint", f"file://{where}/kept", "--checkpoint-every", "0"]
        self.starts = 0

    def start(self, *flags: str, world: int = WORLD, arguments: Sequence[str] | None = None) -> Launched:
        """The next life of it."""
        self.starts += 1
        name, env = f"life{self.starts}", {"OMP_NUM_THREADS": "1"}  # torchrun sets it for several ranks on a node only
        head = [
            "--nproc-per-node",
            str(world),
            "--rdzv-id",
            self.run_id,
            "--memory-dir",
            str(self.memory),
            "--log-level",
            "info",
            *self.keep,
            *flags,
        ]
        return Launched(
            self.where, [*head, *self.keep, *flags], "job.py", arguments or self.arguments, name=name, standalone=False, env=env
        )

    def segments(self) -> list[pathlib.Path]:
        """What lies in memory."""
        return sorted(self.memory.glob("resilient.*"))


def kill(run: Launched) -> None:
    run.kill_all()
    assert run.process is not None
    run.process.wait()


def begun(run: Launched) -> tuple[str, int]:
    """From where its first round had its state, and at which step."""
    first = run.events("round_started")[0]
    return first["tier"], first["step"]


@pytest.mark.parametrize("kind", [pytest.param("ddp", marks=pytest.mark.long), "fsdp"])
def test_a_killed_run_goes_on_from_memory(tmp_path: pathlib.Path, kind: str) -> None:
    """Killed at a random moment, and once more: hardly a step is lost although there is no checkpoint."""
    number = random.SystemRandom().randrange(1 << 30)
    print(f"seed {number}")
    dice = random.Random(number)
    lives = Killed(tmp_path, kind)
    with lives.start() as run:
        run.until_step(2)
        time.sleep(dice.uniform(0.0, 0.5))
        kill(run)
    done = max(row["step"] for row in run.status()["ranks"])
    with lives.start() as run:
        run.until(lambda: run.events("round_started"), "the first round")
        assert begun(run)[0] == "memory", f"{run.text()} {run.events()} {lives.segments()}"
        assert begun(run)[1] >= done - 2, (done, run.events("round_started"))
        run.until_step(begun(run)[1] + 1)
        time.sleep(dice.uniform(0.0, 0.3))
        kill(run)
    with lives.start() as run:
        assert run.wait() == 0, run.text()
        assert begun(run)[0] == "memory"
    rounds = [event["round"] for event in run.events("round_started")]
    assert rounds[0] >= 3, "rounds only grow, over all lives"
    assert tuple(digests(tmp_path, WORLD)) == undisturbed(kind, FEATURES, world=WORLD, steps=STEPS)
    assert not lives.segments(), "the run is over"


@pytest.mark.long
def test_a_byte_flipped_between_two_lives_is_found(tmp_path: pathlib.Path) -> None:
    """All ranks stand in step 6; what they sealed before it is hashed by then. The step before is as good."""
    lives = Killed(tmp_path, "fsdp", "--hold", "6", steps=12)
    with lives.start() as run:
        newest = run.until(lambda: hashed(lives, 6), "all snapshots of step 6 to be hashed")
        kill(run)
    slot = Slot(str(newest[1]))
    slot.memory[slot.sealed_bytes() - 100] ^= 16
    slot.close()
    (tmp_path / "go").touch()
    with lives.start() as run:
        assert run.wait() == 0, run.text()
    assert begun(run) == ("memory", 5), run.text()
    assert "the payload is not what was hashed" in run.text()
    assert tuple(digests(tmp_path, WORLD)) == undisturbed("fsdp", FEATURES, world=WORLD, steps=12)


def hashed(lives: Killed, step: int) -> list[pathlib.Path]:
    """The files with the snapshots of that step, by rank, once all are hashed."""
    found = []
    for path in sorted(lives.memory.glob("resilient.*.rank-*.slot-?")):
        slot = Slot(str(path), writable=False)
        if slot.sealed_step() == step and slot.is_stamped():
            found.append(path)
        slot.close()
    return found if len(found) == WORLD else []


class Pair(Killed):
    """On two nodes, each with a memory of its own."""

    def both(self, *flags: str) -> tuple[Launched, Launched]:
        """The next life on both."""
        port = free_port()
        return self.one(0, port, *flags), self.one(1, port, *flags)

    def one(self, node: int, port: int, *flags: str) -> Launched:
        """The next life on one, with one rank."""
        (self.memory / f"node{node}").mkdir(exist_ok=True)
        meet = ["--nnodes", "2", "--node-rank", str(node), "--master-addr", "127.0.0.1", "--master-port", str(port)]
        return self.start(*meet, "--nproc-per-node", "1", "--memory-dir", str(self.memory / f"node{node}"), "--lease-s", "3", *flags)


@pytest.mark.long
@pytest.mark.parametrize("wiped", [False, True])
def test_two_nodes_killed_go_on_from_both_memories_or_from_one(tmp_path: pathlib.Path, wiped: bool) -> None:
    """A node that comes back without its memory is given the copies that the other one kept for it."""
    lives = Pair(tmp_path, "fsdp", "--hold", "9", steps=20)
    first, second = lives.both()
    with first, second:
        first.until_step(9)
        first.until(lambda: all(copied(lives, node) for node in range(2)), "copies of step 9 on both")
        for run in (first, second):
            kill(run)
    if wiped:
        for path in (lives.memory / "node1").iterdir():
            path.unlink()
    (tmp_path / "go").touch()
    first, second = lives.both()
    with first, second:
        assert [run.wait() for run in (first, second)] == [0, 0], first.text() + second.text()
    assert begun(first) == ("peer" if wiped else "memory", 9), first.text()
    assert tuple(digests(tmp_path, 2)) == undisturbed("fsdp", FEATURES, world=2, steps=20)
    assert not list(lives.memory.glob("*/resilient.*"))


def copied(lives: Killed, node: int) -> bool:
    """Whether that node holds step 9 of the other one's rank."""
    slots = [Slot(str(path), writable=False) for path in (lives.memory / f"node{node}").glob(f"resilient.*.rank-{1 - node}.slot-?")]
    return any(slot.sealed_step() == 9 for slot in slots)


@pytest.mark.long
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_a_node_whose_agent_is_started_again_brings_what_it_had(tmp_path: pathlib.Path, kind: str) -> None:
    """The other node lives on; no copies go between the two."""
    lives = Pair(tmp_path, kind, "--hold", "9", steps=20)
    port = free_port()
    first, second = lives.one(0, port, "--copies", "0"), lives.one(1, port, "--copies", "0")
    with first, second:
        first.until_step(9)
        kill(second)
        with lives.one(1, port, "--copies", "0") as again:
            first.until(lambda: first.events("round_started")[-1]["round"] > 1, "another round")
            (tmp_path / "go").touch()
            assert [first.wait(), again.wait()] == [0, 0], first.text() + again.text()
    assert all(event["step"] == 9 for event in first.events("round_started")[1:]), first.events("round_started")
    assert sum(incident["steps_lost"] for incident in first.incidents()) == 0
    assert tuple(digests(tmp_path, 2)) == undisturbed(kind, FEATURES, world=2, steps=20)
