"""Train the same GPT with FSDP2: every rank holds a part of each weight, so no neighbour has a lost rank's part.

    resilient-run --standalone --nproc-per-node 2 --standbys 1 examples/train_fsdp.py

At every step each rank seals its part in memory that belongs to its agent; whoever takes an emptied chair finds it there.
"""

from __future__ import annotations

from functools import partial

import torch
from gpt import Mean, Text, arguments, build, warm_up, write_digest
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import resilient


def main() -> None:
    """The whole training."""
    args = arguments("Train a byte-level GPT with FSDP2.")
    run = resilient.init()
    text = Text(args.data)
    model = build(args).to(run.device)
    torch.manual_seed(args.seed + 1 + run.rank)  # dropout: every rank its own
    mesh = init_device_mesh(run.device.type, (run.world_size,))
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, warm_up)
    mean = Mean()
    run.track(model=model, optimizer=optimizer, scheduler=scheduler, mean=mean)

    def show(step: int, loss: float) -> None:
        if run.rank == 0:
            print(f"step {step + 1:5d}   loss {loss:.3f}   round {run.round}", flush=True)

    for step in run.steps(args.steps):
        inputs, targets = text.batch(args.seed, step, run.rank, size=args.batch, context=args.context)
        loss = model(inputs.to(run.device), targets.to(run.device))
        loss.backward()
        mean.add(loss.item())  # before the optimizer: what is computed in a step is kept up to there (docs/api.md)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        run.log(loss=loss)
        if (step + 1) % args.show_every == 0:
            run.on_commit(partial(show, step, mean.take()))

    if args.digest:  # no rank holds all of it: one file each
        write_digest(f"{args.digest}.{run.rank}", model, optimizer)


if __name__ == "__main__":
    main()
