"""What people run today: DDP under torchrun, a checkpoint every ten steps, and the newest one loaded after a restart.

    torchrun ... checkpointed.py FILE [flags of the examples]

Rank 0 prints `step N at T` (unix seconds) for every step that is done, and its pid beside it: after a restart old steps come again.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from gpt import Text, arguments, build
from torch.nn.parallel import DistributedDataParallel

EVERY = 10

file = Path(sys.argv.pop(1))
args = arguments("DDP with checkpoints.")
dist.init_process_group("gloo")
rank = dist.get_rank()
text, model = Text(args.data), build(args)
net = DistributedDataParallel(model)
optimizer = torch.optim.AdamW(net.parameters(), lr=args.lr)
first = 0
if file.exists():
    kept = torch.load(file, weights_only=True)
    model.load_state_dict(kept["model"])
    optimizer.load_state_dict(kept["optimizer"])
    first = kept["step"]
for step in range(first, args.steps):
    loss = net(*text.batch(args.seed, step, rank, size=args.batch, context=args.context))
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if rank == 0:
        if (step + 1) % EVERY == 0:
            torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}, file.with_suffix(".new"))
            file.with_suffix(".new").replace(file)
        print(f"step {step + 1} at {time.time():.6f} pid {os.getpid()}", flush=True)
