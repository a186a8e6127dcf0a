"""Tensors: a committed step seen as whole tensors, whoever wrote their boxes.

Think of a mosaic that was shipped in crates: the packing list of each crate says which stones lie in it; who wants to see one picture opens
only those crates that hold it.

Contract: names are those of torch's state-dict functions (`model.weight`, `optimizer.state.weight.exp_avg`), where two tensors would share
one the run's own. `entries` and `values` cost the reading of all tails, no tensor. `read` gives one tensor, every byte of it checked.
Memory: the tensor that is asked for, and its largest box.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import xxhash

from resilient.checkpoint import rankfile
from resilient.checkpoint.catalogue import own_path, torch_path
from resilient.checkpoint.committed import Checkpoint
from resilient.checkpoint.extras import plain_name
from resilient.checkpoint.layout import ITEMSIZES, Layout, Row
from resilient.checkpoint.rankfile import Extra, Item
from resilient.checkpoint.reshape import copy_box
from resilient.checkpoint.storage import Input
from resilient.checkpoint.torchfile import cover
from resilient.errors import SnapshotCorrupt, SnapshotMissing


class Part(NamedTuple):
    """A box of a tensor, in the file of the rank that wrote it."""

    row: Row
    rank: int
    place: Item | Extra
    digest: bytes  # of its memory; of an Extra: of its torch file


class Entry(NamedTuple):
    """A whole tensor."""

    key: str
    path: tuple[str | int, ...]
    dtype: str
    shape: tuple[int, ...]
    parts: tuple[Part, ...]  # by their offsets

    @property
    def row(self) -> Row:
        """All of it as one box."""
        return Row(self.key, self.dtype, self.shape, (0,) * len(self.shape), self.shape)

    @property
    def num_bytes(self) -> int:
        """Of its memory."""
        return self.row.num_bytes

    @property
    def split(self) -> str:
        """How many boxes along each dimension: "2x1"; "" where there is one."""
        counts = [len({part.row.offsets[axis] for part in self.parts}) for axis in range(len(self.shape))]
        return "x".join(map(str, counts)) if len(self.parts) > 1 else ""


class Tensors:
    """See the module's text."""

    def __init__(self, whole: Checkpoint) -> None:
        """Reads every tail. Raises SnapshotCorrupt, SnapshotMissing naming the file."""
        self.whole = whole
        self.entries: dict[str, Entry] = {}
        self.values: dict[str, Extra] = {}  # what is no tensor: settings, counters; of the first rank that has them
        parts: dict[str, dict[tuple[int, ...], Part]] = {}  # by the run's own name
        layouts: dict[str, Layout] = {}
        for rank in range(whole.manifest.world_size):
            tail, layout = whole.tail(rank)
            for item in tail.items:
                row = layout.rows[item.row]
                layouts.setdefault(row.key, layout)
                parts.setdefault(row.key, {}).setdefault(row.offsets, Part(row, rank, item, tail.digests[item.row]))
            for extra in tail.extras:
                if not extra.dtype:
                    self.values.setdefault(extra.key, extra)
                    continue
                row = Row(extra.key, extra.dtype, extra.shape, (0,) * len(extra.shape), extra.shape)
                layouts.setdefault(extra.key, layout)
                parts.setdefault(extra.key, {}).setdefault(row.offsets, Part(row, rank, extra, extra.digest))
        order = {row.key: number for number, row in enumerate(whole.tail(0)[1].rows)}
        named: dict[str, list[str]] = {}
        for key in sorted(parts, key=lambda key: order.get(key, len(order))):
            named.setdefault(_plain(key, layouts[key]), []).append(key)
        for plain, keys in named.items():
            for key in keys:
                self._add(plain if len(keys) == 1 else key, key, layouts[key], tuple(parts[key][at] for at in sorted(parts[key])))

    def _add(self, shown: str, key: str, layout: Layout, parts: tuple[Part, ...]) -> None:
        first = parts[0].row
        path = own_path(key, layout) if shown == key else torch_path(own_path(key, layout), layout)
        held = tuple(part for part in parts if part.row.num_bytes) or parts[:1]
        self.entries[shown] = Entry(shown, path, first.dtype, first.shape, held)

    def of(self, name: str) -> list[Entry]:
        """Parameters and buffers of the module that was tracked as `name`."""
        return [entry for entry in self.entries.values() if len(entry.path) == 2 and entry.path[0] == name and entry.path[1]]

    def read(self, entry: Entry) -> memoryview:
        """Its memory. Raises SnapshotCorrupt, SnapshotMissing (a box that is nowhere)."""
        lacking = math.prod(entry.shape) - sum(math.prod(part.row.local) for part in entry.parts)
        if lacking:
            raise SnapshotMissing(f"checkpoint step={self.whole.manifest.step}: {lacking} elements of {entry.key} are in none of its files")
        view = memoryview(bytearray(entry.num_bytes))
        for part in entry.parts:
            if part.row.local == entry.shape:
                self.fill(part, view)
                continue
            spare = memoryview(bytearray(part.row.num_bytes))
            self.fill(part, spare)
            box = tuple((begin, begin + size) for begin, size in zip(part.row.offsets, part.row.local, strict=True))
            copy_box(spare, part.row, view, entry.row, box)
        return view

    def fill(self, part: Part, view: memoryview) -> None:
        """A box's memory, checked. Raises as `read`."""
        with self.whole.reading(part.rank) as file:
            if isinstance(part.place, Item):
                rankfile.fill_row(file, part.place, part.row, view, part.digest)
            else:
                _fill_extra(file, part.place, view)


def _plain(key: str, layout: Layout) -> str:
    path = own_path(key, layout)
    return plain_name(key, layout) if len(path) == 2 else ".".join(map(str, torch_path(path, layout)))


def _fill_extra(file: Input, extra: Extra, view: memoryview) -> None:
    whole = memoryview(bytearray(extra.length))
    file.fill(whole, extra.offset)
    begin = len(cover(extra.dtype, extra.shape).front)
    if xxhash.xxh3_128_digest(whole) != extra.digest or begin + len(view) > len(whole) or len(view) % ITEMSIZES[extra.dtype]:
        raise SnapshotCorrupt(f"{extra.key} is not what was written")
    view[:] = whole[begin : begin + len(view)]
