"""A job of four ranks in pairs, whose ranks hang in every way, dawdle, or make long pauses that are none of a hang.

    hanging.py --out DIR --steps N [--strike "rank:step:deed,..."] [--slow RANK:SECONDS] [--pauses] [--pause S]

Deeds, each once (a marker file in DIR keeps it from happening again in the replay):
    stop    SIGSTOP             spin    an endless loop in Python       regex   one in C, that holds the GIL
    sleep   blocked for ever, between two collectives                   compile  for nine seconds: no hang
    skip    leaves out its pair's all-reduce           cross   makes it after that of all ranks, the others before
--pauses: an evaluation, a compile, a checkpoint on all ranks at once, announced and not, and data that comes late on one rank.
Each rank writes DIR/digest-<rank>.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import pathlib
import re
import signal
import threading
import time

import torch
import torch.distributed as dist
from torch import nn

import resilient

parser = argparse.ArgumentParser()
parser.add_argument("--out", type=pathlib.Path, required=True)
parser.add_argument("--steps", type=int, default=20)
parser.add_argument("--strike", default="")
parser.add_argument("--slow", default="")
parser.add_argument("--pauses", type=float, default=0.0, help="seconds of each")
parser.add_argument("--every", type=int, default=20, help="steps between two pauses")
parser.add_argument("--pause", type=float, default=0.03)
args = parser.parse_args()

run = resilient.init()
rank = run.rank
pairs = [dist.new_group([first, first + 1]) for first in range(0, run.world_size, 2)]
pair = pairs[rank // 2]
torch.manual_seed(7)
net = nn.parallel.DistributedDataParallel(nn.Sequential(nn.Linear(24, 31), nn.ReLU(), nn.Linear(31, 7)))
opt = torch.optim.Adam(net.parameters(), lr=0.01)
run.track(model=net, optimizer=opt)
strikes = {(int(who), int(when)): deed for who, when, deed in (text.split(":") for text in filter(None, args.strike.split(",")))}
slow, slow_s = (int(args.slow.split(":")[0]), float(args.slow.split(":")[1])) if args.slow else (-1, 0.0)


def struck(step: int) -> str:
    """What is to be done in this step, once."""
    deed = strikes.get((rank, step), "")
    marker = args.out / f"struck-{rank}-{step}-{deed}"
    if not deed or run.is_standby or marker.exists():
        return ""
    marker.touch()
    return deed


def hang(deed: str) -> None:
    """Do not come back."""
    match deed:
        case "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        case "spin":
            while True:
                pass
        case "regex":
            re.match(r"(a+)+$", "a" * 60 + "b")
        case "sleep":
            threading.Event().wait()
        case "compile":
            torch.compile(lambda x: 2 * x, backend=slowly)(torch.ones(3))


def slowly(graph, _):
    """A compiler that takes its time."""
    busy(9.0)
    return graph.forward


def busy(seconds: float) -> None:
    """Compute."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        torch.ones(64, 64) @ torch.ones(64, 64)


def pauses(step: int) -> None:
    """Long and harmless."""
    if not args.pauses or run.is_standby or step < args.every or step % args.every:
        return
    match step // args.every % 5:
        case 0:  # an evaluation on all ranks, of which nobody was told; some take longer than others
            busy(args.pauses * (1 + 0.1 * rank))
            dist.all_reduce(torch.ones(1))
        case 1:  # on one rank, announced
            if rank == 0:
                with run.section("evaluation"):
                    busy(args.pauses)
        case 2:  # all wait for a storage
            time.sleep(args.pauses)
        case 3:  # data comes late on one rank
            if rank == 2:
                time.sleep(args.pauses)
        case 4:  # a checkpoint by hand
            with run.section("checkpoint"):
                time.sleep(args.pauses)


def body(step: int) -> None:
    """One step."""
    pauses(step)
    deed = struck(step)
    generator = torch.Generator().manual_seed(1000 * rank + step)
    x = torch.randn(6, 24, generator=generator)
    time.sleep(args.pause)
    if rank == slow and not run.is_standby:
        time.sleep(slow_s)
    loss = (net(x) ** 2).mean()
    loss.backward()
    everybody, mine = torch.ones(1), loss.detach().clone()
    if deed == "cross":
        dist.all_reduce(everybody)
        dist.all_reduce(mine, group=pair)
    else:
        if deed != "skip":
            dist.all_reduce(mine, group=pair)
        hang(deed)
        dist.all_reduce(everybody)
    opt.step()
    opt.zero_grad()
    run.log(loss=float(mine))


for step in run.steps(args.steps):
    body(int(step))

sha = hashlib.sha256()
for value in [*net.state_dict().values(), torch.get_rng_state()]:
    sha.update(value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
(args.out / f"digest-{rank}").write_text(sha.hexdigest())
dist.destroy_process_group()
