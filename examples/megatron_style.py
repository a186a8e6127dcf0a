"""A loop that owns its counter and calls a `train_step`, as Megatron's does: a decorator is all that it needs.

    resilient-run --standalone --nproc-per-node 2 --standbys 1 examples/megatron_style.py --small

`@resilient.step` returns when the step is committed on every rank; until then it calls the function again with the same arguments, and
`run.replayable` gives it the same batch again. A process that takes over in the middle runs through the calls already done without doing
them, so that its own counter comes right: so what is printed belongs into `run.on_commit`, not behind the call.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
from gpt import Text, arguments, build, warm_up, write_digest
from torch.nn.parallel import DistributedDataParallel

import resilient

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator

    from torch import Tensor


def batches_of(text: Text, args: argparse.Namespace, rank: int) -> Iterator[tuple[Tensor, Tensor]]:
    """An endless stream, the same whenever it is begun."""
    number = 0
    while True:
        yield text.batch(args.seed, number, rank, size=args.batch, context=args.context)
        number += 1


def main() -> None:
    """The whole training."""
    args = arguments("Train a byte-level GPT in a loop that owns its counter.")
    run = resilient.init()
    model = build(args).to(run.device)
    torch.manual_seed(args.seed + 1 + run.rank)  # dropout: every rank its own
    net = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(net.parameters(), lr=args.lr)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, warm_up)
    run.track(model=net, optimizer=optimizer, scheduler=scheduler)
    batches = run.replayable(batches_of(Text(args.data), args, run.rank))

    def show(iteration: int, loss: Tensor) -> None:
        if run.rank == 0 and (iteration + 1) % args.show_every == 0:
            print(f"iteration {iteration + 1:5d}   loss {loss.item():.3f}", flush=True)

    @resilient.step
    def train_step(iteration: int, batches: Iterator[tuple[Tensor, Tensor]]) -> Tensor:
        total = torch.zeros((), device=run.device)
        for last in (False, True):  # two micro-batches, one all-reduce
            inputs, targets = next(batches)
            net.require_backward_grad_sync = last
            loss = net(inputs.to(run.device), targets.to(run.device)) / 2
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        run.log(loss=total)
        run.on_commit(partial(show, iteration, total))
        return total

    iteration = 0
    while iteration < args.steps:
        train_step(iteration, batches)
        iteration += 1

    if args.digest and run.rank == 0:
        write_digest(args.digest, model, optimizer)


if __name__ == "__main__":
    main()
