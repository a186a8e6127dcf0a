"""Frames: messages as bytes on a stream.

Think of parcels on a belt: four bytes say how long the next parcel is, then comes the parcel. Who cuts the belt into pieces, and
where, does not matter: `Decoder.feed` takes pieces as they come and gives back the whole messages that they complete.

Contract: pure, no I/O. A frame is a 4-byte big-endian length, then that many bytes: MessagePack, which is one tagged struct of
core/messages.py, and a CRC-32 of it, 4 bytes big-endian. The length is checked against the cap before anything is allocated for it.
Anything else is a ProtocolError; a decoder that has raised one is spent, for nobody knows where the next frame would begin.
Nothing on any wire is ever unpickled: msgspec builds only the types the receiver named.
Rejected: to trust TCP's 16-bit sum (a flipped bit in a recorded collective would have been somebody's weights, one in a handshake a
refusal for good); the digest of the bulk here (a frame is a word, for which a CRC is enough: 0.3 ms of a note of 1 MiB, the largest).
"""

from __future__ import annotations

import struct
import zlib
from typing import Any, Final, Generic, TypeVar

import msgspec

from resilient.core.messages import Msg
from resilient.errors import ProtocolError

HEADER: Final = struct.Struct(">I")
FRAME_BYTES_MAX: Final = 16 << 20  # a report of a 16-GPU node with tracebacks is under 300 KiB; a recorded collective at most 1 MiB
HELLO_BYTES_MAX: Final = 1024  # before the other side has proven itself
_SUM: Final = struct.Struct(">I")

M = TypeVar("M")

_encoder = msgspec.msgpack.Encoder()


def encode(message: Msg) -> bytes:
    """One whole frame. Raises ProtocolError if it would be larger than any receiver takes."""
    body = _encoder.encode(message)
    if len(body) + _SUM.size > FRAME_BYTES_MAX:
        raise ProtocolError(f"frame {type(message).__name__}: at most {FRAME_BYTES_MAX} bytes expected, {len(body)} found", remote=False)
    return b"".join((HEADER.pack(len(body) + _SUM.size), body, _SUM.pack(zlib.crc32(body))))


def body_bytes(header: bytes | bytearray, *, limit: int = FRAME_BYTES_MAX) -> int:
    """How many bytes follow this 4-byte header."""
    length: int = HEADER.unpack(header)[0]
    if not 0 < length <= limit:
        raise ProtocolError(f"frame: 1 to {limit} bytes expected, {length} announced (is this a program of ours?)")
    return length


class Decoder(Generic[M]):
    """Cuts a byte stream into messages of the types in `kind` (one struct, or a union of structs)."""

    def __init__(self, kind: Any, *, limit: int = FRAME_BYTES_MAX) -> None:
        """`limit`: longest body taken, in bytes."""
        self._decoder: msgspec.msgpack.Decoder[M] = msgspec.msgpack.Decoder(kind)
        self._limit = limit
        self._pending = bytearray()

    def feed(self, data: bytes) -> list[M]:
        """Take the next piece of the stream; give the messages that it completes, in order."""
        self._pending += data
        messages: list[M] = []
        start = 0
        while len(self._pending) - start >= HEADER.size:
            length = body_bytes(self._pending[start : start + HEADER.size], limit=self._limit)
            end = start + HEADER.size + length
            if len(self._pending) < end:
                break
            messages.append(self.decode(bytes(self._pending[start + HEADER.size : end])))
            start = end
        del self._pending[:start]
        return messages

    def decode(self, body: bytes) -> M:
        """The message in one frame's body, whose checksum is looked at first."""
        said = memoryview(body)[: -_SUM.size]
        if len(body) <= _SUM.size or zlib.crc32(said) != _SUM.unpack_from(body, len(said))[0]:
            raise ProtocolError(f"frame: {len(body)} bytes that are not what was sent (their checksum is another one)")
        try:
            return self._decoder.decode(said)
        except (msgspec.DecodeError, ValueError, RecursionError) as error:  # ValueError: bad UTF-8 in a string
            raise ProtocolError(f"frame: a known message expected, {len(said)} other bytes found ({error})") from error

    @property
    def pending_bytes(self) -> int:
        """Bytes of a message that has not come whole yet: not 0 at the end of a stream means that it was cut off."""
        return len(self._pending)
