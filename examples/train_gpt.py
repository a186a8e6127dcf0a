"""Train a small GPT with DDP: the main example, and what the README's first command runs.

    resilient-run --standalone --nproc-per-node 2 --standbys 1 examples/train_gpt.py

Kill any rank while it runs (`kill -9`): the others keep their processes, the step is done again, and the final weights are those of a run
without the fault. Under plain `python` and plain `torchrun` the same file runs as it is, without recovery.

Three things here are worth copying. The batch is a function of the step and the rank, so a step can be done again. What one rank alone
has (its dropout stream, its running mean) is tracked, the random numbers without a word. What people see goes through `run.on_commit`.
"""

from __future__ import annotations

from functools import partial

import torch
from gpt import Mean, Text, arguments, build, warm_up, write_digest
from torch.nn.parallel import DistributedDataParallel

import resilient


def main() -> None:
    """The whole training."""
    args = arguments("Train a byte-level GPT with DDP.")
    run = resilient.init()
    text = Text(args.data)
    model = build(args).to(run.device)
    torch.manual_seed(args.seed + 1 + run.rank)  # dropout: every rank its own
    net = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(net.parameters(), lr=args.lr)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, warm_up)
    mean = Mean()
    run.track(model=net, optimizer=optimizer, scheduler=scheduler, mean=mean)

    def show(step: int, loss: float) -> None:
        if run.rank != 0:
            return
        model.eval()
        with run.section("eval"), torch.no_grad():  # a long one here would be no hang
            batches = [text.test(i, size=args.batch, context=args.context) for i in range(4)]
            held_out = torch.stack([model(x.to(run.device), y.to(run.device)) for x, y in batches]).mean()
        model.train()
        print(f"step {step + 1:5d}   loss {loss:.3f}   held out {held_out:.3f}   round {run.round}", flush=True)

    for step in run.steps(args.steps):
        inputs, targets = text.batch(args.seed, step, run.rank, size=args.batch, context=args.context)
        loss = net(inputs.to(run.device), targets.to(run.device))
        loss.backward()
        mean.add(loss.item())  # before the optimizer: what is computed in a step is kept up to there (docs/api.md)
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        run.log(loss=loss)
        if (step + 1) % args.show_every == 0:
            run.on_commit(partial(show, step, mean.take()))

    if args.digest and run.rank == 0:
        write_digest(args.digest, model, optimizer)


if __name__ == "__main__":
    main()
