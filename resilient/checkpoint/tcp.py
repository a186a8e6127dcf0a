"""TCP: the transport that is always there.

Think of carts on the road that leads past both barns: the bytes go by the connection itself.

Contract: as in transport.py. On the connection go, for each piece, its tag and its bytes, from and to mapped memory by `send` and
`recv_into`, without the GIL and without a buffer of ours. Nothing has to be registered.
Rejected: `sendfile` from the segment (over loopback a quarter slower than `send`, and it gives out pages that may change before they
leave); the event loop's `sock_sendall` (a wake-up of the loop for each socket buffer, in the thread that has to look at the workers);
`sendmsg` of tag and bytes together (Python would have to look after what it leaves; MSG_MORE puts both into one segment as well).
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from resilient.checkpoint import transport

_GRAIN_BYTES: Final = 256 << 10  # what is sent between two looks at the pace


@dataclass(frozen=True)
class Plain:
    """Memory as it is."""

    memory: memoryview

    def close(self) -> None:
        """Nothing to be undone: who writes there does so in its own `receive`."""


class Tcp:
    """See the head of this file."""

    name = "tcp"

    def register(self, memory: memoryview) -> Plain:
        """As `Transport.register`."""
        return Plain(memory)

    def sender(self, road: socket.socket, region: transport.Region) -> TcpSender:
        """As `Transport.sender`."""
        prepare(road)
        return TcpSender(road, region.memory)

    def receiver(self, road: socket.socket, region: transport.Region) -> TcpReceiver:  # noqa: ARG002 - `place` gives parts of it
        """As `Transport.receiver`."""
        prepare(road)
        return TcpReceiver(road)


class TcpSender:
    """As `Sender`."""

    def __init__(self, road: socket.socket, memory: memoryview) -> None:
        """`road`: prepared."""
        self._road = road
        self._memory = memory

    def send(self, tag: bytes, begin: int, end: int, pace: Callable[[int], None] | None = None) -> None:
        """As `Sender.send`."""
        try:
            self._road.sendall(tag, socket.MSG_MORE if begin < end else 0)
            if pace is None:
                self._road.sendall(self._memory[begin:end])
                return
            for start in range(begin, end, _GRAIN_BYTES):
                grain = self._memory[start : min(start + _GRAIN_BYTES, end)]
                pace(len(grain))
                self._road.sendall(grain)
        except BlockingIOError:
            raise _stalled() from None

    def finish(self, tag: bytes) -> None:
        """As `Sender.finish`."""
        self.send(tag, 0, 0)


class TcpReceiver:
    """As `Receiver`."""

    def __init__(self, road: socket.socket) -> None:
        """`road`: prepared."""
        self._road = road

    def receive(self, tag_bytes: int, place: Callable[[bytes], memoryview]) -> bytes:
        """As `Receiver.receive`."""
        tag = bytearray(tag_bytes)
        try:
            self._fill(memoryview(tag))
            self._fill(place(bytes(tag)))
        except BlockingIOError:
            raise _stalled() from None
        return bytes(tag)

    def _fill(self, view: memoryview) -> None:
        while view:
            count = self._road.recv_into(view, 0, socket.MSG_WAITALL)
            if count == 0:
                raise EOFError
            view = view[count:]


def prepare(road: socket.socket) -> None:
    """Make the socket one that blocks, and each wait of it end after STALL_S."""
    road.settimeout(None)
    patience = struct.pack("ll", int(transport.STALL_S), int(transport.STALL_S % 1 * 1e6))
    road.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, patience)
    road.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, patience)


def _stalled() -> TimeoutError:
    return TimeoutError(f"no byte moved for {transport.STALL_S:.0f} s")
