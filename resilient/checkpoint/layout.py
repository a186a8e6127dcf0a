"""Layout: which tensors a snapshot's payload holds, and on which other ranks the same bytes lie.

Think of the contents page of a book of which several libraries own a copy: it says what stands on which page, and who has the same book.

Contract: plain data, MessagePack, no torch. `rows` are in the order of the payload, each tensor at a multiple of 64 bytes. `twins` are the
ranks, this one among them, whose payload is equal to the last bit (replicas of data parallelism; one's own rank alone where nothing is
replicated): they share the work of writing it. `groups` names, per optimizer, the parameters of each parameter group; `wrapped` the
prefixes behind which a data-parallel wrapper puts its `module.`; `tied` other names of the same tensor, with the one that its row has: with
all three, others can spell names as torch's own checkpoints do.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Sequence
from typing import Final

import msgspec

from resilient.errors import SnapshotCorrupt

ALIGN: Final = 64  # a cache line; every dtype's alignment divides it
ITEMSIZES: Final = {
    **dict.fromkeys(("bool", "uint8", "int8", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz", "float8_e8m0fnu"), 1),
    **dict.fromkeys(("uint16", "int16", "float16", "bfloat16"), 2),
    **dict.fromkeys(("uint32", "int32", "float32"), 4),
    **dict.fromkeys(("uint64", "int64", "float64", "complex64"), 8),
    "complex128": 16,
}


class Row(msgspec.Struct, frozen=True, array_like=True):
    """One tensor: this rank's box of it."""

    key: str
    dtype: str  # as torch spells it
    shape: tuple[int, ...]  # of the whole tensor
    offsets: tuple[int, ...]  # of the box
    local: tuple[int, ...]  # shape of the box

    @property
    def num_bytes(self) -> int:
        """Of the box. Raises SnapshotCorrupt for a dtype that is not known here, and a shape that cannot be."""
        if self.dtype not in ITEMSIZES:
            raise SnapshotCorrupt(f"layout: {self.key} is of dtype {self.dtype!r}, one of {', '.join(ITEMSIZES)} expected")
        if min(self.local, default=0) < 0:
            raise SnapshotCorrupt(f"layout: {self.key} has the shape {list(self.local)}, no negative sizes expected")
        return math.prod(self.local) * ITEMSIZES[self.dtype]


class Twins(msgspec.Struct, frozen=True, array_like=True):
    """Ranks first, first + stride, ... (count of them)."""

    first: int
    count: int = 1
    stride: int = 1

    @classmethod
    def of(cls, ranks: Sequence[int], rank: int) -> Twins:
        """These ranks, ascending; `rank` alone where they do not lie at equal distances."""
        stride = ranks[1] - ranks[0] if len(ranks) > 1 else 1
        even = all(b - a == stride for a, b in itertools.pairwise(ranks))
        return cls(ranks[0], len(ranks), stride) if even else cls(rank)

    @property
    def ranks(self) -> range:
        """All of them."""
        return range(self.first, self.first + self.count * self.stride, self.stride)


class Layout(msgspec.Struct, frozen=True, array_like=True):
    """See the module's text."""

    rows: tuple[Row, ...] = ()
    twins: Twins = Twins(0)
    groups: dict[str, tuple[tuple[str, ...], ...]] = {}
    wrapped: tuple[str, ...] = ()
    tied: dict[str, str] = {}

    def encode(self) -> bytes:
        """As it stands in a snapshot."""
        return _encode(self)

    def places(self) -> list[tuple[int, int]]:
        """(offset in the payload, bytes) of each row."""
        found, offset = [], 0
        for row in self.rows:
            found.append((offset, row.num_bytes))
            offset += padded(row.num_bytes)
        return found

    def owners(self) -> list[int]:
        """Of each row, the twin that writes it: the largest first, each to whoever has least so far. Equal on all twins."""
        owner = [self.twins.first] * len(self.rows)
        if self.twins.count == 1:
            return owner
        loads = [(0, rank) for rank in self.twins.ranks]  # a heap: sorted it is one
        sizes = [row.num_bytes for row in self.rows]
        for number in sorted(range(len(sizes)), key=lambda n: (-sizes[n], n)):
            load, owner[number] = loads[0]
            heapq.heapreplace(loads, (load + sizes[number], owner[number]))
        return owner


def decode(data: bytes) -> Layout:
    """What `encode` made. Raises SnapshotCorrupt."""
    try:
        return _decoder.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise SnapshotCorrupt(f"layout: {len(data)} bytes that are none ({error})") from error


def padded(count: int) -> int:
    """The room that so many bytes take in a payload."""
    return (count + ALIGN - 1) // ALIGN * ALIGN


_encode = msgspec.msgpack.Encoder().encode
_decoder: Final = msgspec.msgpack.Decoder(Layout)
