"""Replicas: whether ranks that should hold the same bytes do.

Think of three clocks on a wall: if one shows another time than the other two, it is that one which is wrong, and nobody had to look at the
sun.

Contract: pure. Twins (layout.py) are compared tensor by tensor, by the digests of what each of them sealed. Of a difference the ranks in
the minority are named; where there is no majority, all that differ are. Data parallelism keeps replicas equal to the last bit, so a
difference is silent corruption (a bit flipped in memory, a device that computes wrongly) or a program that treats its ranks differently.
A **sheet** is what of a snapshot is needed for that, as bytes: MessagePack of its layout and its tensors' digests (tally.py). Twins that
are equal have equal sheets, so between checkpoints (core/audits.py) one digest for each rank goes to the coordinator, and sheets are read
only where these differ. They come from another node: bytes that are no sheet are SnapshotCorrupt.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from typing import Final, NamedTuple

import msgspec
import xxhash

from resilient.checkpoint import layout
from resilient.checkpoint.layout import Layout
from resilient.errors import SnapshotCorrupt

_NAMED_MAX: Final = 3
_RANKS_MAX: Final = 16


class Held(NamedTuple):
    """What some ranks hold, all of them the same."""

    ranks: Sequence[int]
    layout: Layout
    digests: Sequence[bytes]  # of each tensor


class Difference(NamedTuple):
    """Tensors that are not what the other twins hold."""

    ranks: tuple[int, ...]  # in the minority
    twins: int
    tensors: tuple[str, ...]

    def __str__(self) -> str:
        """For people."""
        names, ranks = _listed(self.tensors, _NAMED_MAX), _listed(self.ranks, _RANKS_MAX)
        return f"{names}: differs on {'rank' if len(self.ranks) == 1 else 'ranks'} {ranks} of {self.twins} replicas"


def compare(found: Collection[Held]) -> list[Difference]:
    """Differences, one per set of ranks."""
    tensors: dict[tuple[tuple[int, ...], int], list[str]] = {}
    for ranks in sorted({held.layout.twins.ranks for held in found}, key=lambda ranks: ranks.start):
        twins = sorted((held for held in found if held.ranks[0] in ranks), key=lambda held: min(held.ranks))
        if len(twins) < 2:
            continue
        everyone = sorted(rank for held in twins for rank in held.ranks)
        for number, row in enumerate(twins[0].layout.rows):
            digests = [held.digests[number] if held.layout.rows[number : number + 1] == (row,) else b"" for held in twins]
            if digests.count(digests[0]) == len(digests):
                continue
            count: Counter[bytes] = Counter()
            for digest, held in zip(digests, twins, strict=True):
                count[digest] += len(held.ranks)
            common, times = count.most_common(1)[0]
            others = (rank for digest, held in zip(digests, twins, strict=True) if digest != common for rank in held.ranks)
            odd = sorted(others) if 2 * times > len(everyone) else everyone
            tensors.setdefault((tuple(odd), len(everyone)), []).append(row.key)
    return [Difference(ranks, twins, tuple(keys)) for (ranks, twins), keys in tensors.items()]


def _listed(things: Sequence[object], most: int) -> str:
    return ", ".join(map(str, things[:most])) + (f" and {more} more" if (more := len(things) - most) > 0 else "")


def sheet(described: bytes, digests: Sequence[bytes]) -> bytes:
    """described: the layout, encoded."""
    return msgspec.msgpack.encode((described, b"".join(digests)))


def digest_of(sheet: bytes | bytearray) -> str:
    """By which sheets are compared and asked for: hex."""
    return xxhash.xxh3_128_hexdigest(sheet)


def held(ranks: Sequence[int], sheet: bytes, where: str) -> Held:
    """What a sheet says that these ranks hold. Raises SnapshotCorrupt."""
    try:
        described, digests = _sheet.decode(sheet)
    except msgspec.DecodeError as error:
        raise SnapshotCorrupt(f"sheet: {len(sheet)} bytes that are none ({error}; {where})") from error
    found = layout.decode(described)
    if len(digests) != _DIGEST_BYTES * len(found.rows):
        raise SnapshotCorrupt(f"sheet: {len(found.rows)} digests expected, {len(digests) / _DIGEST_BYTES:g} found ({where})")
    return Held(ranks, found, [digests[at : at + _DIGEST_BYTES] for at in range(0, len(digests), _DIGEST_BYTES)])


_DIGEST_BYTES: Final = 16
_sheet: Final = msgspec.msgpack.Decoder(tuple[bytes, bytes])
