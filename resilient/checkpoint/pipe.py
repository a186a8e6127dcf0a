"""Pipe: a proven connection between two vaults that carries frames and, between them, bulk bytes.

Think of a mail train with a goods wagon: letters say what is in the wagon; the wagon itself is loaded and unloaded straight at the shelf.

Contract: taken over from a Link after its handshake. Frames are at most 4 MiB; bulk goes from and to the caller's memory by
`sock_sendall` and `sock_recv_into`, without a buffer of ours. Every wait has a deadline that grows with the bytes.
Numbers: plain TCP over loopback carries 2.4 - 3.1 GB/s, one core at each side.
Rejected: asyncio streams for the bulk (one copy more, a third of the speed); a thread per connection (idle peers would hold threads).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from typing import TYPE_CHECKING, Any, Final

from resilient.checkpoint.tier import Kind
from resilient.core.messages import Msg, Recorded
from resilient.wire.frames import HEADER, Decoder, body_bytes, encode

if TYPE_CHECKING:
    from resilient.wire.link import Link

FRAME_BYTES_MAX: Final = 4 << 20  # the largest is a Note: a recorded collective of at most 1 MiB
ANSWER_S: Final = 10.0  # for a word without bulk
PACE_BYTES_S: Final = 20 << 20  # slower than this counts as hung


# --------------------------------------------------------------------------- what is said


class Put(Msg, frozen=True):
    """Here comes a snapshot."""

    rank: int
    step: int
    kind: Kind
    header: bytes


class Get(Msg, frozen=True):
    """Send this snapshot."""

    rank: int
    step: int
    kind: Kind


class Drop(Msg, frozen=True):
    """Forget this snapshot."""

    rank: int
    step: int
    kind: Kind


class Catalogue(Msg, frozen=True):
    """Say what is there."""


class Listed(Msg, frozen=True):
    """What is there: (rank, step, kind)."""

    keys: tuple[tuple[int, int, Kind], ...]


class Ready(Msg, frozen=True):
    """Send the bytes."""


class Found(Msg, frozen=True):
    """The bytes follow."""

    header: bytes


class Done(Msg, frozen=True):
    """It has been done, and checked."""


class Failed(Msg, frozen=True):
    """It has not: an error of the sender's tier."""

    error: str
    text: str


class Note(Msg, frozen=True):
    """Keep this beside the rank's state; also the answer to Recollect, one for each, then Done."""

    recorded: Recorded


class Recollect(Msg, frozen=True):
    """Send all notes of this rank."""

    rank: int


Request = Put | Get | Drop | Catalogue | Note | Recollect
Answer = Ready | Found | Done | Failed | Listed | Note


# --------------------------------------------------------------------------- how it travels


class Pipe:
    """A proven connection, taken over from its Link: frames and, between them, bulk bytes straight from and to memory."""

    def __init__(self, link: Link, kind: Any) -> None:
        """Must follow the handshake without an await in between, so that no byte is left in the link's own buffer."""
        raw: socket.socket = link.writer.get_extra_info("socket")
        self.name = link.name
        self._socket = socket.socket(fileno=os.dup(raw.fileno()))
        self._socket.settimeout(0)  # never block: the event loop does the waiting
        self._decoder: Decoder[Any] = Decoder(kind, limit=FRAME_BYTES_MAX)
        link.writer.close()  # flushes the handshake and closes its own descriptor; ours keeps the connection

    def close(self) -> None:
        """Close at once."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def is_closed(self) -> bool:
        """The other side has closed (or said something that nobody asked for)."""
        try:
            self._socket.recv(1, socket.MSG_PEEK)
        except BlockingIOError:
            return False
        except OSError:
            return True
        return True

    async def send(self, message: Msg) -> None:
        """A frame. Raises TimeoutError, OSError."""
        await self.send_bulk(memoryview(encode(message)))

    async def send_bulk(self, view: memoryview) -> None:
        """Bytes between frames. Raises as `send`."""
        async with asyncio.timeout(allowed_s(len(view))):
            await asyncio.get_running_loop().sock_sendall(self._socket, view)

    async def recv(self, timeout_s: float) -> Any:
        """The next frame. Raises EOFError at the end, TimeoutError, OSError, ProtocolError."""
        async with asyncio.timeout(timeout_s):
            length = body_bytes(await self._exactly(HEADER.size), limit=FRAME_BYTES_MAX)
            return self._decoder.decode(await self._exactly(length))

    async def recv_bulk(self, view: memoryview) -> None:
        """Fill `view`. Raises as `recv`."""
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(allowed_s(len(view))):
            done = 0
            while done < len(view):
                count = await loop.sock_recv_into(self._socket, view[done:])
                if count == 0:
                    raise EOFError
                done += count

    async def _exactly(self, num_bytes: int) -> bytes:
        data = bytearray(num_bytes)
        await self.recv_bulk(memoryview(data))
        return bytes(data)


def allowed_s(num_bytes: int) -> float:
    """How long a wait for so many bytes, or for work on them, may take."""
    return ANSWER_S + num_bytes / PACE_BYTES_S
