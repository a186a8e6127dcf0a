"""A killed rank becomes a resumed step: real processes, real signals, and the bits of an undisturbed run as the oracle.

One strike per kind of place; tests/bench/test_kill_matrix.py strikes each of them twenty times.

Every strike hits at an exact moment of an exact step (tests/process/jobs/job.py). What must hold each time: the run ends well; every
rank's final state is bitwise that of a run without the fault; nobody but the victim changed its process; no step was lost;
every step was committed once on every rank.
"""

from __future__ import annotations

import functools
import pathlib
import tempfile
from typing import Any

import pytest
from launched import Launched, digests

pytestmark = pytest.mark.process

WORLD = 3
STEPS = 12
CARELESS = "bn,dropout,sched,accum,clip,average,stream,scaler"  # what a careless design gets wrong, for DDP
MOMENTS = ["forward", "backward", "collective", "optimizer", "optimizer_end", "between"]


def flags(standbys: int = 1, world: int = WORLD) -> list[str]:
    return ["--nproc-per-node", str(world), "--standbys", str(standbys)]


@functools.cache
def undisturbed(kind: str, features: str, form: str = "for", world: int = WORLD, steps: int = STEPS) -> tuple[str, ...]:
    """The digests of a run without any fault."""
    where = pathlib.Path(tempfile.mkdtemp(prefix="undisturbed-"))
    arguments = ["--out", str(where), "--kind", kind, "--features", features, "--form", form, "--steps", str(steps)]
    with Launched(where, flags(0, world), "job.py", arguments) as run:
        assert run.wait() == 0, run.text()
    return tuple(digests(where, world))


def struck(
    where: pathlib.Path,
    kind: str,
    features: str,
    strike: str,
    *,
    form: str = "for",
    world: int = WORLD,
    standbys: int = 1,
    more: tuple[str, ...] = (),
) -> Launched:
    """The same run with a fault, through to its end, checked."""
    arguments = ["--out", str(where), "--kind", kind, "--features", features, "--form", form, "--steps", str(STEPS), "--strike", strike]
    with Launched(where, flags(standbys, world), "job.py", [*arguments, *more]) as run:
        code = run.wait()
    assert code == 0, f"{run.text()}\n{run.events()[-20:]}"
    found = digests(where, world)
    expected = undisturbed(kind, features, form, world)
    assert [a == b for a, b in zip(found, expected, strict=True)] == [True] * world, f"not bitwise equal\n{run.text()}\n{run.events()}"
    return run


def check_incident(run: Launched, victims: list[int], *, count: int | None = None) -> None:
    """Incidents name the victims, nothing was lost, and nobody else's process changed."""
    incidents = run.incidents()
    assert incidents, run.text()
    assert len(incidents) <= (count or len(victims)), incidents
    assert all(i["steps_lost"] == 0 for i in incidents), incidents
    assert {i["rank"] for i in incidents} <= set(victims)
    started = [e for e in run.events("worker_started") if e["role"] == "rank"]
    final = {r["rank"]: r["pid"] for r in run.status()["ranks"]}
    first = {e["rank"]: e["pid"] for e in reversed(started)}
    for rank in set(range(len(final))) - set(victims):
        assert final[rank] == first[rank], f"rank {rank} changed its process"


def committed_once(where: pathlib.Path, world: int = WORLD) -> None:
    """run.on_commit fired once for each step; the victim's own line may be missing for a step it died in after its commit."""
    for rank in range(world):
        lines = [int(line) for line in (where / f"committed-{rank}").read_text().split()]
        assert len(lines) == len(set(lines)), f"rank {rank}: {lines}"


def some(cases: list[tuple[Any, ...]], *shown: int) -> list[Any]:
    """CI tries those at these places, `make long` and the kill matrix of tests/bench the others as well."""
    return [pytest.param(*case, marks=() if place in shown else (pytest.mark.long,)) for place, case in enumerate(cases)]


@pytest.mark.parametrize(("moment", "rank"), some([(moment, 2 * (i % 2)) for i, moment in enumerate(MOMENTS)], 1, 3, 5))
def test_ddp_killed_at_every_moment(tmp_path: pathlib.Path, moment: str, rank: int) -> None:
    run = struck(tmp_path, "ddp", CARELESS, f"{rank}:6:{moment}")
    check_incident(run, [rank])
    committed_once(tmp_path)


@pytest.mark.parametrize("moment", some([(moment,) for moment in MOMENTS], 1, 4))
def test_fsdp_with_uneven_shards_killed_at_every_moment(tmp_path: pathlib.Path, moment: str) -> None:
    run = struck(tmp_path, "fsdp", "dropout,sched,clip,stream", f"1:6:{moment}")
    check_incident(run, [1])


@pytest.mark.parametrize(
    ("kind", "features", "moment"),
    some(
        [
            ("ddp", "two,dropout", "backward"),
            ("ddp", "two,dropout", "optimizer_end"),
            ("fsdp", "two", "optimizer_end"),
            ("ddp", "ema", "optimizer_end"),
            ("ddp", "zeros,reduce,early", "backward"),
        ],
        2,
        3,
    ),
)
def test_two_optimizers_an_ema_by_hand_and_an_early_return(tmp_path: pathlib.Path, kind: str, features: str, moment: str) -> None:
    run = struck(tmp_path, kind, features, f"1:5:{moment}")
    check_incident(run, [1])


@pytest.mark.parametrize(
    ("kind", "features", "world", "moment"),
    some(
        [
            ("ddp", "unused,dropout", 3, "backward"),
            ("ddp", "static,view", 3, "optimizer"),
            ("hsdp", "dropout,clip", 4, "backward"),
            ("hsdp", "dropout,clip", 4, "optimizer"),
        ],
        1,
        3,
    ),
)
def test_other_ways_to_wrap(tmp_path: pathlib.Path, kind: str, features: str, world: int, moment: str) -> None:
    run = struck(tmp_path, kind, features, f"1:5:{moment}", world=world)
    check_incident(run, [1])


@pytest.mark.parametrize(
    ("form", "moment"), some([("with", "forward"), ("with", "between"), ("decorated", "optimizer_end"), ("decorated", "between")], 2)
)
def test_the_other_forms_of_a_loop(tmp_path: pathlib.Path, form: str, moment: str) -> None:
    features = "dropout,sched,stream" + (",after" if form == "with" and moment == "forward" else "")
    run = struck(tmp_path, "ddp", features, f"2:5:{moment}", form=form)
    check_incident(run, [2])


@pytest.mark.parametrize("moment", some([("forward",), ("backward",), ("optimizer",)], 1))
def test_the_very_first_step(tmp_path: pathlib.Path, moment: str) -> None:
    """DDP has its first buckets in no other step."""
    run = struck(tmp_path, "ddp", CARELESS, f"1:0:{moment}")
    check_incident(run, [1])


@pytest.mark.parametrize("features", some([("two,dropout",), ("static,view",), ("unused,dropout",), ("hook,view",)], 0))
def test_the_very_first_step_of_other_scripts(tmp_path: pathlib.Path, features: str) -> None:
    run = struck(tmp_path, "ddp", features, "1:0:backward")
    check_incident(run, [1])


@pytest.mark.parametrize(
    "strike", some([("0:0:forward",), ("0:1:forward",), ("0:11:between",), ("2:12:loop_end",), ("0:1:backward",)], 0, 3)
)
def test_the_first_and_the_last_step(tmp_path: pathlib.Path, strike: str) -> None:
    run = struck(tmp_path, "ddp", "dropout,sched", strike)
    check_incident(run, [int(strike[0])])


def test_a_second_rollback_to_the_same_step_loses_nothing(tmp_path: pathlib.Path) -> None:
    """What was sealed of a future that was given up does not take the room of the past."""
    run = struck(tmp_path, "fsdp", "dropout", "1:6:optimizer,1:6:optimizer_end")
    check_incident(run, [1])


def test_a_loop_that_owns_its_counter_follows_a_rollback(tmp_path: pathlib.Path) -> None:
    """It cannot be set back from outside: the survivors begin anew as well, and all meet at the step of the snapshot."""
    run = struck(tmp_path, "fsdp", "dropout", "1:6:optimizer_end", form="decorated")
    assert sum(i["steps_lost"] for i in run.incidents()) == 0


@pytest.mark.parametrize(
    ("kind", "rank", "moment"),
    some(
        [
            *[("ddp", 1, moment) for moment in ("setup", "talk1", "talk2", "talk3", "talk4", "built", "tracked")],
            *[("fsdp", 0, moment) for moment in ("talk2", "talk4", "tracked")],
        ],
        2,
        8,
    ),
)
def test_killed_during_start_up(tmp_path: pathlib.Path, moment: str, kind: str, rank: int) -> None:
    """What the others had agreed upon stands; the newcomer comes into the middle of their set-up."""
    run = struck(tmp_path, kind, "talk,dropout", f"{rank}:-1:{moment}")
    check_incident(run, [rank])


@pytest.mark.long
def test_killed_during_start_up_after_more_was_said_than_is_kept(tmp_path: pathlib.Path) -> None:
    """Under DDP a replica makes up for it."""
    run = struck(tmp_path, "ddp", "talk,large,dropout", "2:-1:built")
    check_incident(run, [2])


def test_a_set_up_that_cannot_be_repeated_alone_starts_again(tmp_path: pathlib.Path) -> None:
    """Nobody else has the shard that the missing result went into."""
    run = struck(tmp_path, "fsdp", "talk,large,dropout", "2:-1:built")
    assert any(e["kind"] == "unrecorded" for e in run.events("finding"))


@pytest.mark.parametrize("strike", some([("1:-1:built",), ("1:5:forward",)], 0))
def test_a_set_up_with_async_operations_and_large_objects(tmp_path: pathlib.Path, strike: str) -> None:
    """Nobody knows how far async ones came: such a set-up starts again when it breaks, and is like any other later on."""
    run = struck(tmp_path, "ddp", "async,objects,dropout", strike)
    if strike[2] != "-":
        check_incident(run, [1])


@pytest.mark.parametrize("strike", ["1:-1:tracked", pytest.param("2:6:optimizer_end,0:5:backward", marks=pytest.mark.long)])
def test_killed_after_a_resume(tmp_path: pathlib.Path, strike: str) -> None:
    keep = [*flags(), "--checkpoint", f"file://{tmp_path}/kept", "--checkpoint-every", "5"]
    features, out = "bn,dropout,sched", tmp_path / "again"
    common = ["--kind", "ddp", "--features", features]
    with Launched(tmp_path, keep, "job.py", ["--out", str(tmp_path / "before"), "--steps", "7", *common], name="first") as run:
        assert run.wait() == 0, run.text()
    with Launched(tmp_path, keep, "job.py", ["--out", str(out), "--steps", str(STEPS), "--strike", strike, *common]) as run:
        assert run.wait() == 0, run.text()
    assert run.events("round_started")[0]["step"] == 5
    assert len(list(out.glob("struck-*"))) == strike.count(",") + 1
    assert tuple(digests(out, WORLD)) == undisturbed("ddp", features)
    check_incident(run, [int(text[0]) for text in strike.split(",")])


def test_killed_twice_during_start_up(tmp_path: pathlib.Path) -> None:
    run = struck(tmp_path, "ddp", "talk,dropout", "1:-1:talk2,2:-1:talk4,1:-1:built,0:0:forward")
    check_incident(run, [0, 1, 2])


def test_killed_again_while_another_recovery_is_under_way(tmp_path: pathlib.Path) -> None:
    run = struck(tmp_path, "ddp", "dropout,sched", "1:6:backward,2:6:between")
    check_incident(run, [1, 2])


def test_two_ranks_at_once_with_two_standbys(tmp_path: pathlib.Path) -> None:
    run = struck(tmp_path, "ddp", "dropout,sched", "1:6:backward,2:6:backward", standbys=2)
    check_incident(run, [1, 2])


def test_every_rank_at_once(tmp_path: pathlib.Path) -> None:
    """No survivor is left: all come back from the memory tier."""
    run = struck(tmp_path, "fsdp", "dropout", "0:6:forward,1:6:forward,2:6:forward", standbys=0)
    assert run.incidents()[-1]["restored_from"] == "memory"


def test_more_faults_than_standbys(tmp_path: pathlib.Path) -> None:
    strike = "0:3:forward,1:4:backward,2:5:optimizer,0:7:between,1:8:optimizer_end"
    run = struck(tmp_path, "ddp", CARELESS, strike, standbys=1)
    check_incident(run, [0, 1, 2], count=5)
