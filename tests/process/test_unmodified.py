"""A DDP script without a line of ours: a killed rank restarts its group from the zygote, much faster than torchrun does.

Both launchers run the same script one after the other on the same machine, and both are measured from the kill to the first step that the
restarted group completes. The numbers are printed; asserted is only which one is faster, by a factor of three.
"""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Start
from outside import Run, wait_for

pytestmark = [pytest.mark.process, pytest.mark.timeout(240)]

DDP = """
import os, sys, time
import torch, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

def main():
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    net = DistributedDataParallel(torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU(), torch.nn.Linear(64, 1)))
    opt = torch.optim.Adam(net.parameters())
    restart = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    steps = int(sys.argv[1])
    for i in range(steps):
        net(torch.randn(32, 64)).pow(2).mean().backward()
        opt.step()
        opt.zero_grad()
        if i == 0:
            print(f"first step: pid {os.getpid()} restart {restart} at {time.time():.6f}", flush=True)
        time.sleep(0.02)
        if restart == 0 and i == steps - 1:
            time.sleep(100)
    dist.destroy_process_group()
    print("done", flush=True)

if __name__ == "__main__":
    main()
"""


def first_steps(run: Run) -> list[tuple[int, float]]:
    """(pid, unix seconds) of every first step so far."""
    return [(int(pid), float(t)) for pid, t in re.findall(r"first step: pid (\d+) restart \d+ at ([\d.]+)", run.output)]


def kill_one_and_time(run: Run, workers: int) -> float:
    """SIGKILL the last worker that came up; seconds until all have done a first step again."""
    run.said("first step", workers)
    before = first_steps(run)
    time.sleep(0.5)
    killed_at = time.time()
    os.kill(before[-1][0], signal.SIGKILL)
    after = wait_for("the group to come back", lambda: first_steps(run)[workers:] if len(first_steps(run)) >= 2 * workers else None, 90.0)
    assert after is not None
    assert not {pid for pid, _ in after} & {pid for pid, _ in before}
    return max(t for _, t in after) - killed_at


def test_a_killed_rank_restarts_the_group_much_faster_than_torchrun(start: Start, script: Callable[..., Path]) -> None:
    path = script(DDP)
    flags = ["--standalone", "--nproc-per-node", "2"]
    ours = start(*flags, path, "50")
    our_time = kill_one_and_time(ours, 2)
    assert ours.wait() == 0, ours.output
    assert ours.output.count("done") == 2
    ours.nothing_left()

    # without the variable torchrun's restarted gloo reads the dead group's addresses and never comes up
    theirs = start(*flags, "--max-restarts", "3", path, "50", module="torch.distributed.run", TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")
    their_time = kill_one_and_time(theirs, 2)
    assert theirs.wait() == 0, theirs.output
    print(
        f"\nSIGKILL to the restarted group's first step: resilient-run {our_time:.3f} s, torchrun {their_time:.3f} s, ratio {their_time / our_time:.0f}"
    )
    assert our_time * 3 < their_time

    events = [event["event"] for event in ours.events()]
    for name in ("run_started", "worker_started", "finding", "verdict", "round_started", "incident_closed", "run_finished"):
        assert name in events
    (incident,) = ours.events("incident_closed")
    assert (incident["cause"], incident["restored_from"]) == ("exit", "none")


def test_killed_again_and_again_it_does_not_use_up_the_users_restarts(start: Start, script: Callable[..., Path]) -> None:
    run = start("--standalone", "--nproc-per-node", "2", "--max-restarts", "0", script(DDP), "50")
    times = []
    for kills in range(3):
        run.said("first step", 2 * (kills + 1))
        pids = run.pids(2)
        wait_for("its pids to be those of this attempt", lambda: set(run.pids(2)) == {pid for pid, _ in first_steps(run)[-2:]})
        pids = run.pids(2)
        began = time.monotonic()
        os.kill(pids[kills % 2], signal.SIGKILL)
        wait_for("the group to come back", lambda kills=kills: len(first_steps(run)) >= 2 * (kills + 2))
        times.append(time.monotonic() - began)
    print(f"\nthree kills, each back after {', '.join(f'{t:.3f}' for t in times)} s")
    assert run.wait() == 0, run.output
    assert run.status()["round"] == 4
    run.nothing_left()


def test_standbys_wait_until_the_script_is_known_to_be_ours(start: Start, script: Callable[..., Path]) -> None:
    """A script that never calls `resilient.init` gets no standby: a second copy of it would do real work twice."""
    run = start("--standalone", "--nproc-per-node", "2", "--standbys", "1", script(DDP), "20")
    run.said("first step", 2)
    time.sleep(1.0)
    assert run.status()["standbys"] == []
    assert [event["role"] for event in run.events("worker_started")] == ["rank", "rank"]
    run.process.terminate()
    assert run.wait() == 1
    run.nothing_left()
