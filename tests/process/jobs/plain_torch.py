"""A program that knows torch and nothing else: loads a checkpoint into its own model and optimizer, and tells what it got.

torchrun ... plain_torch.py --kinds ddp,fsdp,tp --checkpoint DIR --out DIR [--flat]
"""

from __future__ import annotations

import argparse
import os
import sys

import nets
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dist_checkpoint
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

parser = argparse.ArgumentParser()
parser.add_argument("--kinds", required=True)
parser.add_argument("--checkpoint", required=True)
parser.add_argument("--out", required=True)
parser.add_argument("--flat", action="store_true")
args = parser.parse_args()

dist.init_process_group("gloo")
for kind in args.kinds.split(","):
    model, optimizer = nets.built(kind, seed=99)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
    options = StateDictOptions(flatten_optimizer_state_dict=args.flat)
    weights, moments = get_state_dict(model, optimizer, options=options)
    wanted = {"model": weights, "optimizer": moments, "scheduler": scheduler.state_dict()}
    dist_checkpoint.load(wanted, checkpoint_id=args.checkpoint)
    set_state_dict(model, optimizer, model_state_dict=wanted["model"], optim_state_dict=wanted["optimizer"], options=options)
    scheduler.load_state_dict(wanted["scheduler"])

    weights, moments = get_state_dict(model, optimizer, options=StateDictOptions(full_state_dict=True))
    if dist.get_rank() == 0:
        rates = [group["lr"] for group in optimizer.param_groups]
        found = {"model": weights, "state": moments["state"], "rates": rates, "last_epoch": scheduler.last_epoch}
        torch.save(found, f"{args.out}/{kind}.pt")
assert "resilient" not in sys.modules
dist.barrier()
sys.stdout.flush()
os._exit(0)  # torch's own threads abort a process now and then that ends with several meshes
