"""Haul: the body of one snapshot on its way from memory to memory, over several connections at once.

Think of carts between two barns: each cart takes the next sack from the heap and sets it down at that sack's own place. A lame cart
takes fewer sacks and holds up none of the others; when the road was cut, only the sacks that are not there yet are fetched.

Contract: the body is cut into pieces of PIECE_BYTES at fixed places; of a body of which only parts are wanted, the asker says which pieces
of at most that length. On every connection goes, for each piece that it takes, the piece's
number (4 bytes, big-endian), where asked for the xxh3_128 of its bytes, and then these; END ends it. `carry` blocks and belongs into a
thread, one per connection; how the bytes get from memory to memory is the transport's affair (transport.py). The receiver hashes the
payload while it comes: whichever thread has set down a piece hashes the parts of the payload (tally.py) that are whole since then, as soon
as the layout is there, which says what they are. When no connection is at work any more, whichever way it ended, `close` is called.
Numbers: tests/bench/test_peer_wire.py.
Rejected: one fixed share per connection (the slowest connection would decide); a digest for each piece of a
whole snapshot (the payload's own is checked before anything is sealed, whatever was broken off and gone on with); to hash each piece just
before it is sent, in place of the whole before the first (0.74 of raw TCP instead of 0.70 where both ends share two cores; the digest
would have to follow the bytes, and a transfer that broke off could not be known again by its header).
"""

from __future__ import annotations

import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

import xxhash

from resilient.checkpoint.slot import Slot
from resilient.checkpoint.snapshot import HEADER_BYTES, PAYLOAD_AT, Buffer, layout_at, parse
from resilient.checkpoint.tally import Part, Tally
from resilient.checkpoint.tcp import Tcp
from resilient.checkpoint.tier import SnapshotKey
from resilient.checkpoint.transport import Region, Transport
from resilient.errors import ProtocolError, SnapshotCorrupt, SnapshotMissing

PIECE_BYTES: Final = 4 << 20  # a millisecond of a fast wire: small beside a transfer, large beside a system call
RATE_MIN: Final = 1 << 20  # bytes/s: less than this, shared among the connections, would look like a stall
END: Final = 0xFFFF_FFFF
NUMBER: Final = struct.Struct(">I")
TCP: Final[Transport] = Tcp()
SUM_BYTES: Final = 16
Span = tuple[int, int]  # begin and end in a body
_BURST_S: Final = 0.05  # of unused time that a limited sender may catch up with


class Limit:
    """At most so many bytes a second, of all who share it together. Thread-safe."""

    def __init__(self, bytes_s: int, clock: Callable[[], float] = time.monotonic) -> None:
        """`bytes_s`: at least RATE_MIN."""
        self._bytes_s = bytes_s
        self._clock = clock
        self._free_at = 0.0
        self._lock = threading.Lock()

    def take(self, num_bytes: int) -> float:
        """These bytes are to be sent: how long to wait before, in seconds."""
        with self._lock:
            now = self._clock()
            begin = max(self._free_at, now - _BURST_S)
            self._free_at = begin + num_bytes / self._bytes_s
            return max(0.0, begin - now)


class Work(Protocol):
    """One end of a haul: what its connections share."""

    def carry(self, road: socket.socket) -> None:
        """One connection's part of it, until its END."""
        ...

    def stop(self) -> None:
        """End the waits that are not for a connection."""
        ...

    def close(self) -> None:
        """No connection is at work any more."""
        ...


class Registered:
    """Memory that the transport knows from the first connection's begin until `close`. Thread-safe; may be used again."""

    def __init__(self, transport: Transport, memory: memoryview) -> None:
        """Nothing is registered yet: it may take a while, and belongs into the threads."""
        self._transport = transport
        self._memory = memory
        self._lock = threading.Lock()
        self._known: Region | None = None

    def region(self) -> Region:
        """The same for all connections."""
        with self._lock:
            if self._known is None:
                self._known = self._transport.register(self._memory)
            return self._known

    def close(self) -> None:
        """No connection is at work."""
        with self._lock:
            known, self._known = self._known, None
        if known is not None:
            known.close()


class Outgoing:
    """The sending side."""

    def __init__(
        self,
        body: memoryview,
        *,
        parts: Sequence[Span] | None = None,
        have: Collection[int] = (),
        limit: Limit | None = None,
        unmoved: Callable[[], bool] = lambda: True,
        sums: bool = False,
        transport: Transport = TCP,
    ) -> None:
        """`parts`: the pieces of it that are wanted, None = all. `have`: those that need not be sent. `sums`: each with its digest.

        `unmoved`: whether `body` still is what it was.
        """
        self._body = body
        there = frozenset(have)
        self._parts = pieces(0, len(body)) if parts is None else parts
        self._left = deque(number for number in range(len(self._parts)) if number not in there)
        self._limit = limit
        self._unmoved = unmoved
        self._sums = sums
        self._transport = transport
        self._registered = Registered(transport, body)
        self._stopped = threading.Event()

    def carry(self, road: socket.socket) -> None:
        """Send over this connection until no piece is left. Raises OSError, TimeoutError, SnapshotMissing if the body has moved."""
        sender = self._transport.sender(road, self._registered.region())
        pace = self._pace if self._limit is not None else None
        while (number := self._next()) != END:
            begin, end = self._parts[number]
            sender.send(self._tag(number, self._body[begin:end]), begin, end, pace)
        sender.finish(self._tag(END, self._body[:0]))

    def stop(self) -> None:
        """End the waits for the limit."""
        self._stopped.set()

    def close(self) -> None:
        """No connection is at work any more."""
        self._registered.close()

    def _next(self) -> int:
        if not self._unmoved():
            raise SnapshotMissing("overwritten while it was being sent")
        try:
            return self._left.popleft()
        except IndexError:
            return END

    def _tag(self, number: int, piece: memoryview) -> bytes:
        return NUMBER.pack(number) + (xxhash.xxh3_128_digest(piece) if self._sums else b"")

    def _pace(self, num_bytes: int) -> None:
        assert self._limit is not None, "asked for where there is one"
        if self._stopped.wait(self._limit.take(num_bytes)):
            raise ConnectionAbortedError("the transfer was stopped")


class Pieces:
    """Which pieces have come, and which are on their way. Thread-safe."""

    def __init__(self, count: int) -> None:
        """None yet."""
        self._count = count
        self._claimed: set[int] = set()
        self._there: set[int] = set()
        self._lock = threading.Lock()

    def claim(self, number: int) -> int:
        """It is announced. Raises ProtocolError if it cannot be."""
        with self._lock:
            if number >= self._count or number in self._claimed:
                raise ProtocolError(
                    f"piece {number} of {self._count} is announced, which is {'none' if number >= self._count else 'there'}"
                )
            self._claimed.add(number)
        return number

    def settle(self, number: int, *, arrived: bool) -> None:
        """What was claimed has come, or has not."""
        with self._lock:
            (self._there.add if arrived else self._claimed.discard)(number)

    def have(self) -> tuple[int, ...]:
        """Those that are there."""
        with self._lock:
            return tuple(sorted(self._there))

    def has(self, number: int) -> bool:
        """Whether this one is."""
        return number in self._there


class Incoming:
    """The receiving side: memory that fills, and the digest of what has come."""

    def __init__(self, body: memoryview, header: bytes, *, transport: Transport = TCP) -> None:
        """`body`: writable, what follows this header; one that `announced_bytes` has taken."""
        self.body = body
        self._header = header
        self._payload_at = payload_place(header)
        self._count = piece_count(len(body))
        self._pieces = Pieces(self._count)
        self._transport = transport
        self._registered = Registered(transport, body)
        self._lock = threading.Lock()
        self._tally: Tally | None = None  # as soon as the layout is there
        self._spoilt = False  # or never
        self._lacking: dict[int, list[tuple[Part, set[int]]]] = {}  # piece -> parts of the payload that it belongs to, and what they lack
        self._unhashed = 0  # parts

    def carry(self, road: socket.socket) -> None:
        """Take what comes over this connection until its end. Raises OSError, EOFError, TimeoutError, ProtocolError."""
        receiver = self._transport.receiver(road, self._registered.region())
        number = END

        def place(tag: bytes) -> memoryview:
            nonlocal number
            (announced,) = NUMBER.unpack(tag)
            if announced == END:
                return self.body[:0]
            number = self._pieces.claim(announced)
            return piece_of(self.body, number)

        while True:
            number = END
            try:
                receiver.receive(NUMBER.size, place)
            except BaseException:
                self._pieces.settle(number, arrived=False)
                raise
            if number == END:
                return
            self._pieces.settle(number, arrived=True)
            self._set_down(number)

    def stop(self) -> None:
        """Nothing here waits for anything but the connection."""

    def close(self) -> None:
        """No connection is at work any more."""
        self._registered.close()

    def have(self) -> tuple[int, ...]:
        """The pieces that are there."""
        return self._pieces.have()

    def missing(self) -> int:
        """How many pieces are not."""
        return self._count - len(self._pieces.have())

    def digest(self) -> bytes | None:
        """Of the payload as it lies in memory; None if it is not known: a piece is missing, or layout or own state are damaged."""
        with self._lock:
            return self._tally.digest() if self._tally is not None and not self._unhashed else None

    def _set_down(self, number: int) -> None:
        with self._lock:
            due = self._due(number)
        for tally, part in due:
            tally.add(part, self.body[self._payload_at + part.begin : self._payload_at + part.end])
            with self._lock:
                self._unhashed -= 1

    def _due(self, number: int) -> list[tuple[Tally, Part]]:
        """The parts of the payload that are whole since this piece is there."""
        if self._tally is None:
            return self._begin()
        due = []
        for part, lacking in self._lacking.pop(number, ()):
            lacking.discard(number)
            if not lacking:
                due.append((self._tally, part))
        return due

    def _begin(self) -> list[tuple[Tally, Part]]:
        """As soon as the layout is there."""
        there = set(self._pieces.have())
        if self._spoilt or not there.issuperset(range(piece_count(self._payload_at))):
            return []
        try:
            self._tally = Tally(layout_at(self._header, self.body), len(self.body) - self._payload_at)
        except SnapshotCorrupt:
            self._spoilt = True  # whoever checks all of it will say what is wrong
            return []
        due = []
        self._unhashed = len(self._tally.parts)
        for part in self._tally.parts:
            begin, end = self._payload_at + part.begin, self._payload_at + part.end
            lacking = set(range(begin // PIECE_BYTES, piece_count(end))) - there
            for piece in lacking:
                self._lacking.setdefault(piece, []).append((part, lacking))
            if not lacking:
                due.append((self._tally, part))
        return due


@dataclass(frozen=True)
class Source:
    """What is sent: private memory, or a slot whose writer may come back at any time."""

    header: bytes
    body: memoryview
    unmoved: Callable[[], bool]

    @classmethod
    def of(cls, key: SnapshotKey, sealed: Buffer | Slot) -> Source:
        """Must be stamped. Raises SnapshotMissing, SnapshotCorrupt, SnapshotMismatch; the payload is not looked at."""
        if isinstance(sealed, Slot):
            generation = sealed.generation()
            if not sealed.is_stamped():
                raise SnapshotMissing(f"{key}: not there, or overwritten and not hashed yet")
            step, header, body = sealed.read(verify=False, stamped=True, rank=key.rank).step, sealed.header(), sealed.body()
            if sealed.generation() != generation or step != key.step:
                raise SnapshotMissing(f"{key}: overwritten just now")
            return cls(header, body, lambda: sealed.generation() == generation)
        found = parse(sealed, rank=key.rank, step=key.step, verify=False, stamped=True, where=f"{key} to be sent")
        data = memoryview(sealed).cast("B")[: found.num_bytes]
        return cls(bytes(data[:HEADER_BYTES]), data[HEADER_BYTES:], lambda: True)


def payload_place(header: bytes) -> int:
    """Where in the body the payload begins."""
    return memoryview(header).cast("q")[PAYLOAD_AT] - HEADER_BYTES


def piece_count(num_bytes: int) -> int:
    """Into how many pieces a body of this length is cut."""
    return -(-num_bytes // PIECE_BYTES)


def pieces(begin: int, end: int) -> list[Span]:
    """That stretch of a body in pieces."""
    return [(at, min(at + PIECE_BYTES, end)) for at in range(begin, end, PIECE_BYTES)]


def piece_of(body: memoryview, number: int) -> memoryview:
    """One piece's place."""
    return body[number * PIECE_BYTES : (number + 1) * PIECE_BYTES]
