"""Links: connections whose two ends have proven that they hold the run's token.

Think of two guards at a gate. Each calls out a number nobody has heard before; the other answers with a seal that only a holder of
the token can put on both numbers. The token itself never crosses the wire, and an answer overheard opens nothing the next time.

    connecting side                      accepting side
    Hello(name, nonce)           ->
                                 <-      Challenge(nonce)
    Proof(mac)                   ->
                                 <-      Welcome(mac)   or Refusal(reason), then closed

Contract: both sides end with a `Link`, or with a ProtocolError that says "wrong token" where that is the reason. Until then a
frame is at most 1 KiB and the whole handshake has one deadline. Comparison is constant-time. What follows is not encrypted:
docs/protocol.md says what somebody on the same network can still do.
`AgentLine` is the worker's end of the Unix socket to its agent: plain blocking calls, for a process that runs no event loop; its
token goes in `Join`, because only the same user can open the socket (0600).
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import secrets
import select
import socket
import threading
import time
from typing import Any, Final

from resilient.core.messages import Msg, WorkerDown
from resilient.errors import ProtocolError
from resilient.wire.frames import FRAME_BYTES_MAX, HEADER, HELLO_BYTES_MAX, Decoder, body_bytes, encode

VERSION: Final = 2  # of the frames: their checksum came with 2
HANDSHAKE_S: Final = 10.0  # 9,500 TLS handshakes took 14.5 s after a fail-over; without TLS 12,500 took 2 s
KEEPALIVE_S, KEEPALIVES = 2, 5  # ten seconds without an answer of the other machine's kernel
BACKLOG_BYTES_MAX: Final = 64 << 20  # unsent bytes after which the other side counts as gone


class RefusedError(ProtocolError):
    """The other side is one of ours and does not want us: wrong token, another run, another version. Waiting changes nothing."""


class Hello(Msg):
    """First words of the connecting side."""

    version: int
    run: str
    name: str  # who calls, for the log and for routing: a node's name, "vault", ...
    nonce: bytes


class Challenge(Msg):
    """The accepting side's own number."""

    nonce: bytes


class Proof(Msg):
    """The connecting side holds the token."""

    mac: bytes


class Welcome(Msg):
    """So does the accepting side."""

    mac: bytes


class Refusal(Msg):
    """The accepting side will not talk."""

    reason: str


_First = Decoder[Hello](Hello, limit=HELLO_BYTES_MAX)
_Second = Decoder[Challenge | Refusal](Challenge | Refusal, limit=HELLO_BYTES_MAX)
_Third = Decoder[Proof](Proof, limit=HELLO_BYTES_MAX)
_Fourth = Decoder[Welcome | Refusal](Welcome | Refusal, limit=HELLO_BYTES_MAX)


def _mac(token: str, side: bytes, hello: Hello, nonce: bytes) -> bytes:
    """The seal that `side` puts on both numbers and on all that was said."""
    said = encode(hello) + nonce
    return hmac.new(token.encode(), side + b"\0" + said, hashlib.sha256).digest()


class Link:
    """One authenticated connection carrying frames; owns `reader` and `writer`, which may carry bulk bytes between frames."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, kind: Any, name: str) -> None:
        """`kind`: the messages that may come in. `name`: who is at the other end, as they said."""
        self.reader = reader
        self.writer = writer
        self.name = name
        self._decoder: Decoder[Any] = Decoder(kind)

    async def recv(self) -> Any:
        """The next message; None when the other side has closed or is gone. Raises ProtocolError for anything else."""
        try:
            return await _read(self.reader, self._decoder)
        except (OSError, EOFError):
            return None

    def send(self, message: Msg) -> None:
        """Hand `message` to the operating system soon. A link whose other end does not read is closed."""
        self.send_bytes(encode(message))

    def send_bytes(self, frame: bytes) -> None:
        """The same for a frame that was encoded before (one to many)."""
        if self.writer.is_closing():
            return
        if self.writer.transport.get_write_buffer_size() + len(frame) > BACKLOG_BYTES_MAX:
            self.writer.transport.abort()
            return
        self.writer.write(frame)

    async def close(self) -> None:
        """Send what is buffered, then close; gives up after a second."""
        await _close(self.writer)


async def _close(writer: asyncio.StreamWriter) -> None:
    writer.close()
    with contextlib.suppress(OSError, TimeoutError):
        async with asyncio.timeout(1.0):
            await writer.wait_closed()
            return
    writer.transport.abort()


async def _read(reader: asyncio.StreamReader, decoder: Decoder[Any], limit: int = FRAME_BYTES_MAX) -> Any:
    """One frame. Raises EOFError (IncompleteReadError) if the other side closed."""
    length = body_bytes(await reader.readexactly(HEADER.size), limit=limit)
    return decoder.decode(await reader.readexactly(length))


async def connect(host: str, port: int, kind: Any, *, token: str, run: str, name: str, timeout_s: float = HANDSHAKE_S) -> Link:
    """Connect and prove each other. Raises OSError if nobody answers, ProtocolError if somebody else does."""
    where = f"{host}:{port}"
    async with asyncio.timeout(timeout_s):
        reader, writer = await asyncio.open_connection(host, port)
        try:
            hello = Hello(version=VERSION, run=run, name=name, nonce=secrets.token_bytes(16))
            writer.write(encode(hello))
            challenge = _unless_refused(await _read(reader, _Second, HELLO_BYTES_MAX), where)
            writer.write(encode(Proof(mac=_mac(token, b"connecting", hello, challenge.nonce))))
            welcome = _unless_refused(await _read(reader, _Fourth, HELLO_BYTES_MAX), where)
            if not hmac.compare_digest(welcome.mac, _mac(token, b"accepting", hello, challenge.nonce)):
                raise RefusedError(f"link to {where}: wrong token (the other side does not hold ours)")
        except EOFError as error:
            await _close(writer)
            raise ProtocolError(f"link to {where}: a handshake expected, the connection was closed (is this a program of ours?)") from error
        except BaseException:
            writer.transport.abort()
            raise
    _no_delay(writer)
    return Link(reader, writer, kind, where)


def _unless_refused(answer: Any, where: str) -> Any:
    if isinstance(answer, Refusal):
        raise RefusedError(f"link to {where}: {answer.reason}")
    return answer


async def accept(
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    kind: Any,
    *,
    token: str,
    run: str,
    timeout_s: float = HANDSHAKE_S,
) -> Link:
    """Let the other side prove itself. On anything else: the connection is closed and ProtocolError raised, in one line."""
    peer = writer.get_extra_info("peername")
    where = f"{peer[0]}:{peer[1]}" if isinstance(peer, tuple) else "a local socket"
    try:
        async with asyncio.timeout(timeout_s):
            hello = await _read(reader, _First, HELLO_BYTES_MAX)
            _refuse_unless(hello.version == VERSION, f"protocol version {VERSION} expected, {hello.version} found")
            _refuse_unless(hello.run == run, f"run id {run!r} expected, {hello.run!r} found")
            nonce = secrets.token_bytes(16)
            writer.write(encode(Challenge(nonce=nonce)))
            proof = await _read(reader, _Third, HELLO_BYTES_MAX)
            expected = _mac(token, b"connecting", hello, nonce)
            _refuse_unless(hmac.compare_digest(proof.mac, expected), "wrong token")
            writer.write(encode(Welcome(mac=_mac(token, b"accepting", hello, nonce))))
    except _Refused as error:
        with contextlib.suppress(ProtocolError):
            writer.write(encode(Refusal(reason=str(error))))
        await _close(writer)
        raise ProtocolError(f"link from {where}: {error}") from None
    except (ProtocolError, OSError, EOFError) as error:  # TimeoutError is an OSError
        writer.transport.abort()
        reason = str(error) if isinstance(error, ProtocolError) else f"no handshake ({type(error).__name__})"
        raise ProtocolError(f"link from {where}: {reason}") from None
    _no_delay(writer)
    return Link(reader, writer, kind, hello.name)


class _Refused(Exception):
    pass


def _refuse_unless(fine: bool, reason: str) -> None:  # noqa: FBT001
    if not fine:
        raise _Refused(reason[:200])


def _no_delay(writer: asyncio.StreamWriter) -> None:
    raw = writer.get_extra_info("socket")
    if raw is not None and raw.family in (socket.AF_INET, socket.AF_INET6):
        raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # A machine that lost its power says nothing; its silence is found by the kernel, however rarely it would have spoken.
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, KEEPALIVE_S)
        raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, KEEPALIVE_S)
        raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, KEEPALIVES)
        raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1000 * KEEPALIVE_S * KEEPALIVES)


class AgentLine:
    """The worker's end of the socket to its agent.

    Thread-safety: any thread may `send`; one thread calls `recv`. After a fork only the parent may use it.
    """

    def __init__(self, raw: socket.socket, kind: Any = WorkerDown) -> None:
        """Take over a connected socket; `connect` makes one. `kind`: what may come in."""
        self._socket = raw
        self._sending = threading.Lock()
        self._receiving = threading.RLock()
        self._decoder: Decoder[Any] = Decoder(kind)
        self._ready: list[Any] = []
        self._closed = threading.Event()

    @classmethod
    def connect(cls, path: str, *, kind: Any = WorkerDown, timeout_s: float = 10.0) -> AgentLine:
        """Connect to the agent's socket at `path`. Raises OSError if nobody listens there."""
        raw = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        raw.settimeout(timeout_s)
        try:
            raw.connect(path)
        except OSError:
            raw.close()
            raise
        raw.settimeout(30.0)  # of a send: the agent's loop never blocks for a second; one that long is dead
        return cls(raw, kind)

    @property
    def closed(self) -> bool:
        """The agent is gone, or `close` was called."""
        return self._closed.is_set()

    def send(self, message: Msg) -> None:
        """Send now. Raises ConnectionError if the agent is gone."""
        frame = encode(message)
        with self._sending:
            if self.closed:
                raise ConnectionError("the line to the agent is closed")
            try:
                self._socket.sendall(frame)
            except OSError as error:  # also a timeout: part of a frame may be out, nothing can follow it
                self.close()
                raise ConnectionError(f"the line to the agent broke: {error}") from error

    def recv(self, timeout_s: float | None = None) -> Any:
        """The next message; None if none came in `timeout_s` (None: for ever) or the line closed (`closed` tells which)."""
        until = None if timeout_s is None else time.monotonic() + timeout_s
        with self._receiving:
            while not self._ready:
                if self.closed or not self._readable(until):
                    return None
                try:
                    data = self._socket.recv(1 << 16)
                except OSError:  # reset
                    data = b""
                if not data:
                    self.close()
                    return None
                self._ready = self._decoder.feed(data)
            return self._ready.pop(0)

    def _readable(self, until: float | None) -> bool:
        """Wait for bytes; another thread's `close` shuts the socket and so ends the wait."""
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        left_ms = None if until is None else max(0, (until - time.monotonic()) * 1000)
        return bool(poll.poll(left_ms))

    def close(self) -> None:
        """End both directions; a `recv` under way in another thread returns None. May be called again."""
        if not self._closed.is_set():
            self._closed.set()
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)
            with self._receiving:  # a descriptor is never closed under a thread that waits on it
                self._socket.close()
