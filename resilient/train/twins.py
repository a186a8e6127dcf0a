"""Twins: the ranks whose shared state is this rank's, to the last bit.

Think of copies of one key: whoever wants the door opened may ask any of their holders, and if one day a copy does not fit, something has
happened to it.

Contract: `of` is the same on all twins. Under DDP over the whole world that is every rank, if all that is tracked lies inside it (a frozen
teacher beside it may have been made differently on each rank). Where every parameter is a DTensor (FSDP2, tensor parallelism), it is the
ranks that hold the same boxes of all of them: the replicated dimensions of HSDP. Else this rank alone, which is always right.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch.distributed as dist
from torch.distributed.tensor import DTensor
from torch.optim.swa_utils import AveragedModel

from resilient.checkpoint.layout import Twins
from resilient.train import wrappers

if TYPE_CHECKING:
    from torch import Tensor

    from resilient.train.state import Tracked


def of(tracked: Tracked) -> Twins:
    """Twins of this rank; torch.distributed need not be there."""
    if not dist.is_initialized():
        return Twins(0)
    rank = dist.get_rank()
    if tracked.replicated:
        return Twins(0, dist.get_world_size()) if _all_inside(tracked) else Twins(rank)
    same: set[int] | None = None
    for param in _parameters(tracked):
        holders = _holders(param)
        same = holders if same is None else same & holders
        if not same:
            break
    return Twins.of(sorted(same), rank) if same else Twins(rank)


def _parameters(tracked: Tracked) -> list[Tensor]:
    modules = [param for module in tracked.modules.values() for param in module.parameters()]
    return [*modules, *tracked.parameters()]


def _all_inside(tracked: Tracked) -> bool:
    """Whether DDP keeps every tracked parameter; an averaged model is made of them alike everywhere, but for what it takes of buffers."""
    averaged = [module.module for module in tracked.modules.values() if isinstance(module, AveragedModel)]
    if any(True for module in averaged for _ in module.buffers()):  # each rank's own statistics
        return False
    covered = {id(p) for wrapped in wrappers.replicas(tracked) for p in wrapped.parameters()}
    plain = [module for module in tracked.modules.values() if not isinstance(module, AveragedModel)]
    return all(id(p) in covered for module in plain for p in module.parameters())


def _holders(param: Tensor) -> set[int]:
    """Ranks with the same box of this parameter; none if that is not known."""
    if not isinstance(param, DTensor):
        return set()
    mesh = param.device_mesh
    here = mesh.get_coordinate()
    if here is None or any(placement.is_partial() for placement in param.placements):
        return set()
    places = tuple(slice(None) if p.is_replicate() else at for p, at in zip(param.placements, here, strict=True))
    return set(mesh.mesh[places].flatten().tolist())
