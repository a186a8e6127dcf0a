"""The journal: formats that outside tools read, and no run lost over a full disk."""

from __future__ import annotations

import json
import os
import time

import pytest

from resilient import cli
from resilient.core import lines
from resilient.host.journal import WISH, Journal


def status(**changed) -> lines.Status:
    values = {
        "run_id": "r",
        "state": "running",
        "round": 3,
        "world_size": 1,
        "ranks": (lines.RankStatus(rank=0, node="n0", local_rank=0, pid=7, step=12),),
        "standbys": (lines.StandbyStatus(node="n0", pid=8, shadow=0, ready=True),),
    }
    return lines.Status(**{**values, **changed})


@pytest.fixture
def journal(tmp_path):
    made = Journal(tmp_path / "runs" / "r")
    yield made
    made.close()


def test_a_line_has_t_and_event(journal):
    journal.line(lines.RunStarted(run_id="r", world_size=2, nodes=("n0",)))
    journal.line({"event": "log", "step": 1})
    first, second = [json.loads(line) for line in (journal.directory / "events.jsonl").read_text().splitlines()]
    assert (first["event"], first["world_size"], first["nodes"]) == ("run_started", 2, ["n0"])
    assert abs(first["t"] - time.time()) < 60
    assert (second["event"], second["step"]) == ("log", 1)


def test_status_has_the_fixed_fields_and_is_replaced_whole(journal):
    for step in range(3):
        journal.status(status(ranks=(lines.RankStatus(rank=0, node="n0", local_rank=0, pid=7, step=step),)))
        found = json.loads((journal.directory / "status.json").read_text())
        assert set(found) == {"run_id", "state", "round", "world_size", "ranks", "standbys", "checkpoint", "replicas", "updated_at"}
        assert found["ranks"] == [{"rank": 0, "node": "n0", "local_rank": 0, "pid": 7, "step": step, "waits": None, "slower": None}]
        assert found["standbys"] == [{"node": "n0", "pid": 8, "shadow": 0, "ready": True}]
    assert sorted(path.name for path in journal.directory.iterdir()) == ["events.jsonl", "status.json"]


def test_two_writers_never_mix_their_lines(journal):
    other = Journal(journal.directory)
    for i in range(50):
        (journal, other)[i % 2].line({"event": "log", "text": "x" * 3000, "i": i})
    other.close()
    rows = [json.loads(line) for line in (journal.directory / "events.jsonl").read_text().splitlines()]
    assert [row["i"] for row in rows] == list(range(50))


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_a_full_disk_costs_lines_and_is_said_once(tmp_path, capsys):
    (tmp_path / "events.jsonl").symlink_to("/dev/full")
    journal = Journal(tmp_path)
    for _ in range(3):
        journal.line({"event": "log"})
    journal.close()
    assert capsys.readouterr().err.count("cannot be written") == 1


def test_what_the_command_line_tool_shows(journal, capsys):
    directory = str(journal.directory)
    assert cli.main(["status", directory]) == 2
    journal.status(status())
    journal.line(lines.RunStarted(run_id="r", world_size=1, nodes=("n0",)))
    journal.line(lines.FindingLine(kind="exit", node="n0", rank=0, text="Traceback\n  x\nValueError: boom\n"))
    journal.line(lines.RunFinished(exit_code=0))
    capsys.readouterr()
    assert cli.main(["status", directory]) == 0
    shown = capsys.readouterr().out
    assert "run r: running, round 3, 1 ranks" in shown
    assert "pid 7        step 12" in shown
    assert "standby for rank 0" in shown
    assert cli.main(["events", directory, "--follow"]) == 0
    shown = capsys.readouterr().out
    assert [line.split()[2] for line in shown.splitlines()] == ["run_started", "finding", "run_finished"]
    assert "text=ValueError: boom" in shown
    assert cli.main(["events", directory, "--json"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 3


def test_a_status_that_is_old_says_so(journal, capsys):
    (journal.directory / "status.json").write_text(
        json.dumps(
            {"run_id": "r", "state": "running", "round": 1, "world_size": 0, "ranks": [], "standbys": [], "updated_at": time.time() - 99}
        )
    )
    assert cli.main(["status", str(journal.directory)]) == 0
    assert "is resilient-run alive?" in capsys.readouterr().out


def test_clean_removes_what_dead_runs_left(tmp_path, capsys):
    dead = tmp_path / "resilient.999999999-1-abcd.page.n0.1"
    other = tmp_path / "somebody-elses"
    for path in (dead, other):
        path.touch()
    assert cli.main(["clean", "--memory-dir", str(tmp_path)]) == 0
    assert "1 stale" in capsys.readouterr().out
    assert not dead.exists()
    assert other.exists()


def test_a_wish_is_seen_once(journal):
    assert not journal.asked()
    (journal.directory / WISH).touch()
    assert journal.asked()
    assert not journal.asked()
