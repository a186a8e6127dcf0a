"""Faults other than a plain kill: stopped, stuck, raising and leaving ranks, a dead standby, lost nodes, a lost run, a full memory.

The oracle is the same as in test_recovery.py: where a run goes on, every bit of every rank's state is that of an undisturbed run.
"""

from __future__ import annotations

import json
import os
import pathlib
import signal
import socket
import time

import pytest
from launched import Launched, digests
from test_recovery import WORLD, check_incident, flags, struck, undisturbed

pytestmark = pytest.mark.process
SLOW = ("--pause", "0.03")


def job(where: pathlib.Path, *more: str, kind: str = "ddp", features: str = "dropout,sched", steps: int = 12) -> list[str]:
    return ["--out", str(where), "--kind", kind, "--features", features, "--steps", str(steps), *more]


# --------------------------------------------------------------------------- hangs


def test_a_stopped_rank_is_found_and_replaced_with_the_stacks_of_all_saved(tmp_path: pathlib.Path) -> None:
    run = struck(tmp_path, "ddp", "dropout,sched", "1:8:stop:forward", more=SLOW)
    check_incident(run, [1])
    (incident,) = run.incidents()
    assert incident["cause"] == "stopped"
    stacks = list((run.directory / "evidence").glob("*/*stacks.txt"))
    assert len(stacks) >= WORLD
    assert sum("in body" in file.read_text() for file in stacks) >= WORLD - 1, "the stacks of those who waited"


def test_an_endless_loop_is_found_and_its_rank_named_not_its_victims(tmp_path: pathlib.Path) -> None:
    run = struck(tmp_path, "ddp", "dropout,sched", "2:8:spin:forward", more=SLOW)
    check_incident(run, [2])
    blamed = [v for v in run.events("verdict") if v["verdict"] == "replace"]
    assert {v["rank"] for v in blamed} == {2}
    assert run.incidents()[0]["cause"] == "stalled"


@pytest.mark.long
def test_a_long_section_and_a_slow_first_step_are_no_hangs(tmp_path: pathlib.Path) -> None:
    with Launched(tmp_path, [*flags(), "--first-step-timeout", "60"], "quiet.py", ["--out", str(tmp_path)]) as run:
        assert run.wait() == 0, run.text()
    assert not run.incidents()
    assert {v["verdict"] for v in run.events("verdict")} <= {"watch", "ignore"}, "those who wait for the section may be watched, no more"


# --------------------------------------------------------------------------- exceptions


def test_an_exception_that_does_not_come_again_is_transient(tmp_path: pathlib.Path) -> None:
    run = struck(tmp_path, "ddp", "dropout,sched", "1:6:raise:forward")
    check_incident(run, [1])
    assert run.incidents()[0]["cause"] == "exception"


def test_the_same_exception_at_the_same_step_is_the_users(tmp_path: pathlib.Path) -> None:
    with Launched(tmp_path, flags(), "job.py", job(tmp_path, "--strike", "1:6:always:forward")) as run:
        assert run.wait() == 1
    assert "ValueError: struck at step 6" in run.text()
    assert len(run.events("round_started")) == 2, "restarts were burnt"
    errors = [json.loads(file.read_text()) for file in run.directory.glob("logs/*/attempt_*/*/error.json")]
    assert any("struck at step 6" in str(error["message"]) for error in errors)


def test_leaving_the_loop_early_on_one_rank_is_not_a_success(tmp_path: pathlib.Path) -> None:
    """One rank exits 0 in the middle of a step the others are in: it is replaced, and the run ends as if it had not."""
    run = struck(tmp_path, "ddp", "dropout,sched", "1:6:leave:forward")
    assert run.incidents()


# --------------------------------------------------------------------------- standbys


def test_a_killed_standby_is_replaced_and_disturbs_nobody(tmp_path: pathlib.Path) -> None:
    with Launched(tmp_path, flags(), "job.py", job(tmp_path, "--pause", "0.05", "--hold", "5", steps=40)) as run:
        run.until_standbys(1)
        (tmp_path / "go").touch()
        (standby,) = run.status()["standbys"]
        ranks = run.pids()
        os.kill(standby["pid"], signal.SIGKILL)
        run.until(lambda: len(run.events("standby_ready")) >= 2, "another standby")
        assert run.pids() == ranks
        assert run.wait() == 0, run.text()
    assert not run.incidents()


def test_shadows_all_parks_one_for_every_chair(tmp_path: pathlib.Path) -> None:
    arguments = ["--nproc-per-node", "2", "--shadows", "all"]
    with Launched(tmp_path, arguments, "job.py", job(tmp_path, "--pause", "0.05", "--hold", "5", steps=40)) as run:
        run.until_standbys(2)
        (tmp_path / "go").touch()
        assert {s["shadow"] for s in run.status()["standbys"]} == {0, 1}
        before = run.pids()
        standby = next(s["pid"] for s in run.status()["standbys"] if s["shadow"] == 1)
        run.signal(1)
        run.until(run.incidents, "the incident to be closed")
        run.until(lambda: run.pid(1) == standby, "the shadow of rank 1 to sit on its chair")
        assert run.pid(0) == before[0]
        assert run.wait() == 0, run.text()


# --------------------------------------------------------------------------- nodes


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def two_nodes(where: pathlib.Path, arguments: list[str]) -> tuple[Launched, Launched]:
    head = ["--nnodes", "2", "--nproc-per-node", "2", "--standbys", "2", "--rdzv-backend", "c10d"]
    meet = [*head, "--rdzv-endpoint", f"127.0.0.1:{free_port()}", "--rdzv-id", "pair"]
    first = Launched(where, meet, "job.py", arguments, name="first", standalone=False)
    second = Launched(where, meet, "job.py", arguments, name="second", standalone=False)
    return first, second


@pytest.mark.parametrize(
    ("kind", "every"), [("ddp", "1"), *(pytest.param("fsdp", every, marks=pytest.mark.long) for every in ("auto", "1", "6"))]
)
def test_a_lost_node_is_made_up_for_by_the_other(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, kind: str, every: str) -> None:
    """Of sharded state nothing but what was sealed last, and what is on its way to the other node, is lost."""
    monkeypatch.setenv("RESILIENT_SNAPSHOT_EVERY", every)
    steps = 50
    expected = undisturbed(kind, "dropout,sched", world=4, steps=steps)
    first, second = two_nodes(tmp_path, job(tmp_path, *SLOW, "--hold", "5", kind=kind, steps=steps))
    with first, second:
        host = first.until(lambda: next((r for r in (first, second) if r.events("run_started")), None), "the run to start")
        other = second if host is first else first
        host.until_standbys(4)
        (tmp_path / "go").touch()
        host.until_step(8)
        other.kill_all()
        assert host.wait() == 0, host.text()
    (incident,) = host.incidents()
    assert incident["cause"] == "node_lost"
    assert incident["restored_from"] in ("live", "memory", "peer"), incident
    if every != "auto":
        assert incident["steps_lost"] <= (0 if kind == "ddp" else int(every)), incident
    assert tuple(digests(tmp_path, 4)) == expected


@pytest.mark.parametrize("kind", [pytest.param("ddp", marks=pytest.mark.long), "fsdp"])
def test_a_node_lost_when_the_loop_is_over_loses_nothing(tmp_path: pathlib.Path, kind: str) -> None:
    """Its ranks finish on the other node, from what that has in memory: under DDP their own states and anybody's snapshot."""
    expected = undisturbed(kind, "dropout,sched", world=4, steps=20)
    first, second = two_nodes(tmp_path, job(tmp_path, kind=kind, features="dropout,sched,linger", steps=20))
    with first, second:
        host = first.until(lambda: next((r for r in (first, second) if r.events("run_started")), None), "the run to start")
        other = second if host is first else first
        host.until(lambda: all((tmp_path / f"over-{rank}").exists() for rank in range(4)), "all ranks to be over")
        mine = set(host.pids().values()) & {child.pid for child in other.descendants()}
        lost = [rank for rank, pid in host.pids().items() if pid in mine]
        for rank in lost:
            (tmp_path / f"over-{rank}").unlink()
        other.kill_all()
        host.until(lambda: all((tmp_path / f"over-{rank}").exists() for rank in range(4)), "the lost ranks to be over as well")
        (tmp_path / "end").touch()
        assert host.wait() == 0, host.text()
    assert sum(i["steps_lost"] for i in host.incidents()) == 0, host.incidents()
    assert tuple(digests(tmp_path, 4)) == expected


@pytest.mark.long
def test_the_loss_of_the_coordinators_node_ends_everything_with_a_clear_message(tmp_path: pathlib.Path) -> None:
    first, second = two_nodes(tmp_path, job(tmp_path, *SLOW, steps=2000))
    with first, second:
        host = first.until(lambda: next((r for r in (first, second) if r.events("run_started")), None), "the run to start")
        other = second if host is first else first
        host.until_step(3)
        workers = [child.pid for child in other.descendants()]
        host.kill_all()
        assert other.wait() == 1
        assert "no word from the coordinator" in other.text()
        assert not [pid for pid in workers if pathlib.Path(f"/proc/{pid}").exists()]


# --------------------------------------------------------------------------- everything


def kill_everything(run: Launched) -> None:
    run.kill_all()
    assert run.process is not None
    run.process.wait()


@pytest.mark.parametrize(("kind", "damage"), [pytest.param("ddp", False, marks=pytest.mark.long), ("fsdp", True)])
def test_everything_killed_continues_from_the_persistent_tier(tmp_path: pathlib.Path, kind: str, damage: bool) -> None:
    steps, features = 60, "dropout,sched,stream"
    expected = undisturbed(kind, features, steps=steps)
    keep = ["--checkpoint", f"file://{tmp_path}/kept", "--checkpoint-every", "10"]
    arguments = job(tmp_path, *SLOW, kind=kind, features=features, steps=steps)
    with Launched(tmp_path, [*flags(0), *keep], "job.py", arguments, name="before") as run:
        run.until(lambda: len(run.events("checkpoint_committed")) >= 2, "two checkpoints")
        kill_everything(run)
    newest = max(e["step"] for e in run.events("checkpoint_committed"))
    if damage:
        file = sorted((tmp_path / "kept").glob(f"step-{newest:08d}/rank-*.distcp"))[1]
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 4
        file.write_bytes(data)
    with Launched(tmp_path, [*flags(0), *keep], "job.py", arguments, name="after") as again:
        assert again.wait() == 0, again.text()
    rounds = again.events("round_started")
    assert rounds[0]["tier"] == "persistent"
    if damage:
        assert file.name in again.text(), "the damaged file is not named"
        assert max(r["step"] for r in rounds if r["tier"] == "persistent" and r["step"] < newest) == newest - 10
    assert tuple(digests(tmp_path, WORLD)) == expected
    left = [name for name in os.listdir("/dev/shm") if name.startswith(f"resilient.{run.process.pid}-")]  # type: ignore[union-attr]
    assert not left, "segments of the killed run are still there"


# --------------------------------------------------------------------------- bad use


@pytest.mark.parametrize(
    ("mistake", "says"),
    [
        ("untracked", "run.steps before run.track"),
        ("untrackable", "track(loader=...): an object with state_dict() and load_state_dict() expected, list found"),
        ("twice", "this process has joined the run already"),
        ("dtype", "Invalid scalar type"),
    ],
)
def test_a_wrong_use_of_the_api_ends_with_its_reason(tmp_path: pathlib.Path, mistake: str, says: str) -> None:
    begin = time.monotonic()
    with Launched(tmp_path, flags(0), "mistaken.py", [mistake]) as run:
        assert run.wait() == 1
    assert says in run.text()
    assert time.monotonic() - begin < 60


def test_too_little_shared_memory_is_said_with_what_would_help(tmp_path: pathlib.Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    if os.geteuid() != 0 or os.system(f"mount -t tmpfs -o size=1m tmpfs {small} 2>/dev/null"):
        pytest.skip("a small tmpfs cannot be mounted here (not root)")
    try:
        with Launched(tmp_path, [*flags(0), "--memory-dir", str(small)], "job.py", job(tmp_path, "--width", "20000")) as run:
            assert run.wait() != 0
        assert "--memory-dir" in run.text()
        assert "bytes" in run.text()
    finally:
        os.system(f"umount {small}")
