"""One rank trains a stack of linear layers with Adam and saves its state now and then, by one of several engines.

    stalled.py ENGINE FOLDER [--steps N] [--every K] [--width W] [--layers L] [--batch B]

ENGINE: `resilient` (under resilient-run, whose flags say where and how often), `torch.save`, `dcp-thread` or `dcp-process`.
FOLDER gets `times.json`: for each step when its body began and ended; for each save when it was durable (not for `resilient`: the
run's own events tell). What lies between the end of one body and the beginning of the next is the time that training was blocked.
"""

from __future__ import annotations

import argparse
import json
import os
import threading
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

FLAGS = {"steps": 40, "every": 10, "width": 2048, "layers": 22, "batch": 16}


class Training:
    """The model, its optimizer, and a clock."""

    def __init__(self, args):
        """22 layers of 2048 x 2048 are 92 million parameters: 1.1 GB with Adam's two moments."""
        torch.manual_seed(1)
        self.model = nn.Sequential(*[nn.Linear(args.width, args.width) for _ in range(args.layers)])
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-4, fused=True)
        self.batch = torch.randn(args.batch, args.width)
        self.bodies = []

    def step(self):
        """One body."""
        begin = time.time()
        self.model(self.batch).square().mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=False)
        self.bodies.append((begin, time.time()))

    def state(self):
        """What the peers save."""
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}


def under_resilient(training, args):
    """Returns what else was measured."""
    import resilient

    run = resilient.init()
    run.track(model=training.model, optimizer=training.optimizer)
    snapshots = []
    for _ in run.steps(args.steps):
        snapshots.append(run.loop.tier0.cost_s)  # of the boundary before
        training.step()
    training.bodies.append((time.time(),) * 2)
    return {"snapshots": snapshots[1:], "restores": restores(run.loop, args.steps)}


def restores(loop, step):
    """Seconds to verify and load a snapshot from memory, a few times."""
    found = []
    for _ in range(3):
        with loop.tier0.reading(step, "") as slot:
            if not slot.is_stamped():
                slot.stamp_payload()  # the agent would have
            begin = time.perf_counter()
            snapshot = slot.read(step=step, threads=loop.tier0.threads)
            loop.tier0.unpack(snapshot, slot.where)
            found.append(time.perf_counter() - begin)
            assert snapshot.stamped
            del snapshot
    return found


def under_a_peer(training, args, engine):
    """Returns when each save was durable."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    durable, under_way = {}, None
    for step in range(args.steps):
        training.step()
        if (step + 1) % args.every == 0:
            if under_way is not None:
                under_way()  # as their users do: one save at a time
            under_way = (
                torch_save(training, args, step, durable) if engine == "torch.save" else dcp_save(training, args, step, durable, engine)
            )
    training.bodies.append((time.time(),) * 2)
    under_way()
    dist.destroy_process_group()
    return {"durable": durable}


def torch_save(training, args, step, durable):
    """The file is in the page cache when torch.save returns; a thread of ours asks for the disk."""
    path = args.folder / f"step-{step + 1}.pt"
    torch.save(training.state(), path)

    def flush():
        with path.open("rb") as file:
            os.fsync(file.fileno())
        durable[step] = time.time()

    thread = threading.Thread(target=flush)
    thread.start()
    return thread.join


def dcp_save(training, args, step, durable, engine):
    """It calls fsync itself."""
    kind = AsyncCheckpointerType.THREAD if engine == "dcp-thread" else AsyncCheckpointerType.PROCESS
    future = dcp.async_save(training.state(), checkpoint_id=args.folder / f"step-{step + 1}", async_checkpointer_type=kind)
    future.add_done_callback(lambda _: durable.setdefault(step, time.time()))
    return future.result


def main():
    """See the module's text."""
    parser = argparse.ArgumentParser()
    parser.add_argument("engine")
    parser.add_argument("folder", type=Path)
    for flag, default in FLAGS.items():
        parser.add_argument(f"--{flag}", type=int, default=default)
    args = parser.parse_args()
    training = Training(args)
    found = under_resilient(training, args) if args.engine == "resilient" else under_a_peer(training, args, args.engine)
    state = 3 * sum(p.numel() * p.element_size() for p in training.model.parameters())
    (args.folder / "times.json").write_text(json.dumps({"bodies": training.bodies, "state_bytes": state, **found}))


if __name__ == "__main__":
    main()
