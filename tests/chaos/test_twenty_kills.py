"""Twenty kills in one run, at random moments from a printed seed; the bits of an undisturbed run as the oracle.

The nemesis does not wait for a recovery to end: with some probability the next kill falls into it. `CHAOS_SEED=n` repeats a run's
choices of ranks and pauses (not the exact moments: those are the machine's).
"""

from __future__ import annotations

import os
import pathlib
import random
import signal
import time

import pytest
from launched import Launched, digests

pytestmark = [pytest.mark.process, pytest.mark.chaos]

WORLD, STEPS, KILLS = 3, 250, 20
FEATURES = {"ddp": "bn,dropout,sched,clip,average,stream,scaler", "fsdp": "dropout,sched,clip,stream"}


def arguments(where: pathlib.Path, kind: str) -> list[str]:
    return ["--out", str(where), "--kind", kind, "--features", FEATURES[kind], "--steps", str(STEPS), "--pause", "0.02"]


def torment(run: Launched, dice: random.Random, kills: int) -> int:
    """Kill `kills` times; returns how many blows fell before the run was over."""
    blows = 0
    run.until_step(3)
    while blows < kills:
        closed = len(run.incidents())
        rank = dice.randrange(WORLD)
        try:
            os.kill(run.pid(rank), signal.SIGKILL)
        except ProcessLookupError:
            time.sleep(0.01)
            continue
        blows += 1
        if run.process is None or run.process.poll() is not None:
            break
        if dice.random() < 0.7:
            run.until(lambda closed=closed: len(run.incidents()) > closed, "the incident to be closed")
            time.sleep(dice.uniform(0.0, 0.3))
        else:
            time.sleep(dice.uniform(0.0, 0.2))
    return blows


@pytest.mark.parametrize("kind", [pytest.param("ddp", marks=pytest.mark.long), "fsdp"])
def test_twenty_kills(tmp_path: pathlib.Path, kind: str) -> None:
    seed = int(os.environ.get("CHAOS_SEED", random.SystemRandom().randrange(10**6)))
    print(f"seed {seed}")
    undisturbed, tormented = tmp_path / "undisturbed", tmp_path / "tormented"
    undisturbed.mkdir()
    tormented.mkdir()
    flags = ["--nproc-per-node", str(WORLD), "--standbys", "1"]
    with Launched(undisturbed, flags, "job.py", arguments(undisturbed, kind)) as run:
        assert run.wait() == 0, run.text()
    every = random.Random(seed).choice(["auto", "1"])
    with Launched(tormented, flags, "job.py", arguments(tormented, kind), env={"RESILIENT_SNAPSHOT_EVERY": every}) as run:
        blows = torment(run, random.Random(seed), KILLS)
        assert run.wait() == 0, f"seed {seed}\n{run.text()}\n{run.events()[-30:]}"
        incidents, rounds = run.incidents(), run.events("round_started")
    print(f"{blows} kills, {len(incidents)} incidents, downtime max {max(i['downtime_s'] for i in incidents):.3f} s")
    assert blows == KILLS, f"the run was over after {blows} kills"
    assert digests(tormented, WORLD) == digests(undisturbed, WORLD), f"seed {seed}"
    assert not [r for r in rounds[1:] if "starts again" in " ".join(r["why"])], f"seed {seed}: a step that every rank had was given up"
    # Replicas that all die within one recovery leave no live state: only then DDP goes back, to its newest snapshot.
    assert sum(i["steps_lost"] for i in incidents if every == "1" if kind == "fsdp" or i["restored_from"] == "live") == 0, incidents


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_kills_during_start_up(tmp_path: pathlib.Path, kind: str) -> None:
    """At random moments from the first line of the script on; the others go on with what they have."""
    seed = int(os.environ.get("CHAOS_SEED", random.SystemRandom().randrange(10**6)))
    print(f"seed {seed}")
    dice, features = random.Random(seed), "talk,dropout"
    more = ["--kind", kind, "--features", features, "--steps", "12"]
    with Launched(tmp_path, ["--nproc-per-node", str(WORLD)], "job.py", ["--out", str(tmp_path), *more], name="undisturbed") as run:
        assert run.wait() == 0, run.text()
    expected = digests(tmp_path, WORLD)
    tormented = tmp_path / "tormented"
    tormented.mkdir()
    with Launched(tormented, ["--nproc-per-node", str(WORLD)], "job.py", ["--out", str(tormented), *more]) as run:
        run.until(lambda: len(run.events("worker_started")) == WORLD, "all workers")
        first = {e["rank"]: e["pid"] for e in run.events("worker_started")}
        victims = dice.sample(range(WORLD), dice.choice([1, 1, 2]))
        for rank in victims:
            time.sleep(dice.uniform(0.0, 0.25))
            os.kill(first[rank], signal.SIGKILL)
        assert run.wait() == 0, f"seed {seed}\n{run.text()}\n{run.events()[-30:]}"
    assert digests(tormented, WORLD) == expected, f"seed {seed}\n{run.events()}"
    kept = {r["rank"]: r["pid"] for r in run.status()["ranks"] if r["rank"] not in victims}
    assert kept == {rank: pid for rank, pid in first.items() if rank not in victims}, f"seed {seed}\n{run.events()}"
