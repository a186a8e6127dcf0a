"""Reshape: a rank's snapshot in another world than the one that wrote the checkpoint, from whatever boxes lie there.

Think of a wall papered anew in wider strips: the pattern is the same, so every new strip is cut from the old ones that lie beneath it.

Contract: `rows_for` says what the snapshot has to hold: parameters in the boxes that the rank asks for, optimizer state in the boxes of its
parameters, everything else whole. `assemble` fills a payload with them; every old tensor is read at most once, and checked before a byte
of it is used. A box that is nowhere is an error with its name. Own state (random numbers, data position) is that of the old rank
`rank % old world size`; a rank that another one shares it with has to draw other numbers from then on (train/rng.py).
Memory: the largest old tensor. Rejected: letting the workers read (each would have to know storage, and nobody would bound the memory).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import msgspec

from resilient.checkpoint import rankfile
from resilient.checkpoint.layout import ITEMSIZES, Layout, Row, padded
from resilient.errors import SnapshotMismatch, SnapshotMissing

if TYPE_CHECKING:
    from resilient.checkpoint.committed import Checkpoint

Box = tuple[tuple[int, int], ...]  # begin and end in each dimension


def own_rank(rank: int, old_world_size: int) -> int:
    """Whose own state it is given."""
    return rank % old_world_size


def rows_for(wanted: Layout, there: Layout) -> Layout:
    """`wanted` (what the rank tracks now) with all rows that the checkpoint has of it, in their order.

    Raises SnapshotMismatch for a tensor that only one of the two has, or that has another shape or dtype.
    """
    asked = {row.key: row for row in wanted.rows}
    rows, left = [], dict(asked)
    for old in there.rows:
        row = left.pop(old.key, None) or _state_row(old, asked, there)
        if (row.dtype, row.shape) != (old.dtype, old.shape):
            found = f"{old.dtype} {list(old.shape)} found"
            raise SnapshotMismatch(f"{old.key}: {row.dtype} {list(row.shape)} expected, {found}")
        rows.append(row)
    if missing := [key for key in left if param_of(key, wanted) is None]:
        raise SnapshotMismatch(f"{missing[0]}: it is not in the checkpoint")
    return msgspec.structs.replace(wanted, rows=tuple(rows))


def _state_row(old: Row, asked: dict[str, Row], there: Layout) -> Row:
    """Optimizer state: in its parameter's box, if it has the parameter's shape."""
    param = param_of(old.key, there)
    if param is None or param not in asked:
        raise SnapshotMismatch(f"{old.key}: it is in the checkpoint, and not tracked here")
    if old.shape != asked[param].shape or not old.shape:
        return Row(old.key, old.dtype, old.shape, (0,) * len(old.shape), old.shape)
    return Row(old.key, old.dtype, old.shape, asked[param].offsets, asked[param].local)


def param_of(key: str, layout: Layout) -> str | None:
    """Of which parameter this is optimizer state; None: of none."""
    name, _, rest = key.partition(".")
    return rest.removeprefix("state.").rpartition(".")[0] if name in layout.groups and rest.startswith("state.") else None


def assemble(whole: Checkpoint, rows: Layout, payload: memoryview, called: Mapping[str, str] | None = None) -> None:
    """Fill `payload` with these rows. called: the checkpoint's name -> the row's, of those that are to be used; None = all, as they are.

    Raises SnapshotMissing naming what is nowhere, SnapshotCorrupt.
    """
    for begin, length in rows.places():
        payload[begin + length : begin + padded(length)] = bytes(padded(length) - length)
    places = {row.key: (row, begin) for row, (begin, _) in zip(rows.rows, rows.places(), strict=True)}
    lacking = {row.key: math.prod(row.local) for row in rows.rows if row.num_bytes}
    seen: set[tuple[str, tuple[int, ...]]] = set()
    for rank in range(whole.manifest.world_size):
        tail, described = whole.tail(rank)
        with whole.reading(rank) as file:
            for item in tail.items:
                old = described.rows[item.row]
                key = old.key if called is None else called.get(old.key, "")
                row, begin = places.get(key, (old, 0))
                common = overlap(old, row)
                if key not in lacking or common is None or (old.key, old.offsets) in seen:
                    continue
                seen.add((old.key, old.offsets))
                spare = memoryview(bytearray(old.num_bytes))
                rankfile.fill_row(file, item, old, spare, tail.digests[item.row])
                copy_box(spare, old, payload[begin : begin + row.num_bytes], row, common)
                lacking[key] -= math.prod(end - start for start, end in common)
    for key, count in lacking.items():
        if count:
            raise SnapshotMissing(f"checkpoint step={whole.manifest.step}: {count} elements of {key} are in none of its files")


def overlap(a: Row, b: Row) -> Box | None:
    """The box that both hold; () of two scalars, None if there is none."""
    if len(a.shape) != len(b.shape):
        return None
    box = []
    for start_a, size_a, start_b, size_b in zip(a.offsets, a.local, b.offsets, b.local, strict=True):
        begin, end = max(start_a, start_b), min(start_a + size_a, start_b + size_b)
        if begin >= end:
            return None
        box.append((begin, end))
    return tuple(box)


def copy_box(source: memoryview, old: Row, target: memoryview, row: Row, box: Box) -> None:
    """`box` from one tensor's memory into another's."""
    import numpy as np  # noqa: PLC0415  0.1 s, and only who reshapes pays them

    kind = np.dtype(f"V{ITEMSIZES[row.dtype]}")
    old_at = tuple(slice(begin - o, end - o) for (begin, end), o in zip(box, old.offsets, strict=True))
    new_at = tuple(slice(begin - o, end - o) for (begin, end), o in zip(box, row.offsets, strict=True))
    np.frombuffer(target, kind).reshape(row.local)[new_at] = np.frombuffer(source, kind).reshape(old.local)[old_at]
