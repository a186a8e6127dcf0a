"""Capture: shared tensors into a snapshot's payload and back.

Think of packing a suitcase by a fixed list: every thing has its place, known before the journey, so packing is one copy and unpacking
another. The list itself (names, dtypes, shapes, offsets) travels in the snapshot's layout.

Contract: tensors lie in the order given, each at a multiple of 64 bytes. Both directions touch every byte once: a state of n bytes costs
n / (memory bandwidth). Host tensors are copied straight into shared memory; tensors of an accelerator likewise (copy_ waits for them).
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Final, Protocol

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

ALIGN: Final = 64  # a cache line; every dtype's alignment divides it


class Part(Protocol):
    """What is packed: a tensor on this rank."""

    @property
    def local(self) -> torch.Tensor: ...  # noqa: D102
    @property
    def num_bytes(self) -> int: ...  # noqa: D102


def payload_bytes(parts: Sequence[Part]) -> int:
    """Bytes that `save` needs."""
    return sum(_padded(part.num_bytes) for part in parts)


def save(parts: Sequence[Part], payload: memoryview) -> None:
    """Copy every tensor into `payload` ((payload_bytes,) uint8, writable)."""
    for target, part in _places(parts, payload):
        target.copy_(part.local)


def load(parts: Sequence[Part], payload: memoryview) -> None:
    """Copy `payload` into the tensors, in place."""
    with torch.no_grad():
        for source, part in _places(parts, payload):
            part.local.copy_(source)


def _places(parts: Sequence[Part], payload: memoryview) -> Iterator[tuple[torch.Tensor, Part]]:
    if not len(payload):
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # "not writable": a sealed snapshot is only read
        flat = torch.frombuffer(payload, dtype=torch.uint8)
    offset = 0
    for part in parts:
        raw = flat[offset : offset + part.num_bytes]
        if part.num_bytes:
            yield raw.view(part.local.dtype).view(part.local.shape), part
        offset += _padded(part.num_bytes)


def _padded(count: int) -> int:
    return (count + ALIGN - 1) // ALIGN * ALIGN
