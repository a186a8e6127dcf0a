"""Parity: a part of several snapshots at once, laid over each other, from which one of them can be had again.

Think of four friends of whom each writes the sum of the others' scores on his own card: whichever card is lost, the scores on it follow
from what the other three have.

Contract: of n nodes that keep parity together, each cuts its snapshots (all behind the header: `body` of slot.py) into n - 1 stripes; for
each of the others there is one: `number_of`. A node's parity is the XOR of the stripes that are for it, one of each other node's
snapshot of one step; shorter ones count as if zeros followed. So each keeps 1 / (n - 1) of a snapshot's size, and a lost snapshot is,
stripe by stripe, the XOR of the parity that it went into and of the others' stripes in there.
Parity is a snapshot itself, of a rank that nobody sits on (from PARITY on: one for the first rank of every node, one for the second,
...). Its layout is one row of bytes; its own state is the `Content`, with the whole header of every snapshot in it. It has two slots
in turn, and is sealed when every stripe is in it, stamped, sent and checked as any other. What is put together again is sealed under the
header that its writer sealed it under, so every byte of it is under the digests that were made then.
Numbers: a Fold has one piece (haul.py) of memory for each connection. XOR has about 7 GB/s on one core, without the GIL. Each piece comes
with its digest: what was damaged on its way is fetched again, and what is in there is in there once.
Rejected: parity of all on one node of the group (it would have all the traffic, and be a loss of its own); Reed-Solomon (that two of one
group, in different failure domains, are lost at a time is what the persistent tier is for); a format of its own.
"""

from __future__ import annotations

import threading
from typing import Final

import msgspec
import xxhash

from resilient.checkpoint.handed import Handed
from resilient.checkpoint.haul import TCP, piece_of, pieces
from resilient.checkpoint.layout import Layout, Row, Twins, padded
from resilient.checkpoint.snapshot import BODY, HEAD_DIGEST, HEADER_BYTES, LAYOUT_BYTES, OWN_BYTES, announced_bytes, own_of
from resilient.checkpoint.transport import Transport
from resilient.errors import SnapshotCorrupt

PARITY: Final = 1 << 24  # a rank from here on is nobody's
_ALIGN: Final = 4096


class Part(msgspec.Struct, frozen=True, array_like=True):
    """One stripe that is in a parity."""

    rank: int
    number: int  # of the stripe
    header: bytes  # of the snapshot that it is of, as it travels: stamped


class Content(msgspec.Struct, frozen=True, array_like=True):
    """What is in a parity."""

    stripes: int  # into how many the snapshots are cut
    parts: tuple[Part, ...]

    def encode(self) -> bytes:
        """As it stands in the parity's own state."""
        return _encode(self)

    def num_bytes(self) -> int:
        """Of the parity: the longest stripe."""
        spans = (span(part.header, self.stripes, part.number) for part in self.parts)
        return padded(max(end - begin for begin, end in spans))


def decode(own: bytes, where: str) -> Content:
    """What `encode` made. Raises SnapshotCorrupt."""
    try:
        return _decoder.decode(own)
    except msgspec.DecodeError as error:
        raise SnapshotCorrupt(f"parity: its content cannot be read: {error} ({where})") from error


def content_of(header: bytes, head: bytes, where: str) -> Content:
    """From a parity's header and what follows up to its payload. Raises SnapshotCorrupt if that is not what was sealed."""
    sealed, words = header + head, memoryview(header).cast("q")
    end = HEADER_BYTES + words[LAYOUT_BYTES] + words[OWN_BYTES]
    if len(sealed) < end or xxhash.xxh3_128_digest(sealed[BODY.start : end]) != header[HEAD_DIGEST]:
        raise SnapshotCorrupt(f"parity: header or content are not what was sealed ({where})")
    return decode(own_of(sealed), where)


def layout_of(num_bytes: int, rank: int) -> bytes:
    """The layout of a parity of so many bytes."""
    return Layout((Row("parity", "uint8", (num_bytes,), (0,), (num_bytes,)),), Twins(rank)).encode()


def number_of(member: int, holder: int, count: int) -> int:
    """Which stripe of a member's snapshots goes into the holder's parity; both are places in a group of `count`."""
    return (holder - member - 1) % count


def span(header: bytes, stripes: int, number: int) -> tuple[int, int]:
    """Where in the body of that snapshot the stripe lies. The last ones may be short, or empty."""
    body_bytes = announced_bytes(header) - HEADER_BYTES
    size = -(-body_bytes // (stripes * _ALIGN)) * _ALIGN
    return min(number * size, body_bytes), min((number + 1) * size, body_bytes)


class Fold(Handed):
    """The receiving side of a haul that lays what comes over what is there: target ^= bytes."""

    def __init__(self, target: memoryview, lock: threading.Lock, *, transport: Transport = TCP) -> None:
        """`target`: writable, as long as what will come. `lock`: of all that is laid over this memory."""
        self._target = target
        self._lock = lock
        lengths = [end - begin for begin, end in pieces(0, len(target))]
        super().__init__(lengths, self._lay_over, sums=True, transport=transport)

    def _lay_over(self, number: int, piece: memoryview, digest: bytes) -> None:
        if xxhash.xxh3_128_digest(piece) != digest:
            raise SnapshotCorrupt(f"a piece of a stripe ({number}) is not what was sent")
        with self._lock:
            lay_over(piece_of(self._target, number), piece)


def lay_over(target: memoryview, what: memoryview) -> None:
    """target ^= what, of one length."""
    import numpy as np  # noqa: PLC0415 - 0.1 s and 20 MB, for those who keep parity only

    below = np.frombuffer(target, np.uint8)
    np.bitwise_xor(below, np.frombuffer(what, np.uint8), out=below)


_encode = msgspec.msgpack.Encoder().encode
_decoder: Final = msgspec.msgpack.Decoder(Content)
