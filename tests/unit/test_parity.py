"""What is laid over each other comes apart again, whatever the sizes; and a piece that is not what was sent is not laid."""

from __future__ import annotations

import random
import socket
import threading

import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from resilient.checkpoint.haul import END, NUMBER, PIECE_BYTES
from resilient.checkpoint.layout import Layout, Row, Twins, padded
from resilient.checkpoint.parity import Content, Fold, Part, decode, lay_over, number_of, span
from resilient.checkpoint.slot import Slot
from resilient.checkpoint.snapshot import HEADER_BYTES, announced_bytes, slot_bytes
from resilient.core.ledger import Copy
from resilient.core.messages import Parity
from resilient.core.rebuild import sources
from resilient.errors import ProtocolError, SnapshotCorrupt


def snapshot(directory, rank: int, size: int) -> bytes:
    path = directory / f"rank-{rank}"
    size = padded(size)
    layout = Layout((Row("w", "uint8", (size,), (0,), (size,)),) if size else (), Twins(rank)).encode()
    path.write_bytes(bytes(slot_bytes(len(layout), 5, size)))
    slot = Slot(str(path))
    view = slot.begin(run="run", rank=rank, world_size=9, round=1, layout=layout, own=b"o" * 5, payload_bytes=size)
    view[:] = random.Random(rank).randbytes(size)
    slot.seal(1)
    slot.stamp_payload()
    copy = slot.header() + bytes(slot.body())
    slot.close()
    return copy


@given(sizes=st.lists(st.integers(0, 30_000), min_size=2, max_size=6), lost=st.integers(0, 5))
@settings(max_examples=40, deadline=None)
def test_any_one_follows_from_the_others(tmp_path_factory, sizes, lost):
    directory = tmp_path_factory.mktemp("parity")
    count, lost = len(sizes), lost % len(sizes)
    held = [snapshot(directory, rank, size) for rank, size in enumerate(sizes)]
    stripes = count - 1

    def stripe(member: int, holder: int) -> bytes:
        begin, end = span(held[member][:HEADER_BYTES], stripes, number_of(member, holder, count))
        return held[member][HEADER_BYTES + begin : HEADER_BYTES + end]

    assert all({number_of(m, h, count) for h in range(count) if h != m} == set(range(stripes)) for m in range(count))
    parities = {}
    for holder in range(count):
        parts = tuple(Part(m, number_of(m, holder, count), held[m][:HEADER_BYTES]) for m in range(count) if m != holder)
        content = Content(stripes, parts)
        assert decode(content.encode(), "here") == content
        assert content.num_bytes() <= max(map(len, held)) / stripes + 4096
        parity = memoryview(bytearray(content.num_bytes()))
        for part in parts:
            lay_over(parity[: len(stripe(part.rank, holder))], memoryview(stripe(part.rank, holder)))
        parities[holder] = bytes(parity)
    found = held[lost][:HEADER_BYTES] + bytes(announced_bytes(held[lost][:HEADER_BYTES]) - HEADER_BYTES)
    body = memoryview(bytearray(found))[HEADER_BYTES:]
    for holder in range(count):
        if holder != lost:
            begin, end = span(held[lost][:HEADER_BYTES], stripes, number_of(lost, holder, count))
            body[begin:end] = parities[holder][: end - begin]
            for other in set(range(count)) - {holder, lost}:
                piece = memoryview(stripe(other, holder))[: end - begin]
                lay_over(body[begin : begin + len(piece)], piece)
    assert body == held[lost][HEADER_BYTES:]


def said(fold: Fold, *words: bytes) -> None:
    near, far = socket.socketpair()
    with near, far:
        speaker = threading.Thread(target=lambda: (near.sendall(b"".join(words)), near.shutdown(socket.SHUT_WR)))
        speaker.start()
        try:
            fold.carry(far)
        finally:
            speaker.join()


def test_a_piece_is_laid_once_and_only_as_it_was_sent():
    data = random.Random(1).randbytes(PIECE_BYTES + 1000)
    below = random.Random(2).randbytes(len(data))
    target = memoryview(bytearray(below))
    fold = Fold(target, threading.Lock())
    end = NUMBER.pack(END) + bytes(16)

    def piece(number: int, flipped: int = 0) -> bytes:
        of = bytearray(data[number * PIECE_BYTES : (number + 1) * PIECE_BYTES])
        tag = NUMBER.pack(number) + xxhash.xxh3_128_digest(of)
        of[7] ^= flipped
        return tag + of

    with pytest.raises(SnapshotCorrupt, match="not what was sent"):
        said(fold, piece(1, flipped=4), end)
    with pytest.raises(EOFError):
        said(fold, piece(0)[:-1])
    assert (bytes(target), fold.have()) == (below, ())
    said(fold, piece(1), end)
    assert fold.have() == (1,)
    with pytest.raises(ProtocolError, match="which is there"):
        said(fold, piece(1), end)
    said(fold, piece(0), end)
    lay_over(target, memoryview(data))
    assert target == below


def test_what_cannot_be_had_is_not_promised():
    copies = {0: (), **{rank: (Copy(node=f"n{rank}", seated=True, snapshots=(1, 2)),) for rank in (1, 2)}}

    def kept(step: int, *parts: tuple[int, int]) -> Parity:
        return Parity(rank=1 << 24, step=step, stripes=2, parts=parts)

    whole = {"n1": (kept(2, (0, 0), (2, 1)), kept(1, (0, 0), (2, 1))), "n2": (kept(2, (0, 1), (1, 0)),)}
    found = sources((0, 1, 2), whole, copies)
    assert found == {0: {2: (((("n1"), 1 << 24), ("n2", 1 << 24)), ((1, "n1"), (2, "n2")))}}
    assert not sources((0, 1, 2), {"n1": whole["n1"], "n2": ()}, copies), "a stripe is nowhere"
    gone = {**copies, 1: (Copy(node="n1", seated=True, snapshots=(3, 4)),)}
    assert not sources((0, 1, 2), whole, gone), "what is in there with it is nowhere"
    assert not sources((0, 1, 2), {"n1": (kept(2, (0, 0), (2, 1)),), "n2": (Parity(rank=0, step=2, stripes=3, parts=((0, 1),)),)}, copies)
