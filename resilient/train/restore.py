"""Restore: shared state from a live replica (from a snapshot: tier0.py).

Think of a player who comes in late: the printed part is copied from the neighbour's desk, what was pencilled in is in the predecessor's
own folder, and never in the neighbour's.

Contract: `give` and `take` pair by the plan alone (receiver i gets from source i mod n), over the control group; before any tensor the
giver sends its step and layout, so that nothing is received into memory that does not fit. They raise RoundAborted when the
round breaks meanwhile: the receiver is then torn until a later plan. Bytes: the state once per receiver over the link; tensors below 1 MiB
travel packed together; all messages are under way at once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import torch

from resilient.checkpoint import capture
from resilient.core.messages import Plan, Refused
from resilient.errors import SnapshotMismatch
from resilient.train.group import Several
from resilient.train.inner import Apart

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from resilient.errors import CheckpointError
    from resilient.train.comm import Comm
    from resilient.train.item import Item
    from resilient.train.state import Tracked

PACK_BYTES: Final = 1 << 20
_TAG: Final = 7


def give(comm: Comm, tracked: Tracked, plan: Plan, step: int) -> None:
    """Send shared state, that of `step`, to the receivers that fall to this rank, if any."""
    if comm.rank not in plan.sources or comm.rank in plan.receivers:
        return
    mine = [to for i, to in enumerate(plan.receivers) if plan.sources[i % len(plan.sources)] == comm.rank]
    if not mine:
        return
    layout, _ = tracked.layout()
    for to in mine:
        head = torch.tensor([step, len(layout)], dtype=torch.int64)
        _send(comm, [head], to)
        _send(comm, [torch.frombuffer(bytearray(layout), dtype=torch.uint8)], to)
        _send(comm, [_packed(items) for items in _batches(tracked.shared())], to)


def take(comm: Comm, tracked: Tracked, plan: Plan) -> None:
    """Receive shared state of `plan.step`. Raises SnapshotMismatch if the source's layout is not ours."""
    source = plan.sources[plan.receivers.index(comm.rank) % len(plan.sources)]
    head = torch.zeros(2, dtype=torch.int64)
    _recv(comm, [head], source)
    step, length = head.tolist()
    if step != plan.step:
        msg = f"live state of rank {source}: step {plan.step} expected, {step} found"
        raise SnapshotMismatch(msg)
    layout = torch.zeros(length, dtype=torch.uint8)
    _recv(comm, [layout], source)
    tracked.shape_like(layout.numpy().tobytes(), f"live state of rank {source}")
    batches = list(_batches(tracked.shared()))
    flats = [capture.as_bytes(b[0].local) if _whole(b) else torch.empty(sum(i.num_bytes for i in b), dtype=torch.uint8) for b in batches]
    _recv(comm, flats, source)
    for flat, items in zip(flats, batches, strict=True):
        _unpack(flat, items)


def refusal(plan: Plan, rank: int, error: CheckpointError) -> Refused:
    """What to tell the agent of a copy that cannot be used."""
    return Refused(tier=plan.tier, step=plan.step, rank=rank, reason=str(error))


def _batches(items: list[Item]) -> Iterator[list[Item]]:
    """Large tensors alone, small ones together."""
    pack: list[Item] = []
    size = 0
    for item in items:
        if item.num_bytes >= PACK_BYTES:
            yield [item]
            continue
        if size + item.num_bytes > PACK_BYTES:
            yield pack
            pack, size = [], 0
        pack.append(item)
        size += item.num_bytes
    if pack:
        yield pack


def _whole(items: list[Item]) -> bool:
    return len(items) == 1 and capture.plain(items[0].local)


def _packed(items: list[Item]) -> torch.Tensor:
    """One host tensor of bytes; of a single contiguous host tensor, the tensor itself."""
    if _whole(items):
        return capture.as_bytes(items[0].local)
    return torch.cat([capture.as_bytes(item.local).cpu() for item in items])


def _unpack(flat: torch.Tensor, items: list[Item]) -> None:
    if _whole(items):
        return
    offset = 0
    with torch.no_grad():
        for item in items:
            raw = flat[offset : offset + item.num_bytes].clone()  # a fresh start: views of other dtypes want alignment
            capture.fill(item.local, raw.view(item.local.dtype).view(item.local.shape))
            offset += item.num_bytes


def _send(comm: Comm, tensors: list[torch.Tensor], to: int) -> None:
    """All at once: one by one, every message would wait for both processes to be scheduled, on a busy machine a hundred times."""
    tagged = [(tag, tensor) for tag, tensor in enumerate(tensors, _TAG) if tensor.numel()]
    comm.direct("state for a newcomer", lambda inner: _all(inner.send([tensor], to, tag) for tag, tensor in tagged))


def _recv(comm: Comm, tensors: list[torch.Tensor], source: int) -> None:
    tagged = [(tag, tensor) for tag, tensor in enumerate(tensors, _TAG) if tensor.numel()]
    comm.direct("state from a replica", lambda inner: _all(inner.recv([tensor], source, tag) for tag, tensor in tagged))


def _all(works: Iterable[Any]) -> Apart:
    return Apart(Several(list(works)))
