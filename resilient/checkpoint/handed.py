"""Handed: the receiving side of a haul whose pieces do not stay where they came, but are handed on.

Think of the counter of a sorting office: every parcel is weighed there, and only then goes to its shelf.

Contract: as Work (haul.py). A piece is in nobody's way until `lay` has taken it; one that `lay` refuses has not come, and is fetched again.
Memory: the longest piece, for each connection.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence

from resilient.checkpoint.haul import END, NUMBER, SUM_BYTES, TCP, Pieces
from resilient.checkpoint.transport import Transport


class Handed:
    """The receiving side that takes each piece into memory of its own, from where it is handed on: checked, before it is in its place."""

    def __init__(
        self,
        lengths: Sequence[int],
        lay: Callable[[int, memoryview, bytes], None],
        *,
        sums: bool = False,
        transport: Transport = TCP,
    ) -> None:
        """`lengths`: of the pieces. `sums`: as in Outgoing.

        `lay(number, piece, digest)`: by any thread; what it raises is raised, and the piece has not come.
        """
        self.sums = sums
        self._lengths = lengths
        self._lay = lay
        self._transport = transport
        self._pieces = Pieces(len(lengths))

    def carry(self, road: socket.socket) -> None:
        """As `Incoming.carry`; raises what `lay` raises."""
        scratch = memoryview(bytearray(max(self._lengths, default=0)))
        region = self._transport.register(scratch)
        number, digest = END, b""

        def place(tag: bytes) -> memoryview:
            nonlocal number, digest
            (announced,), digest = NUMBER.unpack(tag[: NUMBER.size]), tag[NUMBER.size :]
            if announced == END:
                return scratch[:0]
            number = self._pieces.claim(announced)
            return scratch[: self._lengths[number]]

        try:
            receiver = self._transport.receiver(road, region)
            while True:
                number = END
                try:
                    receiver.receive(NUMBER.size + (SUM_BYTES if self.sums else 0), place)
                    if number == END:
                        return
                    self._lay(number, scratch[: self._lengths[number]], digest)
                except BaseException:
                    self._pieces.settle(number, arrived=False)
                    raise
                self._pieces.settle(number, arrived=True)
        finally:
            region.close()

    def have(self) -> tuple[int, ...]:
        """The pieces that have been handed on."""
        return self._pieces.have()

    def stop(self) -> None:
        """Nothing here waits for anything but the connection."""

    def close(self) -> None:
        """Nothing is kept between two hauls."""
