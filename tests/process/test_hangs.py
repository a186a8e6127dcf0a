"""Ranks that hang in every way: who is to blame is named, all stacks are saved before anybody is killed, and not a bit is lost.

And runs in which nothing is wrong: long pauses that are no hangs, and even ranks of which none is a straggler.
"""

from __future__ import annotations

import functools
import os
import pathlib
import re
import tempfile

import pytest
from launched import Launched, digests
from resilient_agents.stacks import program

pytestmark = pytest.mark.process

WORLD, STEPS = 4, 24


def flags(*more: str, standbys: int = 1) -> list[str]:
    return ["--nproc-per-node", str(WORLD), "--standbys", str(standbys), *more]


def job(where: pathlib.Path, *more: str, steps: int = STEPS) -> list[str]:
    return ["--out", str(where), "--steps", str(steps), *more]


@functools.cache
def undisturbed(steps: int = STEPS) -> tuple[str, ...]:
    where = pathlib.Path(tempfile.mkdtemp(prefix="undisturbed-"))
    with Launched(where, flags(standbys=0), "hanging.py", job(where, steps=steps)) as run:
        assert run.wait() == 0, run.text()
    return tuple(digests(where, WORLD))


def struck(where: pathlib.Path, strike: str) -> Launched:
    with Launched(where, flags(), "hanging.py", job(where, "--strike", strike)) as run:
        assert run.wait() == 0, f"{run.text()}\n{run.events()[-20:]}"
    assert tuple(digests(where, WORLD)) == undisturbed()
    return run


def stacks(run: Launched, incident: int) -> dict[str, str]:
    """Worker to what its threads did, of those that began with a chair."""
    ranks = {e["worker"]: e["rank"] for e in run.events("worker_started") if e["role"] == "rank"}
    files = (run.directory / "evidence" / str(incident)).glob("*.stacks.txt")
    return {file.name.removesuffix(".stacks.txt"): file.read_text() for file in files if file.name.removesuffix(".stacks.txt") in ranks}


def blamed(run: Launched) -> list[tuple[str, int]]:
    return [(v["kind"], v["rank"]) for v in run.events("verdict") if v["verdict"] == "replace"]


@pytest.mark.parametrize(
    "deed",
    ["regex", *(pytest.param(deed, marks=pytest.mark.long) for deed in ("spin", "sleep", "stop"))],
)
def test_who_hangs_between_two_groups_is_named_and_all_stacks_are_saved(tmp_path: pathlib.Path, deed: str) -> None:
    run = struck(tmp_path, f"2:8:{deed}")
    kind = "stopped" if deed == "stop" else "stalled"
    assert blamed(run) == [(kind, 2)], run.events("verdict")
    (incident,) = run.incidents()
    assert (incident["cause"], incident["rank"], incident["steps_lost"]) == (kind, 2, 0)
    if kind == "stalled":
        assert incident["downtime_s"] < 12.0, incident
        (why,) = {v["why"] for v in run.events("verdict") if v["verdict"] == "replace"}
        assert "of the group of ranks 0, 1, 2, 3" in why
    found = stacks(run, incident["incident"])
    assert len(found) == WORLD
    sources = [text.splitlines()[0] for text in found.values()]
    assert sources.count("# stacks by faulthandler") == (WORLD - 1 if deed == "stop" else WORLD), sources
    if deed != "stop" or program() is not None:
        assert all("hanging.py" in text for text in found.values())
        assert sum(re.search(r" in hang\b|\bhang \(hanging", text) is not None for text in found.values()) == 1, "the culprit's shows where"


@pytest.mark.long
@pytest.mark.parametrize("deed", ["skip", "cross"])
def test_a_collective_that_is_left_out_or_made_in_another_order_is_the_programs_mistake(tmp_path: pathlib.Path, deed: str) -> None:
    """Once, it is repeated with the same people."""
    run = struck(tmp_path, f"1:8:{deed}")
    told = [f for f in run.events("finding") if f["kind"] == "collective-order"]
    assert [f["rank"] for f in told] == [1], told
    assert "rank 0 waits for rank 1" in told[0]["text"]
    assert not blamed(run)
    assert len([e for e in run.events("worker_started") if e["role"] == "rank"]) == WORLD, "nobody was replaced"


@pytest.mark.long
def test_a_hang_is_only_told_in_shadow_mode(tmp_path: pathlib.Path) -> None:
    with Launched(tmp_path, flags("--hang", "report"), "hanging.py", job(tmp_path, "--strike", "2:8:spin")) as run:
        run.until(lambda: any(v["kind"] == "stalled" and "only" not in v["why"] for v in run.events("verdict")), "a finding")
        run.until(lambda: any("--hang report" in v["why"] for v in run.events("verdict")), "a verdict")
        assert {v["verdict"] for v in run.events("verdict")} == {"watch"}
        assert [v["rank"] for v in run.events("verdict") if "--hang report" in v["why"]] == [2]
        assert len(run.events("round_started")) == 1


# --------------------------------------------------------------------------- false alarms


def test_long_pauses_of_all_and_of_one_are_no_hangs(tmp_path: pathlib.Path) -> None:
    """An evaluation, a slow storage, late data, checkpoints; announced and not."""
    arguments = job(tmp_path, "--pauses", "6", "--every", "12", steps=46)
    with Launched(tmp_path, flags(standbys=0), "hanging.py", arguments) as run:
        assert run.wait() == 0, run.text()
    assert not run.incidents()
    assert len(run.events("round_started")) == 1
    assert {v["verdict"] for v in run.events("verdict")} <= {"watch", "ignore"}, run.events("verdict")


@pytest.mark.long
def test_a_graph_that_is_compiled_anew_on_one_rank_is_no_hang(tmp_path: pathlib.Path) -> None:
    run = struck(tmp_path, "1:12:compile")
    assert not run.incidents()
    assert blamed(run) == []


@pytest.mark.long
@pytest.mark.timeout(7500)
def test_an_hour_of_training_with_pauses_gives_no_verdict(tmp_path: pathlib.Path) -> None:
    """HANGS_SECONDS in the environment for a shorter or longer one. Watched and ignored is what comes and goes; nobody is touched."""
    seconds = int(os.environ.get("HANGS_SECONDS", "3600"))
    arguments = job(tmp_path, "--pauses", "12", "--every", "200", steps=int(1.2 * seconds / (0.06 + 12 / 200)))
    with Launched(tmp_path, flags(standbys=0), "hanging.py", arguments) as run:
        assert run.wait(2 * seconds + 60) == 0, run.text()
    assert not run.incidents()
    assert len(run.events("round_started")) == 1
    assert {v["verdict"] for v in run.events("verdict")} <= {"watch", "ignore"}, run.events("verdict")


# --------------------------------------------------------------------------- stragglers


def straggler(run: Launched) -> list[int]:
    return [f["rank"] for f in run.events("finding") if f["kind"] == "straggler"]


def test_a_slow_rank_is_named_and_the_status_says_who_waits(tmp_path: pathlib.Path) -> None:
    with Launched(tmp_path, flags(standbys=0), "hanging.py", job(tmp_path, "--slow", "3:0.04", steps=2000)) as run:
        run.until(lambda: straggler(run), "a straggler")
        ranks = run.status()["ranks"]
        assert straggler(run) == [3]
        assert ranks[3]["slower"] > 0.2
        assert min(r["waits"] for r in ranks[:3]) > ranks[3]["waits"]
        assert {v["verdict"] for v in run.events("verdict")} == {"watch"}


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_even_ranks_are_no_stragglers_however_loaded_the_machine_is(tmp_path: pathlib.Path) -> None:
    for attempt in range(int(os.environ.get("HANGS_ATTEMPTS", "20"))):
        where = tmp_path / str(attempt)
        where.mkdir()
        with Launched(where, flags(standbys=0), "hanging.py", job(where, "--pause", "0.02", steps=500)) as run:
            assert run.wait() == 0, run.text()
        assert not straggler(run), run.events("finding")
