"""A stack of linear layers with Adam, and a clock: what every engine is measured with.

`bodies` has for each step when its body began and ended, and for how long it waited for a copy to be finished before it could change the
weights; what lies between the end of one body and the beginning of the next is the time that training was blocked. Of several ranks each
has a stack of its own, as stages of a pipeline have, and they meet once in a step.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

FLAGS = {"steps": 35, "every": 10, "width": 2048, "layers": 22, "batch": 64, "flips": 0}
RANK, WORLD = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def arguments():
    """ENGINE FOLDER [flags]."""
    parser = argparse.ArgumentParser()
    parser.add_argument("engine")
    parser.add_argument("folder", type=Path)
    for flag, default in FLAGS.items():
        parser.add_argument(f"--{flag}", type=int, default=default)
    return parser.parse_args()


class Training:
    """The model, its optimizer, and a clock."""

    def __init__(self, args):
        """22 layers of 2048 x 2048 are 92 million parameters: 1.1 GB with Adam's two moments."""
        torch.manual_seed(1 + RANK)
        self.model = nn.Sequential(*[nn.Linear(args.width, args.width) for _ in range(args.layers)])
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1e-4, fused=True)
        self.batch = torch.randn(args.batch, args.width)
        self.bodies = []

    def step(self, ready=lambda: None):
        """One body. `ready` returns when what is saved may be changed."""
        begin = time.time()
        loss = self.model(self.batch).square().mean()
        loss.backward()
        waits = time.time()
        ready()
        waited = time.time() - waits
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=False)
        if WORLD > 1:
            dist.all_reduce(loss.detach())
        self.bodies.append((begin, time.time(), waited))

    def over(self):
        """What lies behind the last body is measured too."""
        self.bodies.append((time.time(), time.time(), 0.0))

    def state(self):
        """What is saved, in containers of its own (some engines put other things into them); the tensors are those that train."""
        return mapped({"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}, lambda tensor: tensor)

    def found(self, **more):
        """What `times.json` says."""
        state = 3 * sum(p.numel() * p.element_size() for p in self.model.parameters())
        return {"bodies": self.bodies, "state_bytes": state, **more}


def mapped(value, change):
    """Nested containers anew, with `change(tensor)` for each tensor."""
    if isinstance(value, dict):
        return {key: mapped(inner, change) for key, inner in value.items()}
    if isinstance(value, list):
        return [mapped(inner, change) for inner in value]
    return change(value) if isinstance(value, torch.Tensor) else value
