"""Loopback: a collective that completes alone, as though every peer had sent what this rank sent.

Think of a rehearsal with one actor: every line of the others is answered by an echo of one's own, so that the scene runs through to its
end and nobody is left standing in the middle of a sentence. The values are plausible, finite and worthless; whoever uses loopback
throws them away afterwards (a broken step, a standby's warm-up).

Contract: pure functions on tensors, each fills the outputs in place and returns nothing. `size` is the group's size. Shapes are
those of the c10d operation of the same name. Nothing here blocks, and nothing reads uninitialised memory that the operation itself
would not have read.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.distributed import ReduceOp

if TYPE_CHECKING:
    from collections.abc import Sequence


def reduce_(tensor: Tensor, op: Any, size: int) -> None:
    """`tensor` becomes the reduction of `size` copies of itself: n x for SUM, itself for AVG, MIN, MAX, and, or."""
    kind = getattr(op, "op", op)
    if kind == ReduceOp.SUM:
        tensor.mul_(size)
    elif kind == ReduceOp.PRODUCT:
        tensor.pow_(size)
    elif kind == ReduceOp.BXOR and size % 2 == 0:
        tensor.zero_()
    # AVG, MIN, MAX, BAND, BOR, odd BXOR: equal inputs reduce to themselves. PREMUL_SUM carries a factor that c10d does not show: the
    # input is as good an echo as any.


def gather(outputs: Sequence[Tensor], own: Tensor) -> None:
    """Every slot of `outputs` gets `own`."""
    for output in outputs:
        output.copy_(own.reshape(output.shape) if output.numel() == own.numel() else own.new_zeros(output.shape))


def gather_flat(output: Tensor, own: Tensor, size: int) -> None:
    """`output` (size * own.numel() elements) gets `size` copies of `own`."""
    output.view(-1).view(size, -1).copy_(own.reshape(1, -1).expand(size, -1))


def scatter_reduced(output: Tensor, chunks: Sequence[Tensor], rank: int, op: Any) -> None:
    """`output` gets the reduction of `size` copies of this rank's own chunk."""
    output.copy_(chunks[rank].reshape(output.shape))
    reduce_(output, op, len(chunks))


def scatter_reduced_flat(output: Tensor, flat: Tensor, rank: int, size: int, op: Any) -> None:
    """As `scatter_reduced`, the chunks lying one behind the other in `flat` (size * output.numel() elements)."""
    output.view(-1).copy_(flat.reshape(size, -1)[rank])
    reduce_(output, op, size)


def exchange(outputs: Sequence[Tensor], inputs: Sequence[Tensor], rank: int) -> None:
    """All-to-all: every peer's chunk for this rank is this rank's chunk for itself, cut or padded with zeros to the size expected."""
    own = inputs[rank].reshape(-1)
    for output in outputs:
        count = min(output.numel(), own.numel())
        flat = output.new_zeros(output.numel())
        flat[:count].copy_(own[:count])
        output.copy_(flat.view(output.shape))


def exchange_flat(output: Tensor, flat: Tensor, out_splits: Sequence[int], in_splits: Sequence[int], rank: int, size: int) -> None:
    """All-to-all on one tensor, cut along dimension 0 by the splits (empty: equal parts)."""
    outs = output.split(list(out_splits)) if out_splits else output.chunk(size)
    ins = flat.split(list(in_splits)) if in_splits else flat.chunk(size)
    exchange(outs, ins, rank)
