"""Item: one shared tensor, and what the program has there.

Think of a label in a museum: it names the picture and the place where it hangs. Whoever is to copy the picture looks first whether it
still hangs there: another one may have been put into its frame.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.nn.parameter import is_lazy

from resilient.checkpoint.layout import ITEMSIZES, Row
from resilient.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor
    from torch.optim import Optimizer

Owner = tuple["Optimizer", "Tensor", str]  # of a value in an optimizer's state: whose, of which parameter, its key there


@dataclass(frozen=True)
class Item:
    """`local` is this rank's part of `source`, by reference."""

    key: str
    local: Tensor
    shape: tuple[int, ...]  # global
    offsets: tuple[int, ...]  # of the local part
    source: Tensor  # the parameter, buffer or value, as the program holds it
    owner: Owner | None = None
    steady: bool = False  # an optimizer's, or an averaged model's parameter: changed by nothing but calls that have a gate

    @property
    def num_bytes(self) -> int:
        """Of the local part."""
        return self.local.numel() * self.local.element_size()

    @property
    def version(self) -> int:
        """Grows when something writes to the tensor: a write to a DTensor counts there, and not at its local part."""
        return self.source._version + self.local._version  # noqa: SLF001  torch has no public name for it

    @property
    def outdated(self) -> bool:
        """Whether the program has another tensor here meanwhile, or this one lies elsewhere (`param.data = ...`). Below 1 us."""
        if self.owner is not None:
            optimizer, param, key = self.owner
            if optimizer.state.get(param, {}).get(key) is not self.source:
                return True
        return local_part(self.source).data_ptr() != self.local.data_ptr()

    def row(self) -> Row:
        """Plain data that says what this is."""
        return Row(self.key, str(self.local.dtype).removeprefix("torch."), self.shape, self.offsets, tuple(self.local.shape))


def item_of(key: str, tensor: Tensor, owner: Owner | None = None, *, steady: bool = False) -> Item:
    """The label of `tensor`. Raises UsageError if its memory is nothing that could be copied."""
    local = local_part(tensor)
    if why := oddity(local):
        raise UsageError(f"{key}: a tensor with memory of its own expected, {why} found")
    if (dtype := str(local.dtype).removeprefix("torch.")) not in ITEMSIZES:
        raise UsageError(f"{key}: a tensor of one of {', '.join(ITEMSIZES)} expected, {dtype} found")
    if isinstance(tensor, DTensor):
        _, offsets = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    else:
        local, offsets = tensor.detach() if tensor.requires_grad else tensor, (0,) * tensor.dim()
    return Item(key, local, tuple(tensor.shape), tuple(offsets), tensor, owner, steady)


def local_part(tensor: Tensor) -> Tensor:
    """Of a DTensor its local tensor; to_local() inside no_grad would give an alias whose version counter is its own."""
    return tensor._local_tensor if isinstance(tensor, DTensor) else tensor  # noqa: SLF001


def oddity(tensor: Tensor) -> str:
    """What keeps this tensor from being copied as plain values, for people; "" if nothing does."""
    if is_lazy(tensor):
        return "one that a lazy module has not made yet"
    if tensor.is_nested or tensor.layout != torch.strided:
        return f"one of layout {'nested' if tensor.is_nested else tensor.layout}"
    if tensor.is_meta:
        return "one on the meta device"
    return "a quantized one" if tensor.is_quantized else ""
