"""A training whose losses do not depend on how many ranks share a batch: to be gone on with in a world of another size.

    resized.py --out DIR [--kind ddp|fsdp|tp|hsdp] [--steps N] [--flip RANK:STEP] [--canary] [--hold N] [--pace SECONDS]

Each step has the same 12 samples, made from its number; a rank takes its part. Rank 0 writes losses.jsonl. `--flip`: before that step one
bit of that rank's optimizer state changes, as a device that computes wrongly would leave it. `--hold`: in that step all ranks wait for the file
DIR/go. `--pace`: how long a step takes at least; no losses are written then, and no
collective follows the optimizer's step.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import time

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import resilient

BATCH = 12

parser = argparse.ArgumentParser()
parser.add_argument("--out", type=pathlib.Path, required=True)
parser.add_argument("--kind", default="ddp")
parser.add_argument("--steps", type=int, default=6)
parser.add_argument("--flip", default="")
parser.add_argument("--canary", action="store_true")
parser.add_argument("--hold", type=int, default=-1)
parser.add_argument("--pace", type=float, default=0.0)
args = parser.parse_args()

run = resilient.init()
torch.manual_seed(3)
model: nn.Module = nn.Sequential(nn.Linear(10, 34), nn.Tanh(), nn.Linear(34, 6), nn.Tanh(), nn.Linear(6, 1))
world = run.world_size
if args.kind == "ddp":
    model = DistributedDataParallel(model)
elif args.kind == "tp":
    mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("tp",))
    parallelize_module(model, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
else:
    mesh = (
        init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("dp", "shard"))
        if args.kind == "hsdp"
        else init_device_mesh("cpu", (world,))
    )
    for layer in (model[0], model[2], model[4]):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
optimizer = torch.optim.AdamW(model.parameters(), lr=0.02, foreach=False)
scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 4, 0.7)
run.track(model=model, optimizer=optimizer, scheduler=scheduler)
losses = args.out / "losses.jsonl"
kept = torch.linspace(-1, 1, 40).view(4, 10)
if args.canary:
    run.canary(lambda: model(kept).square().mean())

for step in run.steps(args.steps):
    if step == args.hold:
        with run.section("hold"):
            (args.out / f"held-{run.rank}").touch()
            while not (args.out / "go").exists():
                time.sleep(0.01)
    if args.flip == f"{run.rank}:{step}" and run.sound:
        moment = optimizer.state[next(model.parameters())]["exp_avg"]
        getattr(moment, "_local_tensor", moment).view(torch.uint8)[0, 2] ^= 64
    draw = torch.Generator().manual_seed(100 + step)
    inputs = torch.randn(BATCH, 10, generator=draw)
    targets = inputs.sin().sum(1, keepdim=True)
    if args.kind != "tp":
        part = BATCH // world
        inputs, targets = (t[run.rank * part : (run.rank + 1) * part] for t in (inputs, targets))
    time.sleep(args.pace)
    optimizer.zero_grad()
    loss = (model(inputs) - targets).square().mean()
    loss.backward()
    optimizer.step()
    scheduler.step()
    if args.pace:
        continue
    whole = loss.detach().clone()
    dist.all_reduce(whole)
    if run.rank == 0 and run.sound:
        with losses.open("a") as file:
            file.write(json.dumps({"step": int(step), "loss": whole.item() / world, "lr": scheduler.get_last_lr()[0]}) + "\n")
