"""A training whose ranks do not listen: they ignore SIGTERM, or rank 1 hangs at step 20, or never sees that a checkpoint is asked for."""

from __future__ import annotations

import argparse
import os
import pathlib
import signal
import time

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import resilient

parser = argparse.ArgumentParser()
parser.add_argument("--out", type=pathlib.Path, required=True)
parser.add_argument("--kind", default="fsdp")
parser.add_argument("--how", choices=["hangs", "is stopped", "ignores it", "is not told", "dies"], required=True)
parser.add_argument("--steps", type=int, required=True)
args = parser.parse_args()

signal.signal(signal.SIGTERM, signal.SIG_IGN)
run = resilient.init()
torch.manual_seed(0)
model: nn.Module = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 8))
if args.kind == "fsdp":
    model = fully_shard(model, mesh=init_device_mesh("cpu", (run.world_size,)))
else:
    model = nn.parallel.DistributedDataParallel(model)
opt = torch.optim.Adam(model.parameters(), lr=0.01)
run.track(model=model, optimizer=opt)
for step in run.steps(args.steps):
    if args.how in ("hangs", "is stopped") and step == 20 and run.rank == 1:
        (args.out / "deaf").touch()
        while True:
            pass
    time.sleep(0.02)
    model(torch.randn(4, 32)).square().mean().backward()
    if args.how == "is not told" and run.rank == 1:
        run.loop.page.want(-1)
    opt.step()
    if args.how == "dies" and run.rank == 1 and run.loop.page.wanted() == step + 1 and not (args.out / "died").exists():
        (args.out / "died").write_text(str(step + 1))  # the vote for this step has passed, nothing of it is sealed
        os.kill(os.getpid(), signal.SIGKILL)
    opt.zero_grad()
