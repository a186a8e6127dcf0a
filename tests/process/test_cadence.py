"""When checkpoints are made, in real runs: by the run's own choice, when somebody asks, and when a scheduler says that it is over."""

from __future__ import annotations

import contextlib
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import pytest
from launched import Launched, digests

from resilient.checkpoint.disk import DiskTier

pytestmark = [pytest.mark.process, pytest.mark.timeout(180)]
WORLD = 2


def launched(
    where: pathlib.Path, *arguments: str, every: str = "100000", flags: tuple[str, ...] = (), name: str = "run", **more: str
) -> Launched:
    keep = ["--nproc-per-node", str(WORLD), "--checkpoint", f"file://{where}/kept", "--checkpoint-every", every, *flags]
    return Launched(where, keep, more.get("job", "job.py"), ["--out", str(where), *arguments], name=name)


def kept(where: pathlib.Path) -> tuple[int, ...]:
    """Committed steps."""
    return DiskTier(f"file://{where}/kept").steps()


def test_the_run_chooses_its_interval_and_keeps_its_end(tmp_path):
    with launched(tmp_path, "--steps", "150", "--pause", "0.06", every="auto") as run:
        run.until(lambda: run.events("checkpoint_committed"), "the first checkpoint")
        found = run.until(lambda: (c := run.status()["checkpoint"])["cost_s"] is not None and c, "what it cost")
        text = subprocess.run(
            [sys.executable, "-m", "resilient.cli", "status", run.directory], capture_output=True, text=True, env=run.env, check=True
        )
        assert run.wait() == 0, run.text()
    print(found, text.stdout)
    assert found["auto"]
    assert found["step_s"] > 0.05
    assert found["every"] * found["step_s"] * 0.01 > found["cost_s"] * 0.99, "within 1 % of the time"
    assert found["failures"] == 0
    assert found["failures_per_day"] < 0.0039
    assert f"checkpoint step {found['committed']}; every" in text.stdout
    assert kept(tmp_path)[-1] == 150, "the last step is kept"
    assert len(kept(tmp_path)) == 2


@pytest.mark.parametrize("kind", ["ddp", pytest.param("fsdp", marks=pytest.mark.long)])
def test_asked_for_from_outside_all_ranks_seal_one_step(tmp_path, kind):
    with launched(tmp_path, "--steps", "100000", "--pause", "0.05", "--kind", kind, every="0") as run:
        run.until_step(5)
        snapshot(run)
        assert len(kept(tmp_path)) == 1
        assert run.process is not None
        run.process.send_signal(signal.SIGUSR1)
        run.until(lambda: len(kept(tmp_path)) == 2, "a checkpoint after the warning")
        assert run.events("finding")[0]["kind"] == "warning"


def snapshot(run: Launched) -> None:
    command = [sys.executable, "-m", "resilient.cli", "snapshot", str(run.directory)]
    done = subprocess.run(command, capture_output=True, text=True, env=run.env, timeout=90, check=False)
    assert done.returncode == 0, f"{done.stderr}\n{run.text()}\n{run.events()[-20:]}"


@pytest.mark.parametrize("kind", ["ddp", pytest.param("fsdp", marks=pytest.mark.long)])
@pytest.mark.parametrize("how", [pytest.param("is not told", marks=pytest.mark.long), "dies"])
def test_who_does_not_hear_of_it_or_dies_at_it_seals_the_same_step(tmp_path, how, kind):
    with launched(tmp_path, "--how", how, "--kind", kind, "--steps", "100000", every="0", flags=("--standbys", "1"), job="deaf.py") as run:
        run.until_standbys(1)
        run.until_step(run.status()["ranks"][0]["step"] + 300)  # steps are known as they are without a standby's warm-up beside them
        snapshot(run)
        if how == "dies":
            assert kept(tmp_path)[0] == int((tmp_path / "died").read_text()), "the newcomer made it when it had come to that step"
            (incident,) = run.incidents()
            assert incident["steps_lost"] <= (kind == "fsdp")
        assert len(kept(tmp_path)) == 1


def stopped(run: Launched) -> str:
    """SIGTERM to the launcher; what it said in the end."""
    assert run.process is not None
    run.process.send_signal(signal.SIGTERM)
    began = time.monotonic()
    assert run.wait() == 1, run.text()
    print(f"ended {time.monotonic() - began:.2f} s after SIGTERM")
    return str(run.events("run_finished")[-1]["message"])


@pytest.mark.parametrize("kind", [pytest.param("ddp", marks=pytest.mark.long), "fsdp"])
def test_sigterm_then_it_goes_on_from_nearly_the_last_step(tmp_path, kind):
    arguments = ["--steps", "120", "--pause", "0.03", "--kind", kind]
    with launched(tmp_path, *arguments) as run:
        run.until_step(40)
        message = stopped(run)
        reached = min(rank["step"] for rank in run.status()["ranks"])
    (step,) = kept(tmp_path)
    assert f"step {step} was brought from memory to the checkpoint URL" in message
    assert message in run.text()
    assert reached - 1 <= step <= reached if kind == "fsdp" else 40 <= step <= reached
    with launched(tmp_path, *arguments, name="again") as again:
        assert again.wait() == 0, again.text()
    assert again.events("round_started")[0]["step"] == step
    (tmp_path / "undisturbed").mkdir()
    with launched(tmp_path / "undisturbed", *arguments) as whole:
        assert whole.wait() == 0, whole.text()
    assert digests(tmp_path, WORLD) == digests(tmp_path / "undisturbed", WORLD)


@pytest.mark.parametrize(
    "how", [pytest.param("hangs", marks=pytest.mark.long), "is stopped", pytest.param("ignores it", marks=pytest.mark.long)]
)
def test_sigterm_and_a_worker_that_does_not_care(tmp_path, how):
    with launched(tmp_path, "--kind", "fsdp", "--how", how, "--steps", "100000", flags=("--grace-s", "9"), job="deaf.py") as run:
        if how == "ignores it":
            run.until_step(20)
        else:
            run.until((tmp_path / "deaf").exists, "it does not move any more")
        if how == "is stopped":
            run.signal(1, signal.SIGSTOP)
        began = time.monotonic()
        message = stopped(run)
        took = time.monotonic() - began
    (step,) = kept(tmp_path)
    assert f"step {step} was brought from memory" in message
    assert step >= 20
    assert took < 9 + 3


@pytest.mark.long
@pytest.mark.parametrize("told", [(0,), (1,), (0, 1)])
def test_sigterm_to_one_of_two_nodes_or_both(tmp_path, told):
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    flags = ["--nnodes", "2", "--rdzv-backend", "c10d", "--rdzv-id", "job", "--rdzv-endpoint", f"localhost:{port}", "--nproc-per-node", "1"]
    keep = ["--checkpoint", f"file://{tmp_path}/kept", "--checkpoint-every", "100000"]
    job = ["--out", str(tmp_path), "--steps", "100000", "--pause", "0.03", "--kind", "fsdp"]
    with contextlib.ExitStack() as stack:
        nodes = [Launched(tmp_path, [*flags, *keep], "job.py", job, name=f"node{i}", standalone=False) for i in range(2)]
        stack.enter_context(nodes[0])
        nodes[0].until(lambda: "run 2" in nodes[0].text() or answers(port), "the coordinator's port")
        stack.enter_context(nodes[1])
        leader = nodes[0]
        leader.until_step(20)
        for i in told:
            nodes[i].process.send_signal(signal.SIGTERM)
        assert [node.wait(60) for node in nodes] == [1, 1]
        reached = min(rank["step"] for rank in leader.status()["ranks"])
    (step,) = kept(tmp_path)
    assert reached - 1 <= step <= reached
    assert f"step {step} was brought from memory" in leader.text()


def answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.mark.long
def test_a_scheduler_that_signals_the_workers_too(tmp_path):
    with launched(tmp_path, "--steps", "100000", "--pause", "0.03", "--kind", "fsdp") as run:
        run.until_step(20)
        for rank in range(WORLD):
            run.signal(rank, signal.SIGTERM)
        message = stopped(run)
        reached = min(rank["step"] for rank in run.status()["ranks"])
    (step,) = kept(tmp_path)
    assert f"step {step} was brought from memory" in message
    assert step >= max(20, reached - 1)


def test_sigterm_with_too_little_time_commits_nothing(tmp_path):
    with launched(tmp_path, "--steps", "100000", "--pause", "0.03", flags=("--grace-s", "0.0005")) as run:
        run.until_step(20)
        message = stopped(run)
    assert kept(tmp_path) == ()
    assert "(--grace-s)" in message
    assert "there is no checkpoint" in message
    assert not list((tmp_path / "kept").rglob("COMMIT.json"))


@pytest.mark.long
def test_no_grace_no_rescue(tmp_path):
    with launched(tmp_path, "--steps", "100000", "--pause", "0.03", flags=("--grace-s", "0")) as run:
        run.until_step(5)
        stopped(run)
    assert kept(tmp_path) == ()
    assert os.listdir(tmp_path / "kept") == [] if (tmp_path / "kept").exists() else True
