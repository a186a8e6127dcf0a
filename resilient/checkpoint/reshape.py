"""Reshape: a rank's snapshot in another world than the one that wrote the checkpoint, from whatever boxes lie there.

Think of a wall papered anew in wider strips: the pattern is the same, so every new strip is cut from the old ones that lie beneath it.

Contract: `rows_for` says what the snapshot has to hold: parameters in the boxes that the rank asks for, optimizer state in the boxes of its
parameters, everything else whole. A `Cut` is filled with them from boxes of the old world, whoever reads these: `assemble` from the
files of a checkpoint, recut.py from memory. Every old box is laid once, and checked before a byte of it is used. A box that is nowhere is
an error with its name. Own state (random numbers, data position) is that of the old rank
`rank % old world size`; a rank that another one shares it with has to draw other numbers from then on (train/rng.py).
Memory: the largest old tensor. Rejected: letting the workers read (each would have to know storage, and nobody would bound the memory).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
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


class Cut:
    """A payload that is being filled with its rows, from whatever boxes come. `lay` may be called by several threads at once."""

    def __init__(self, rows: Layout, payload: memoryview) -> None:
        """Writes zeros between the rows."""
        places = rows.places()
        for begin, length in places:
            payload[begin + length : begin + padded(length)] = bytes(padded(length) - length)
        self._rows = {row.key: (row, payload[begin : begin + length]) for row, (begin, length) in zip(rows.rows, places, strict=True)}
        self._lacking = {row.key: math.prod(row.local) for row in rows.rows if row.num_bytes}  # elements
        self._laid: set[tuple[str, tuple[int, ...]]] = set()

    @property
    def lacks(self) -> bool:
        """Whether anything is still to come."""
        return any(self._lacking.values())

    def wanted(self, old: Row) -> Box | None:
        """What of this box is to be laid; None if nothing is, or it has been."""
        if not self._lacking.get(old.key) or (old.key, old.offsets) in self._laid:
            return None
        return overlap(old, self._rows[old.key][0])

    def same(self, other: Row) -> Box | None:
        """As `wanted`, for the box of a rank of our own world: all of it or nothing, so that no element is counted twice."""
        row, _ = self._rows.get(other.key, (None, None))
        return overlap(other, other) if row == other and self._lacking.get(other.key) == math.prod(other.local) else None

    def lay(self, old: Row, memory: memoryview, begin: int = 0) -> None:
        """What is wanted of these bytes of the box `old`, the first of which is its byte number `begin`. Both at whole elements."""
        row, target = self._rows[old.key]
        size, at = ITEMSIZES[old.dtype], 0
        for slab in _slabs(old.local, begin // size, (begin + len(memory)) // size):
            offsets = tuple(o + first for o, (first, _) in zip(old.offsets, slab, strict=True))
            part = Row(old.key, old.dtype, old.shape, offsets, tuple(end - first for first, end in slab))
            if (common := overlap(part, row)) is not None:
                copy_box(memory[at : at + part.num_bytes], part, target, row, common)
            at += part.num_bytes

    def done(self, old: Row) -> None:
        """All of this box that was wanted has been laid."""
        common = overlap(old, self._rows[old.key][0])
        assert common is not None, "done() with what nobody wanted"
        self._laid.add((old.key, old.offsets))
        self._lacking[old.key] -= math.prod(end - start for start, end in common)

    def check(self, what: str, where: str) -> None:
        """Nothing is lacking, or SnapshotMissing names it."""
        for key, count in self._lacking.items():
            if count:
                raise SnapshotMissing(f"{what}: {count} elements of {key} are {where}")


def assemble(whole: Checkpoint, rows: Layout, payload: memoryview, called: Mapping[str, str] | None = None) -> None:
    """Fill `payload` with these rows. called: the checkpoint's name -> the row's, of those that are to be used; None = all, as they are.

    Raises SnapshotMissing naming what is nowhere, SnapshotCorrupt.
    """
    cut = Cut(rows, payload)
    for rank in range(whole.manifest.world_size):
        tail, described = whole.tail(rank)
        with whole.reading(rank) as file:
            for item in tail.items:
                old = described.rows[item.row]
                ours = old if called is None else msgspec.structs.replace(old, key=called.get(old.key, ""))
                if cut.wanted(ours) is not None:
                    spare = memoryview(bytearray(old.num_bytes))
                    rankfile.fill_row(file, item, old, spare, tail.digests[item.row])
                    cut.lay(ours, spare)
                    cut.done(ours)
    cut.check(f"checkpoint step={whole.manifest.step}", "in none of its files")


def stretch(old: Row, box: Box) -> tuple[int, int]:
    """The bytes of `old`, first and one past the last, between which all of `box` lies."""
    first, last, stride = 0, 0, 1
    for (begin, end), offset, size in reversed(list(zip(box, old.offsets, old.local, strict=True))):
        first += (begin - offset) * stride
        last += (end - 1 - offset) * stride
        stride *= size
    return first * ITEMSIZES[old.dtype], (last + 1) * ITEMSIZES[old.dtype]


def _slabs(shape: tuple[int, ...], begin: int, end: int) -> Iterator[Box]:
    """The elements from number `begin` to `end` of such a tensor, as boxes, in order."""
    if begin >= end:
        return
    if not shape:
        yield ()
        return
    inner = math.prod(shape[1:])
    row, whole = begin // inner, end // inner
    if begin > row * inner:  # the rest of a row that has begun
        upto = min(end, (row + 1) * inner)
        yield from (((row, row + 1), *slab) for slab in _slabs(shape[1:], begin - row * inner, upto - row * inner))
        row, begin = row + 1, upto
    if row < whole:
        yield ((row, whole), *((0, size) for size in shape[1:]))
        begin = whole * inner
    if begin < end:
        yield from (((whole, whole + 1), *slab) for slab in _slabs(shape[1:], 0, end - whole * inner))


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
