"""The kill matrix: where a process dies, which one, under DDP and FSDP2 (`pytest -m bench -s tests/bench/test_kill_matrix.py`).

Each row is one run, or several, that is killed KILLS times at the same kind of place: ranks in turn, so that most blows hit a chair
that no standby shadows. Counted: blows, incidents, and whether every bit of every rank's final state is that of an undisturbed run; no step
may be lost. MATRIX_KILLS=n sets the blows per row (20); about a quarter of an hour in all. Prints a table.
"""

from __future__ import annotations

import itertools
import os
import pathlib
import random
import signal
import time

import pytest
from launched import Launched, digests

pytestmark = pytest.mark.bench

WORLD = 3
KILLS = int(os.environ.get("MATRIX_KILLS", "20"))
IN_A_STEP = ["forward", "backward", "collective", "optimizer", "optimizer_end", "between"]
IN_THE_SET_UP = ["setup", "talk1", "talk2", "talk3", "talk4", "built", "tracked"]
FEATURES = {"ddp": "bn,dropout,sched,clip,average,stream,scaler", "fsdp": "dropout,sched,clip,stream"}
FLAGS = ["--nproc-per-node", str(WORLD), "--standbys", "1"]


def job(where: pathlib.Path, kind: str, features: str, steps: int, *more: str) -> list[str]:
    where.mkdir()
    return ["--out", str(where), "--kind", kind, "--features", features, "--steps", str(steps), *more]


def through(where: pathlib.Path, kind: str, features: str, steps: int, *more: str) -> tuple[Launched, list[str]]:
    """A run to its end: the run, and what every rank ended with."""
    with Launched(where.parent, FLAGS, "job.py", job(where, kind, features, steps, *more), name=f"{where.name}-run") as run:
        assert run.wait(600) == 0, f"{run.text()}\n{run.events()[-20:]}"
    return run, digests(where, WORLD)


def told(kind: str, place: str, blows: int, runs: list[Launched], *, equal: bool) -> None:
    incidents = [i for run in runs for i in run.incidents()]
    lost, longest = sum(i["steps_lost"] for i in incidents), max((i["downtime_s"] for i in incidents), default=0.0)
    bits = "bitwise equal" if equal else "NOT EQUAL"
    print(
        f"{kind:<5} {place:<16} {blows:3} kills  {len(incidents):3} incidents  {lost} steps lost  longest {longest:.2f} s  {bits}",
        flush=True,
    )
    assert equal
    assert not lost


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
@pytest.mark.parametrize("place", IN_A_STEP)
def test_in_a_step(tmp_path: pathlib.Path, kind: str, place: str) -> None:
    features, steps = FEATURES[kind], 4 + 2 * KILLS
    strikes = ",".join(f"{number % WORLD}:{2 + 2 * number}:{place}" for number in range(KILLS))
    _, expected = through(tmp_path / "undisturbed", kind, features, steps)
    run, found = through(tmp_path / "struck", kind, features, steps, "--strike", strikes)
    blows = len(list((tmp_path / "struck").glob("struck-*")))
    told(kind, place, blows, [run], equal=found == expected)
    assert blows == KILLS


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_in_the_set_up(tmp_path: pathlib.Path, kind: str) -> None:
    """Every place of the set-up for one rank each, then others; a rank dies in its successor's set-up as well."""
    _, expected = through(tmp_path / "undisturbed", kind, "talk,dropout", 6)
    runs, blows, equal = [], 0, True
    for number in itertools.count():
        where = tmp_path / f"struck-{number}"
        strikes = ",".join(f"{(number + i) % 2}:-1:{place}" for i, place in enumerate(IN_THE_SET_UP) if (i + number) % 2)
        run, found = through(where, kind, "talk,dropout", 6, "--strike", strikes)
        runs.append(run)
        blows += len(list(where.glob("struck-*")))
        equal = equal and found == expected
        if blows >= KILLS:
            break
    told(kind, "set-up", blows, runs, equal=equal)


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
@pytest.mark.parametrize("place", ["standby", "in a recovery"])
def test_from_outside(tmp_path: pathlib.Path, kind: str, place: str) -> None:
    """A standby; or a rank, and while that is recovered from whoever sits on its chair, or another."""
    dice, steps = random.Random(KILLS), 1200 if place == "standby" else 400
    _, expected = through(tmp_path / "undisturbed", kind, FEATURES[kind], steps)
    where, blows = tmp_path / "struck", 0
    arguments = job(where, kind, FEATURES[kind], steps, "--pause", "0.03" if place == "standby" else "0.02")
    with Launched(tmp_path, FLAGS, "job.py", arguments, name="struck-run") as run:
        run.until_step(3)
        while blows < KILLS:
            if place == "standby":
                run.until_standbys(1)
                victims = [run.status()["standbys"][0]["pid"]]
            else:
                closed = len(run.incidents())
                victims = [run.signal(dice.randrange(WORLD))]
                blows += 1
                time.sleep(dice.uniform(0.02, 0.3))
                victims = [run.pid(dice.randrange(WORLD))]
            for pid in victims:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
                blows += 1
            if place != "standby":
                run.until(lambda closed=closed: len(run.incidents()) > closed, "the incident to be closed")
        assert run.wait(600) == 0, f"{run.text()}\n{run.events()[-20:]}"
    told(kind, place, blows, [run], equal=digests(where, WORLD) == expected)
