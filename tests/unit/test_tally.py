"""The digest of a payload: the same however it is cut, and of nothing but what the layout describes."""

from __future__ import annotations

import os
import random

import pytest
import xxhash

from resilient.checkpoint import tally
from resilient.checkpoint.layout import Layout, Row, padded
from resilient.checkpoint.slot import Slot
from resilient.checkpoint.snapshot import slot_bytes
from resilient.checkpoint.tally import Tally, payload_digest, piece_digest, tensor_digest
from resilient.errors import SnapshotCorrupt

SIZES = (7, 0, 300, 256, 257, 64, 64, 0, 5000, 1, 512, 0)


def described(sizes, dtype: str = "uint8") -> bytes:
    return Layout(tuple(Row(str(number), dtype, (size,), (0,), (size,)) for number, size in enumerate(sizes))).encode()


def payload() -> bytearray:
    return bytearray(b"".join(os.urandom(size).ljust(padded(size), b"\0") for size in SIZES))


@pytest.mark.parametrize("piece", [64, 256, 1024, 4 << 20])
def test_every_tensor_has_its_own_digest_in_whatever_order_parts_come(monkeypatch, piece):
    monkeypatch.setattr(tally, "PIECE", piece)
    data = memoryview(payload())
    found = Tally(described(SIZES), len(data))
    assert [part.begin for part in found.parts[1:]] == [part.end for part in found.parts[:-1]]
    assert (found.parts[0].begin, found.parts[-1].end) == (0, len(data))
    assert all(part.end - part.begin <= max(piece, padded(piece)) for part in found.parts)
    for part in random.Random(1).sample(found.parts, len(found.parts)):
        found.add(part, data[part.begin : part.end])
    assert found.rows() == tuple(tensor_digest(data[at : at + length]) for at, length in found.places)
    assert found.digest() == xxhash.xxh3_128_digest(b"".join(found.rows()))
    assert found.digest() == payload_digest(described(SIZES), data, threads=3)


@pytest.mark.parametrize("piece", [64, 256, 4 << 20])
def test_the_leaves_stand_for_the_payload_and_each_for_its_piece(monkeypatch, piece):
    monkeypatch.setattr(tally, "PIECE", piece)
    data = memoryview(payload())
    looked, told = Tally(described(SIZES), len(data)), Tally(described(SIZES), len(data))
    looked.add_all(data)
    told.take(looked.leaves())
    assert told.digest() == looked.digest() == payload_digest(described(SIZES), data)
    for number, (at, length) in enumerate(told.places):
        found = told.pieces(number)
        assert [end - begin for begin, end, _ in found] == [min(piece, length - start) for start in range(0, length, piece)] or not length
        assert all(piece_digest(data[at + begin : at + end]) == digest for begin, end, digest in found)
    wrong = bytearray(looked.leaves())
    wrong[40] ^= 1
    told.take(bytes(wrong))
    assert told.digest() != looked.digest()
    with pytest.raises(SnapshotCorrupt, match="bytes of digests expected"):
        told.take(looked.leaves()[:-16])


def test_a_small_tensor_has_the_plain_digest_of_its_memory():
    assert tensor_digest(memoryview(b"tensor")) == xxhash.xxh3_128_digest(b"tensor")


def test_threads_share_a_large_tensor():
    data = memoryview(bytearray(os.urandom(5 * tally.PIECE + 64)))
    assert payload_digest(b"", data, threads=2) == payload_digest(b"", data) == xxhash.xxh3_128_digest(tensor_digest(data))


def test_a_gap_that_is_not_zero_is_seen():
    data = payload()
    good = payload_digest(described(SIZES), memoryview(data))
    data[63] = 1  # behind the first tensor
    assert payload_digest(described(SIZES), memoryview(data)) != good


@pytest.mark.parametrize("layout", [b"none", b"\xc1", described([100]), described([-64, 192]), described([64], "float99"), described([])])
def test_a_layout_of_something_else_is_refused(layout):
    with pytest.raises(SnapshotCorrupt, match="layout"):
        Tally(layout, 192)


def test_what_an_earlier_payload_left_between_tensors_is_wiped(tmp_path):
    path = tmp_path / "slot"
    path.write_bytes(b"?" * slot_bytes(500, 0, 10_000))
    slot = Slot(str(path))
    for step, sizes in enumerate(((64, 64), (1, 63), (1, 63), (0, 128), (0, 3, 65))):
        room = sum(map(padded, sizes))
        view = slot.begin(run="run", rank=0, world_size=1, round=1, layout=described(sizes), own=b"", payload_bytes=room)
        for at, length in Tally(described(sizes), room).places:
            view[at : at + length] = b"x" * length
        slot.seal(step)
        expected = b"".join((b"x" * size).ljust(padded(size), b"\0") for size in sizes)
        slot.stamp_payload()
        assert bytes(slot.read(stamped=True).payload) == expected
        del view
    slot.close()
