"""Pipe: a proven connection between two vaults that carries frames and, between them, bulk bytes.

Think of a mail train with a goods wagon: letters say what is in the wagon; the wagon itself is loaded and unloaded straight at the shelf.

Contract: taken over from a Link after its handshake. Frames are at most 4 MiB; a few bytes of bulk go from and to the caller's memory
by `sock_sendall` and `sock_recv_into`, without a buffer of ours; many are a haul (haul.py): for its time the connection is lent to a
thread. Every wait has a deadline that grows with the bytes. A Caller keeps one connection and opens it anew when it has to.
Rejected: asyncio streams for the bulk (one copy more, a third of the speed); a thread per connection (idle peers would hold threads).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Executor
from typing import Any, Final

from resilient.checkpoint.tier import Kind
from resilient.core.messages import Msg, Recorded
from resilient.errors import ProtocolError, TierUnavailable
from resilient.wire.frames import HEADER, Decoder, body_bytes, encode
from resilient.wire.link import Link, connect

FRAME_BYTES_MAX: Final = 4 << 20  # the largest is a Note: a recorded collective of at most 1 MiB
ANSWER_S: Final = 10.0  # for a word without bulk
PACE_BYTES_S: Final = 20 << 20  # slower than this counts as hung


# --------------------------------------------------------------------------- what is said


class Put(Msg, frozen=True):
    """Here comes a snapshot: on this connection, or over so many others."""

    rank: int
    step: int
    kind: Kind
    header: bytes
    streams: int = 0
    room: int = 0  # what its owner has for each of its snapshots: those that follow will fit as well


class Get(Msg, frozen=True):
    """Send this snapshot: on this connection, or, if it is large, over so many others."""

    rank: int
    step: int
    kind: Kind
    streams: int = 0
    header: bytes = b""  # of a transfer that broke off: if it is the same snapshot still, go on with what is missing
    have: tuple[int, ...] = ()
    world_size: int = 0  # of the world that sealed it, 0 = of any
    head: bool = False  # nothing but the head
    leaves: bool = False  # nothing but the digests by which its pieces can be checked (tally.py), of the snapshot with this header
    parts: tuple[tuple[int, int], ...] = ()  # these pieces of the body (begin, end), of the snapshot with this header
    sums: bool = False  # each of them with its digest
    limited: bool = False  # by what the sender may send to keep copies elsewhere


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
    """Send the bytes: here, or as this haul, without the pieces that are there from a transfer that broke off."""

    haul: bytes = b""
    have: tuple[int, ...] = ()


class Found(Msg, frozen=True):
    """The bytes follow: here, or as this haul."""

    header: bytes
    haul: bytes = b""
    room: int = 0  # as in Put
    num_bytes: int = 0  # that follow, if head or leaves were all that was asked for


class Carry(Msg, frozen=True):
    """From here on this connection carries pieces of that haul, until their END."""

    haul: bytes
    transport: str = "tcp"  # by which; both ends have to have been given the same


class Hauled(Msg, frozen=True):
    """All connections of the haul have come to their END at the caller's side."""


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


class Offer(Msg, frozen=True):
    """A rank's snapshot is sealed at its own node: a stripe of it may be fetched for parity."""

    rank: int
    step: int
    header: bytes
    vault: str  # where


class Covered(Msg, frozen=True):
    """The stripe of that rank's snapshot is in the parity that the node at this address keeps, and that parity is sealed."""

    rank: int
    step: int
    keeper: str


class Digests(Msg, frozen=True):
    """Send the sheet (checkpoint/replicas.py) that has this digest."""

    digest: str


class Following(Msg, frozen=True):
    """It follows: so many bytes."""

    num_bytes: int


Request = Put | Get | Drop | Catalogue | Note | Recollect | Carry | Hauled | Offer | Covered | Digests
Answer = Ready | Found | Done | Failed | Listed | Note | Following


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
        self.shut()
        self._socket.close()

    def shut(self) -> None:
        """End it for whoever uses it, in this thread or another."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

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
        async with asyncio.timeout(allowed_s(len(view))):
            await self._fill(view)

    async def lend(self, work: Callable[[socket.socket], None], threads: Executor) -> None:
        """`work(socket)` in a thread: the connection is the transport's for that time. When this has ended, so has the thread.

        Raises what the work raises. Cancelled, it ends the connection, and so the work.
        """
        future = asyncio.get_running_loop().run_in_executor(threads, work, self._socket)
        try:
            await asyncio.shield(future)
        except asyncio.CancelledError:
            self.shut()
            while not future.done():  # soon: the longest thing that the thread still does is to hash a piece
                with contextlib.suppress(asyncio.CancelledError):  # once more makes no difference
                    await asyncio.wait({future})
            if not future.cancelled():
                future.exception()  # it has been seen
            raise
        finally:
            self._socket.settimeout(0)

    async def _exactly(self, num_bytes: int) -> bytes:
        data = bytearray(num_bytes)
        await self._fill(memoryview(data))
        return bytes(data)

    async def _fill(self, view: memoryview) -> None:
        loop = asyncio.get_running_loop()
        done = 0
        while done < len(view):
            count = await loop.sock_recv_into(self._socket, view[done:])
            if count == 0:
                raise EOFError
            done += count


class Caller:
    """One connection to a vault, opened when it is needed and kept. One conversation at a time."""

    def __init__(self, address: str, *, token: str, run: str, name: str) -> None:
        """`address`: host:port. `name`: who we are, for the other side's log."""
        self._address = address
        self._token, self._run, self._name = token, run, name
        self._pipe: Pipe | None = None
        self._turn = asyncio.Lock()

    @contextlib.asynccontextmanager
    async def conversation(self) -> AsyncIterator[Pipe]:
        """Whatever goes wrong within, the connection is closed: nobody knows what is still on it. Raises TierUnavailable."""
        async with self._turn:
            try:
                if self._pipe is None or self._pipe.is_closed():
                    self.close()
                    host, _, port = self._address.rpartition(":")
                    link = await connect(host, int(port), Answer, token=self._token, run=self._run, name=self._name)
                    self._pipe = Pipe(link, Answer)
                yield self._pipe
            except (OSError, EOFError, ProtocolError, ValueError) as error:  # TimeoutError is an OSError; ValueError: the address
                self.close()
                raise TierUnavailable(f"peer {self._address}: {str(error) or type(error).__name__}") from error
            except BaseException:
                self.close()
                raise

    def close(self) -> None:
        """Close the connection; the next conversation opens another."""
        if self._pipe is not None:
            self._pipe.close()
            self._pipe = None


def allowed_s(num_bytes: int) -> float:
    """How long a wait for so many bytes, or for work on them, may take."""
    return ANSWER_S + num_bytes / PACE_BYTES_S
