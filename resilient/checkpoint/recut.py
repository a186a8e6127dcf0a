"""Recut: a rank's snapshot in another world than the one whose snapshots lie in this node's memory.

Think of a tablecloth sewn anew for a longer table, from the panels of the old one that lie in the same chest.

Contract: as `DiskTier.reshape`, from memory: `sources` are all ranks' sealed snapshots of one step, of a world of so many ranks. Those that
this rank needs are read whole and their digests compared before a byte is used; they are looked at once more before the seal, for a
writer in the meantime voids what was read. What boxes there are and whose own state is given: reshape.py.
Memory: none but the slot itself. Rejected: a copy in the form of files in between (twice the bytes, to use one reader for both).
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping

from resilient.checkpoint import layout, reshape
from resilient.checkpoint.layout import Layout
from resilient.checkpoint.ring import Ring
from resilient.checkpoint.slot import Slot
from resilient.checkpoint.snapshot import slot_bytes
from resilient.errors import SnapshotMissing


def recut(
    sources: Mapping[int, Slot],
    wanted: Layout,
    room: Callable[[int], Ring],
    *,
    run: str,
    rank: int,
    world_size: int,
    step: int,
) -> int:
    """Seal the snapshot of `rank` at `step` in the ring that `room(bytes)` gives. Gives the old rank whose own state it has.

    Raises SnapshotMissing, SnapshotCorrupt, SnapshotMismatch; nothing is sealed then.
    """
    whose = reshape.own_rank(rank, len(sources))
    with contextlib.ExitStack() as held:
        generations = {}
        for old, slot in sources.items():
            held.enter_context(slot.held())
            generations[old] = slot.generation()
        heads = {old: slot.read(run=run, rank=old, step=step, verify=False) for old, slot in sources.items()}
        there = {old: layout.decode(head.layout) for old, head in heads.items()}
        rows = reshape.rows_for(wanted, there[whose])
        described, own = rows.encode(), heads[whose].own
        payload_bytes = sum(layout.padded(row.num_bytes) for row in rows.rows)
        ring = room(slot_bytes(len(described), len(own), payload_bytes))
        payload = ring.begin(run=run, rank=rank, world_size=world_size, round=0, layout=described, own=own, payload_bytes=payload_bytes)
        _fill(sources, there, rows, payload, step)
        if any(slot.generation() != generations[old] for old, slot in sources.items()):
            raise SnapshotMissing(f"snapshot step={step}: overwritten while it was being cut for rank {rank}")
        del payload
        ring.seal(step)
    return whose


def _fill(sources: Mapping[int, Slot], there: Mapping[int, Layout], rows: Layout, payload: memoryview, step: int) -> None:
    for begin, length in rows.places():
        payload[begin + length : begin + layout.padded(length)] = bytes(layout.padded(length) - length)
    places = {row.key: (row, begin) for row, (begin, _) in zip(rows.rows, rows.places(), strict=True)}
    lacking = {row.key: math.prod(row.local) for row in rows.rows if row.num_bytes}
    seen: set[tuple[str, tuple[int, ...]]] = set()
    for rank, described in sorted(there.items()):
        found: memoryview | None = None
        for old, (at, _) in zip(described.rows, described.places(), strict=True):
            row, begin = places.get(old.key, (old, 0))
            common = reshape.overlap(old, row)
            if old.key not in lacking or common is None or (old.key, old.offsets) in seen:
                continue
            if found is None:
                found = sources[rank].read(rank=rank, step=step).payload  # every byte of it is right, or this raises
            seen.add((old.key, old.offsets))
            reshape.copy_box(found[at : at + old.num_bytes], old, payload[begin : begin + row.num_bytes], row, common)
            lacking[old.key] -= math.prod(end - start for start, end in common)
    for key, count in lacking.items():
        if count:
            raise SnapshotMissing(f"snapshot step={step}: {count} elements of {key} are in no rank's memory")
