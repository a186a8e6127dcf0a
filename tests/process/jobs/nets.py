"""The model of the exchange tests, built alike by a run (exchanged.py) and by a program that knows nothing of it (plain_torch.py).

It has what names are tricky about: tied weights, buffers, two groups of parameters, layers that tensor parallelism cuts both ways.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

WORDS = 21


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(WORDS, 12)
        self.hidden = nn.Linear(12, 34)
        self.back = nn.Linear(34, 12)
        self.norm = nn.BatchNorm1d(12)
        self.head = nn.Linear(12, WORDS, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, words):
        return self.head(self.norm(self.back(self.hidden(self.embed(words)).tanh())))


def built(kind, seed):
    """(model as it is trained, optimizer), for ddp, fsdp, tp, or none of them."""
    torch.manual_seed(seed)
    model = Net()
    world = dist.get_world_size() if dist.is_initialized() else 1
    if kind == "ddp":
        model = DistributedDataParallel(model)
    elif kind == "tp":
        mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("tp",))
        parallelize_module(model, mesh, {"hidden": ColwiseParallel(), "back": RowwiseParallel()})
    elif kind == "fsdp":
        mesh = init_device_mesh("cpu", (world,))
        fully_shard(model.hidden, mesh=mesh)
        fully_shard(model, mesh=mesh)
    decayed = [p for p in model.parameters() if p.dim() > 1]
    rest = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0, "lr": 0.003}]
    return model, torch.optim.AdamW(groups, lr=0.02, foreach=False)


def batch(step):
    """The same for all ranks of any kind."""
    draw = torch.Generator().manual_seed(100 + step)
    return torch.randint(0, WORDS, (12,), generator=draw)


def loss_of(model, step):
    words = batch(step)
    return nn.functional.cross_entropy(model(words), (words * 2 + 1) % WORDS)
