"""A run whose checkpoints are handed to others, or that starts from what others wrote.

    exchanged.py --out DIR [--kind ddp|fsdp|tp] [--steps N] [--seed N] [--form for|decorated] [--strike]

Each rank writes DIR/state-<rank>.pt: its boxes of every tensor at the end, and DIR/begin-<rank>.pt: those with which it began.
Rank 0 writes DIR/losses.jsonl. --strike: the last rank kills itself in its first step, once.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import signal

import nets
import torch
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

import resilient

parser = argparse.ArgumentParser()
parser.add_argument("--out", type=pathlib.Path, required=True)
parser.add_argument("--kind", default="ddp")
parser.add_argument("--steps", type=int, default=4)
parser.add_argument("--seed", type=int, default=3)
parser.add_argument("--form", default="for")
parser.add_argument("--strike", action="store_true")
args = parser.parse_args()
args.out.mkdir(parents=True, exist_ok=True)


def box(tensor):
    """(global shape, offsets, this rank's part)."""
    tensor = tensor.detach()
    if not isinstance(tensor, DTensor):
        return tuple(tensor.shape), (0,) * tensor.dim(), tensor.clone()
    _, offsets = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tuple(tensor.shape), tuple(offsets), tensor.to_local().clone()


def write(name, model, optimizer):
    plain = model.module if args.kind == "ddp" else model
    found = {key: box(tensor) for key, tensor in plain.state_dict().items()}
    for key, param in plain.named_parameters():
        found |= {f"optim.{key}.{what}": box(value) for what, value in optimizer.state.get(param, {}).items()}
    torch.save(found, args.out / f"{name}-{run.rank}.pt")


run = resilient.init()
model, optimizer = nets.built(args.kind, args.seed)
scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
run.track(model=model, optimizer=optimizer, scheduler=scheduler)


def body(step):
    if run.sound and not (args.out / f"begin-{run.rank}.pt").exists():
        write("begin", model, optimizer)
        (args.out / f"begin-{run.rank}.json").write_text(json.dumps([int(step), scheduler.last_epoch, scheduler.get_last_lr()]))
    optimizer.zero_grad()
    loss = nets.loss_of(model, step)
    loss.backward()
    if args.strike and run.sound and run.rank == run.world_size - 1 and not (args.out / "struck").exists():
        (args.out / "struck").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    optimizer.step()
    scheduler.step()
    if run.rank == 0 and run.sound:
        with (args.out / "losses.jsonl").open("a") as file:
            file.write(json.dumps({"step": int(step), "loss": loss.item()}) + "\n")


if args.form == "for":
    for number in run.steps(args.steps):
        body(number)
else:
    body = resilient.step(body)
    for number in range(args.steps):
        body(number)
write("state", model, optimizer)
