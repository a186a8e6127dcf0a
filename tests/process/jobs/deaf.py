"""A training whose ranks do not end when they are told to: they ignore SIGTERM, or one of them hangs at step 20 in an endless loop."""

from __future__ import annotations

import argparse
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
parser.add_argument("--kind")
parser.add_argument("--how", choices=["hangs", "is stopped", "ignores it"], required=True)
parser.add_argument("--steps", type=int, required=True)
args = parser.parse_args()

signal.signal(signal.SIGTERM, signal.SIG_IGN)
run = resilient.init()
torch.manual_seed(0)
model = fully_shard(nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 8)), mesh=init_device_mesh("cpu", (run.world_size,)))
opt = torch.optim.Adam(model.parameters(), lr=0.01)
run.track(model=model, optimizer=opt)
for step in run.steps(args.steps):
    if args.how != "ignores it" and step == 20 and run.rank == 1:
        (args.out / "deaf").touch()
        while True:
            pass
    time.sleep(0.02)
    model(torch.randn(4, 32)).square().mean().backward()
    opt.step()
    opt.zero_grad()
