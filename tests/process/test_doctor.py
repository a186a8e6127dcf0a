"""`resilient doctor` and the gate, with real processes that hang, crash and lie: each is told, none of them delays or ends the rest."""

from __future__ import annotations

import json
import re
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path

import pytest
from conftest import Start
from ill import installed
from outside import ROOT, alive, environment, wait_for
from resilient_agents import preflight

pytestmark = [pytest.mark.process, pytest.mark.timeout(180)]
OURS = {"all-reduce", "bandwidth", "clock", "disk", "limits", "matmul", "network", "nvidia", "shared-memory", "software", "transfer"}


def doctor(*arguments: str | Path, path: str = "", preexec_fn=None, **env: str) -> subprocess.CompletedProcess[str]:
    env = environment(**env)
    env["PYTHONPATH"] = ":".join(filter(None, [env["PYTHONPATH"], path]))
    command = [sys.executable, "-m", "resilient.cli", "doctor", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=120, check=False, preexec_fn=preexec_fn)


def by_name(done: subprocess.CompletedProcess[str]) -> dict[str, list[dict]]:
    rows: dict[str, list[dict]] = {}
    for row in json.loads(done.stdout)["rows"]:
        rows.setdefault(row["name"], []).append(row)
    return rows


def registered() -> set[str]:
    return {entry.name for entry in entry_points(group="resilient.checks")}


def test_every_check_is_registered() -> None:
    assert registered() >= OURS, "install the package again (pip install -e .): its metadata are older than pyproject.toml"


def test_a_sound_node_quick_from_end_to_end(tmp_path: Path) -> None:
    done = doctor("--quick", "--json", "--run-dir", tmp_path / "not" / "there", "--checkpoint", "s3://elsewhere/x")
    chart = json.loads(done.stdout)
    rows = by_name(done)
    assert rows.keys() >= OURS
    own = [row for row in chart["rows"] if row["source"] == "check"]
    assert not [row for row in own if row["state"] == "fail"], done.stdout
    results = [row for row in rows["matmul"] if row["what"].endswith("result") and row["device"] == "cpu"]
    assert [row["what"] for row in results] == ["float32 result", "bfloat16 result", "float16 result"]
    assert all(row["value"].startswith("exact, ") for row in results)
    assert rows["all-reduce"][0]["number"] > 0
    assert {row["what"]: row["value"] for row in rows["disk"]}["run content"] == "equal bytes"
    assert not (tmp_path / "not").exists()
    assert chart["seconds"] < 30
    healthy = tmp_path / "healthy.json"
    for row in own:
        if row["name"] == "shared-memory" or row["better"]:
            row["number"] = 1e12 if row["better"] == "more" else row["number"]
    healthy.write_text(json.dumps(chart))
    beside = doctor("--quick", "--json", "--only", "bandwidth", "--compare", healthy)
    (row,) = by_name(beside)["bandwidth"]
    assert (row["state"], beside.returncode) == ("warn", 0)
    assert row["text"] == "a healthy node does better"


def test_what_the_kernel_said_in_the_last_two_hours_counts(tmp_path: Path) -> None:
    (tmp_path / "dev").mkdir()
    lost = "NVRM: Xid (PCI:0000:3b:00): 79, pid=1, name=python, GPU has fallen off the bus."
    (tmp_path / "dev/kmsg").write_text(f"4,1,1000000,-;{lost}\n6,2,3600000000,-;something else\n")
    done = doctor("--json", "--only", "kernel-log", "--root", tmp_path)
    (row,) = by_name(done)["kernel-log"]
    assert (done.returncode, row["state"], row["device"]) == (1, "fail", "pci:0000:3b:00")
    assert row["text"].endswith("(60 min ago)") and row["seconds"] < 5
    policy = tmp_path / "mine.toml"
    policy.write_text("[probe]\nlookback_s = 600")
    assert doctor("--json", "--only", "kernel-log", "--root", tmp_path, "--policy", policy).returncode == 0
    policy.write_text("[probe]\nlookback = 600")
    wrong = doctor("--only", "kernel-log", "--policy", policy)
    assert wrong.returncode == 2 and "'lookback_s'" in wrong.stderr
    with (tmp_path / "dev/kmsg").open("a") as log:
        log.write("6,3,7300000000,-;two hours later\n")
    assert doctor("--json", "--only", "kernel-log", "--root", tmp_path).returncode == 0


def test_whoever_hangs_or_crashes_is_told_and_the_rest_goes_on(tmp_path: Path) -> None:
    names = ("Sound", "Failing", "Hangs", "Crashes", "Raises", "Leaves", "NotHere", "Missing")
    path = installed(
        tmp_path / "site", {name.lower(): name for name in names}, {"sees": "Sees", "seesnothing": "SeesNothing", "cannotsee": "CannotSee"}
    )
    pids = tmp_path / "pids"
    ill = ",".join([*(name.lower() for name in names), "sees,seesnothing,cannotsee,limits"])
    done = doctor("--json", "--only", ill, path=path, ILL_PID=str(pids))
    assert done.returncode == 1, done.stderr
    rows = by_name(done)
    assert rows["sound"][0]["state"] == rows["seesnothing"][0]["state"] == "pass"
    assert {row["what"] for row in rows["limits"]} >= {"open files", "locked memory"}
    assert (rows["nothere"][0]["state"], rows["nothere"][0]["text"]) == ("absent", "no such card")
    for name, state, text in [
        ("hangs", "fail", "no answer within 1 s"),
        ("crashes", "fail", "killed by signal 11 (SIGSEGV) (about to look at address 0)"),
        ("raises", "fail", "exit code 1 (ValueError: no such thing)"),
        ("leaves", "fail", "it ended without an answer"),
        ("cannotsee", "fail", "exit code 1 (OSError: no eyes)"),
    ]:
        (row,) = rows[name]
        assert (row["state"], row["text"]) == (state, text)
    assert "has no attribute 'Missing'" in rows["missing"][0]["text"]
    assert [(row["state"], row["device"]) for row in rows["sees"]] == [("fail", "pci:0000:3b:00"), ("pass", "")]
    findings = {(it["kind"], it["code"]): it for it in json.loads(done.stdout)["findings"]}
    assert findings["xid", "79"]["class"] == "cordon"
    assert findings["doctor", "failing"]["class"] == "replace"
    assert findings["doctor", "failing"]["device"] == "dev:table"
    assert findings["doctor", "hangs"]["class"] == "cordon"
    for pid in map(int, pids.read_text().split()):
        wait_for("the hanging check and its child to be gone", lambda pid=pid: not alive(pid), 5.0)


def test_a_wrong_product_and_exercises_that_hang_or_crash(tmp_path: Path) -> None:
    checks = {"wrong": "WrongMatmul", "fickle": "FickleMatmul", "crashing": "CrashingExercise", "hanging": "HangingExercise"}
    done = doctor("--quick", "--json", "--only", ",".join(checks), path=installed(tmp_path, checks))
    assert done.returncode == 1, done.stderr
    rows = by_name(done)
    results = [row for row in rows["wrong"] if row["device"] == "cpu"]
    assert [row["value"] for row in results] == ["WRONG"] * 3
    assert all("1 of " in row["text"] and "row 17 first" in row["text"] for row in results), results
    assert results[0]["class"] == "cordon"
    assert "product 3 of the same matrices differs from the first in 1 elements" in rows["fickle"][0]["text"]
    assert rows["crashing"][0]["text"] == "killed by signal 11 (SIGSEGV)"
    assert rows["hanging"][0]["text"] == "no answer within 0.5 s, killed by us (half-way)"


def test_torch_that_does_not_load_is_told_once(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('libcudart.so.13 is not there')\n")
    done = doctor("--json", "--only", "software,matmul,limits", PYTHONPATH=f"{tmp_path}:{ROOT}:{ROOT / 'agents'}")
    states = sorted((name, rows[0]["state"]) for name, rows in by_name(done).items())
    assert [state for _, state in states].count("fail") == 1
    assert [state for _, state in states].count("skipped") == 1
    assert dict(states)["limits"] == "pass"
    assert json.loads(done.stdout)["seconds"] < 30
    assert "libcudart.so.13 is not there" in done.stdout


def test_torch_that_goes_away(tmp_path: Path) -> None:
    checks = {"a-kills": "KillsTheGym", "b-late": "Late", "c-late": "Late"}
    done = doctor("--json", "--only", ",".join(checks), path=installed(tmp_path, checks))
    rows = by_name(done)
    assert rows["a-kills"][0]["text"].startswith("the process that has torch hung up")
    assert rows["b-late"][0]["text"] == "the process that loads torch: killed by signal 9 (SIGKILL)"
    assert rows["c-late"][0]["state"] == "skipped"
    assert json.loads(done.stdout)["seconds"] < 30


def test_a_full_disk(small: Path) -> None:
    (small / "all").write_bytes(bytes(3 << 20))
    done = doctor("--json", "--only", "disk", "--run-dir", small, TMPDIR=str(small))
    rows = {row["what"]: row for row in by_name(done)["disk"]}
    assert (rows["run room"]["state"], rows["run content"]["value"]) == ("fail", "No space left on device")
    assert done.returncode == 1
    assert [path.name for path in small.iterdir()] == ["all"]


def test_a_file_that_may_not_grow(tmp_path: Path) -> None:
    def little() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))

    done = doctor("--json", "--only", "disk", TMPDIR=str(tmp_path), preexec_fn=little)
    rows = {row["what"]: row for row in by_name(done)["disk"]}
    assert rows["tmp content"]["value"] == "File too large"
    assert not list(tmp_path.iterdir())


def test_wrong_usage() -> None:
    for arguments, said in [
        (["--only", "matmull"], "the nearest is 'matmul'"),
        (["--skip", "probes,checks"], "leave nothing to be done"),
        (["--timeout-s", "0"], "more than 0 seconds expected, 0 found"),
        (["--compare", "/does/not/exist"], "cannot be read (No such file or directory)"),
        (["--devices", "first"], "numbers with commas between them expected"),
    ]:
        done = doctor(*arguments)
        assert (done.returncode, said in done.stderr) == (2, True), done.stderr
        assert not done.stdout


def test_the_time_limit_is_for_all(tmp_path: Path) -> None:
    path = installed(tmp_path / "site", {"hangs": "HangsLong", "early": "HangsEarly", "sound": "Sound"})
    began = time.monotonic()
    done = doctor("--timeout-s", "1", "--only", "hangs,early,sound", path=path, ILL_PID=str(tmp_path / "pids"))
    assert done.returncode == 1
    assert time.monotonic() - began < 20
    assert done.stdout.count("the time limit of 1 s for all was reached (--timeout-s)") == 2
    assert "NOT fit for work: 1 pass, 2 fail" in done.stdout
    assert "\x1b" not in done.stdout


# --------------------------------------------------------------------------- the gate


def test_a_node_that_fails_its_preflight_takes_no_part(start: Start, script: Callable[..., Path], tmp_path: Path) -> None:
    path = script(f"open({str(tmp_path / 'began')!r}, 'w')\n")
    ill = installed(tmp_path / "site", {"failing": "Failing"})
    arguments = ("--standalone", "--nproc-per-node", "1", "--preflight", "quick", path)
    run = start(*arguments, PYTHONPATH=f"{ROOT}:{ROOT / 'agents'}:{ill}")
    assert run.wait() == preflight.UNFIT_EXIT == 3
    assert "resilient-run: this node failed its preflight (--preflight quick) and takes no part\n" in run.output
    assert re.search(r"fail +failing +dev:table +3 legs +4 legs", run.output)
    assert "is NOT fit for work" in run.output
    assert not (tmp_path / "began").exists()
    assert not run.run_dir.exists()
    run.nothing_left()


@pytest.mark.long
def test_a_sound_node_goes_through(start: Start, script: Callable[..., Path]) -> None:
    run = start("--standalone", "--nproc-per-node", "1", "--preflight", "quick", script("print('began')"))
    assert run.wait() == 0
    assert "began" in run.output
    run.nothing_left()


@pytest.mark.long
def test_a_doctor_without_end_lets_nobody_through(start: Start, script: Callable[..., Path], tmp_path: Path) -> None:
    ill = installed(tmp_path / "site", {"hangs": "HangsLong"})
    arguments = ("--standalone", "--nproc-per-node", "1", "--preflight", "quick", "--preflight-timeout", "4", script("print('began')"))
    run = start(*arguments, PYTHONPATH=f"{ROOT}:{ROOT / 'agents'}:{ill}", ILL_PID=str(tmp_path / "pids"))
    assert run.wait() == preflight.UNFIT_EXIT
    assert "the time limit of 4 s for all was reached" in run.output
    assert "began" not in run.output
    for pid in map(int, (tmp_path / "pids").read_text().split()):
        wait_for("the hanging check and its child to be gone", lambda pid=pid: not alive(pid), 5.0)
    run.nothing_left()


async def test_a_doctor_that_is_itself_ill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{ROOT / 'agents'}:{installed(tmp_path / 'site', {'stops': 'StopsTheDoctor'})}")
    monkeypatch.setattr(preflight, "GRACE_S", 0.5)
    verdict = await preflight._examined(["--only", "stops"], 2.0)
    assert not verdict.sound
    assert verdict.text == "resilient doctor: an end within 2 s expected, none found 0.5 s after that"
    verdict = await preflight._examined(["--only", "nobody"], 2.0)
    assert "a chart expected, exit code 2 found, and: resilient doctor: 'nobody'" in verdict.text


async def test_a_device_is_looked_at_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{ROOT / 'agents'}")
    verdict = await preflight.recheck(0, 60.0)
    assert verdict.sound, verdict.text
    assert "float32 result" in verdict.text
