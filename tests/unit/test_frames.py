"""Frames: whatever way a stream is cut, the same messages come out; and anything else is refused without harm."""

from __future__ import annotations

import struct
import zlib

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from resilient.core.messages import Join, Marked, Recorded, Suspect, WorkerUp
from resilient.errors import ProtocolError
from resilient.wire.frames import HEADER, HELLO_BYTES_MAX, Decoder, body_bytes, encode

messages = st.one_of(
    st.builds(Join, worker=st.text(max_size=20), pid=st.integers(0, 2**31), token=st.text(max_size=40)),
    st.builds(Suspect, round=st.integers(0, 1000), text=st.text(max_size=200)),
    st.builds(Recorded, rank=st.integers(0, 9), index=st.integers(0, 99), key=st.text(max_size=9), payload=st.binary(max_size=999)),
    st.builds(Marked, step=st.integers(0, 99), scalars=st.dictionaries(st.text(max_size=5), st.floats(allow_nan=False), max_size=3)),
)


@given(st.lists(messages, max_size=6), st.data())
def test_any_cutting_gives_the_same_messages(sent: list[WorkerUp], data: st.DataObject) -> None:
    stream = b"".join(map(encode, sent))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=8)))
    decoder: Decoder[WorkerUp] = Decoder(WorkerUp)
    came: list[WorkerUp] = []
    for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True):
        came += decoder.feed(stream[start:end])
    assert came == sent
    assert decoder.pending_bytes == 0


@given(st.binary(min_size=1, max_size=300))
def test_garbage_is_a_protocol_error_or_waits_for_more(garbage: bytes) -> None:
    decoder: Decoder[WorkerUp] = Decoder(WorkerUp, limit=HELLO_BYTES_MAX)
    try:
        came = decoder.feed(garbage)
    except ProtocolError as error:
        assert error.remote
        return
    assert came == []  # random bytes are no tagged struct of ours
    assert decoder.pending_bytes == len(garbage)


def test_the_length_is_checked_before_anything_comes() -> None:
    decoder: Decoder[WorkerUp] = Decoder(WorkerUp, limit=100)
    with pytest.raises(ProtocolError, match="1 to 100 bytes expected, 4294967295 announced"):
        decoder.feed(HEADER.pack(0xFFFF_FFFF))


def test_an_empty_frame_is_refused() -> None:
    with pytest.raises(ProtocolError):
        body_bytes(HEADER.pack(0))


def test_http_on_our_port_is_refused_with_a_hint() -> None:
    decoder: Decoder[WorkerUp] = Decoder(WorkerUp)
    with pytest.raises(ProtocolError, match="a program of ours"):
        decoder.feed(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")


def test_a_known_frame_of_an_unwanted_type_is_refused() -> None:
    decoder: Decoder[Join] = Decoder(Join)
    with pytest.raises(ProtocolError):
        decoder.feed(encode(Suspect(round=1, text="")))


@pytest.mark.parametrize(
    "body", [b"\xc1", b"\xdb\xff\xff\xff\xff", b"\x91" * 900, msgspec.msgpack.encode({"type": "Join"}), b"\xa2\xff\xfe"]
)
def test_broken_messagepack_is_a_protocol_error(body: bytes) -> None:
    decoder: Decoder[WorkerUp] = Decoder(WorkerUp)
    with pytest.raises(ProtocolError, match="a known message expected"):
        decoder.feed(HEADER.pack(len(body) + 4) + body + struct.pack(">I", zlib.crc32(body)))


@given(messages, st.data())
def test_a_damaged_frame_is_never_taken_for_a_message(sent: WorkerUp, data: st.DataObject) -> None:
    """Any bit of it flipped: an error, or it waits for bytes that a length too large announces. Cut anywhere: it waits."""
    frame = bytearray(encode(sent))
    bit = data.draw(st.integers(0, 8 * len(frame) - 1))
    frame[bit // 8] ^= 1 << bit % 8
    decoder: Decoder[WorkerUp] = Decoder(WorkerUp)
    try:
        came = decoder.feed(bytes(frame))
    except ProtocolError:
        return
    assert came == []
    assert bit < 8 * HEADER.size, "only of a length that has grown is more expected"


def test_a_message_too_large_for_any_receiver_is_our_own_fault() -> None:
    huge = Recorded(rank=0, index=0, key="", payload=bytes(17 << 20))
    with pytest.raises(ProtocolError) as caught:
        encode(huge)
    assert not caught.value.remote
