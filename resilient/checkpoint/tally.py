"""Tally: the digest of a payload, made of the digests of its tensors, so that every byte is looked at once.

Think of a bill of lading: every crate is weighed once, by whoever has a hand free, and what stands at the bottom follows from the list.

    piece      at most PIECE bytes of a tensor: xxh3_128 of them
    tensor     of one piece: the piece's digest; of more: xxh3_128 of its pieces' digests in their order
    payload    xxh3_128 of the tensors' digests in the order of the layout. The gaps behind tensors are zero. The number (8 bytes,
               little-endian) of a tensor with a gap that is not, and that gap, are appended: no sound payload has such a digest

A payload without layout is one tensor without a gap (only tests and tools make such).

    leaves     the digests of all pieces, and of the tensors of one piece, in the order of the layout: with them any piece can be checked
               without the others, and they themselves by the payload's digest

Contract: pure but for threads. The layout may be anybody's bytes: what does not describe exactly this payload is SnapshotCorrupt. Parts, in
which the payload is to be looked at, cover it without overlap: a piece of a large tensor, or small ones side by side. `add` may be called
for each part by any thread, in any order.
Numbers: 0.04 to 0.2 s of a core for each GB, as the machine is; 6 us for each small tensor besides, most of it for the layout.
Rejected: a digest over the payload beside those of its tensors (a second pass); one digest over a large tensor (one core's speed, and on a
wire only in order).
"""

from __future__ import annotations

import itertools
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from typing import Final, NamedTuple

import xxhash

from resilient.checkpoint import layout
from resilient.checkpoint.layout import Layout
from resilient.errors import SnapshotCorrupt

PIECE: Final = 4 << 20
_LOCKED_MAX: Final = 64 << 10  # up to here hashed with the lock of the interpreter: giving it up costs more
_DIGEST: Final = 16  # bytes
_ALONE: Final = 2 * PIECE  # less than this is hashed before other threads are awake


class Part(NamedTuple):
    """A stretch of the payload that is looked at in one go."""

    begin: int
    end: int
    rows: range  # that it holds, whole ones; or the one that it is a piece of
    piece: int = -1  # its number; -1: of whole rows


class Tally:
    """The digests of one payload, as they come in."""

    def __init__(self, described: bytes, payload_bytes: int) -> None:
        """`described`: its layout. Raises SnapshotCorrupt if that is none, or one of another payload."""
        self.layout = layout.decode(described) if described else Layout()
        self.places = self.layout.places() if described else [(0, payload_bytes)]
        end = self.places[-1][0] + (layout.padded(self.places[-1][1]) if described else payload_bytes) if self.places else 0
        if end != payload_bytes:
            raise SnapshotCorrupt(f"layout: a payload of {end} bytes expected, {payload_bytes} found")
        begins = [begin for begin, _ in self.places]
        self._ends = [*begins[1:], end] if begins else []
        self.parts = list(self._cut())
        self._rows = [b""] * len(self.places)
        self._pieces = {part.rows[0]: [b""] * (part.piece + 1) for part in self.parts if part.piece >= 0}  # the last one counts
        self._odd: dict[int, bytes] = {}

    def _cut(self) -> list[Part]:
        found: list[Part] = []
        first, begin = 0, 0  # of the small rows that are being gathered
        for number, (at, length) in enumerate(self.places):
            end = self._ends[number]
            if length > PIECE or end - begin > PIECE:
                if first < number:
                    found.append(Part(begin, at, range(first, number)))
                first, begin = number, at
            if length > PIECE:
                cuts = [*range(at, at + length, PIECE), end]
                found += [Part(a, b, range(number, number + 1), i) for i, (a, b) in enumerate(itertools.pairwise(cuts))]
                first, begin = number + 1, end
        if first < len(self.places):
            found.append(Part(begin, self._ends[-1], range(first, len(self.places))))
        return found

    def gaps(self) -> list[tuple[int, int]]:
        """What lies behind tensors: begin and end in the payload, where there is something."""
        ends = ((at + length, end) for (at, length), end in zip(self.places, self._ends, strict=True))
        return [gap for gap in ends if gap[0] < gap[1]]

    def add(self, part: Part, view: memoryview) -> None:
        """`view`: exactly its bytes."""
        for number in part.rows:
            at, length = self.places[number]
            memory = view[max(at - part.begin, 0) : at + length - part.begin]
            if part.piece < 0:
                self._rows[number] = piece_digest(memory)
            else:
                self._pieces[number][part.piece] = piece_digest(memory)
            gap = min(self._ends[number], part.end) - at - length
            if gap > 0 and any(odd := bytes(view[at + length - part.begin : at + length + gap - part.begin])):
                self._odd[number] = odd

    def add_all(self, payload: memoryview, *, threads: int = 1) -> None:
        """All of it, by the caller and up to `threads` - 1 others."""
        left = deque(self.parts)

        def work() -> None:
            while left:
                try:
                    part = left.popleft()
                except IndexError:
                    return  # somebody else took the last one
                self.add(part, payload[part.begin : part.end])

        if threads < 2 or len(payload) < _ALONE:
            work()
            return
        with ThreadPoolExecutor(threads - 1, "resilient-tally") as others:  # each ends when nothing is left
            called = [others.submit(work) for _ in range(threads - 1)]
            work()
        for one in called:
            one.result()

    def rows(self) -> tuple[bytes, ...]:
        """The digest of each tensor. All parts have been added."""
        for number, pieces in self._pieces.items():
            self._rows[number] = xxhash.xxh3_128_digest(b"".join(pieces))
        assert all(self._rows), "rows() before every part was added"
        return tuple(self._rows)

    def leaves(self) -> bytes:
        """What another Tally takes instead of the payload. All parts have been added."""
        return b"".join(leaf for number in range(len(self.places)) for leaf in self._pieces.get(number, self._rows[number : number + 1]))

    def leaves_bytes(self) -> int:
        """Length of `leaves`, before any part has been added."""
        return _DIGEST * sum(len(self._pieces.get(number, b".")) for number in range(len(self.places)))

    def take(self, leaves: bytes) -> None:
        """As if all parts had been added and had these digests: whether `digest` is then the right one is the caller's to see.

        Raises SnapshotCorrupt if they are too many or too few.
        """
        expected = self.leaves_bytes()
        if len(leaves) != expected:
            raise SnapshotCorrupt(f"layout: {expected} bytes of digests expected, {len(leaves)} found")
        found = (leaves[at : at + _DIGEST] for at in range(0, expected, _DIGEST))
        for number in range(len(self.places)):
            if number in self._pieces:
                self._pieces[number][:] = itertools.islice(found, len(self._pieces[number]))
            else:
                self._rows[number] = next(found)

    def pieces(self, number: int) -> list[tuple[int, int, bytes]]:
        """Of one tensor: (begin, end, digest) of each of its pieces, within its memory."""
        leaves, (_, length) = self._pieces.get(number, self._rows[number : number + 1]), self.places[number]
        return [(at * PIECE, min((at + 1) * PIECE, length), leaf) for at, leaf in enumerate(leaves)]

    def digest(self) -> bytes:
        """Of the payload. All parts have been added."""
        odd = (number.to_bytes(8, "little") + gap for number, gap in sorted(self._odd.items()))
        return xxhash.xxh3_128_digest(b"".join((*self.rows(), *odd)))


def tensor_digest(memory: memoryview) -> bytes:
    """Of one tensor's memory."""
    if len(memory) <= PIECE:
        return piece_digest(memory)
    return xxhash.xxh3_128_digest(b"".join(piece_digest(memory[at : at + PIECE]) for at in range(0, len(memory), PIECE)))


def payload_digest(described: bytes, payload: memoryview, *, threads: int = 1) -> bytes:
    """Of one payload. Raises SnapshotCorrupt for a layout that is not its own."""
    tally = Tally(described, len(payload))
    tally.add_all(payload, threads=threads)
    return tally.digest()


def piece_digest(memory: memoryview) -> bytes:
    """Of at most PIECE bytes of one tensor."""
    return xxhash.xxh3_128_digest(memory) if len(memory) <= _LOCKED_MAX else xxhash.xxh3_128(memory).digest()
