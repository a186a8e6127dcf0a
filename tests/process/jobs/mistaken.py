"""Wrong uses of the API, by name."""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
from torch import nn

import resilient

run = resilient.init()
net = nn.parallel.DistributedDataParallel(nn.Linear(4, 4))
match sys.argv[1]:
    case "untracked":
        next(run.steps(3))
    case "untrackable":
        run.track(model=net, loader=[torch.ones(1)])
    case "dtype":
        dist.all_reduce(torch.ones(3, dtype=torch.uint16))
    case "twice":
        resilient.init()
