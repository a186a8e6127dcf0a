"""A snapshot cut from those of a world of another size: every element where it belongs, and nothing of what is damaged."""

from __future__ import annotations

import random

import numpy as np
import pytest

from resilient.checkpoint.layout import Layout, Row, Twins
from resilient.checkpoint.recut import Held, recut
from resilient.checkpoint.reshape import Cut, overlap, stretch
from resilient.checkpoint.ring import Ring
from resilient.checkpoint.slot import Slot
from resilient.checkpoint.snapshot import slot_bytes
from resilient.errors import SnapshotCorrupt, SnapshotMissing

WHOLE = {"model.w": np.arange(11 * 3, dtype="float32").reshape(11, 3), "model.b": np.arange(5, dtype="float32")}


def described(rank: int, world_size: int) -> Layout:
    """As FSDP2 splits: in pieces of the first dimension, the last ones short or empty."""
    rows = []
    for key, whole in WHOLE.items():
        share = -(-len(whole) // world_size)
        begin, end = (min(share * i, len(whole)) for i in (rank, rank + 1))
        rows.append(Row(key, "float32", whole.shape, (begin, *(0,) * (whole.ndim - 1)), (end - begin, *whole.shape[1:])))
    return Layout(tuple(rows), Twins(rank))


def part(key: str, row: Row) -> np.ndarray:
    return WHOLE[key][row.offsets[0] : row.offsets[0] + row.local[0]]


def slot_of(directory, rank: int, world_size: int) -> Slot:
    """A sealed snapshot of step 6, hashed."""
    path, rows = directory / f"old-{rank}", described(rank, world_size)
    payload_bytes = sum(length + -length % 64 for _, length in rows.places())
    path.write_bytes(bytes(slot_bytes(len(rows.encode()), 5, payload_bytes)))
    slot, own = Slot(str(path)), b"own %d" % rank
    view = slot.begin(run="run", rank=rank, world_size=world_size, round=1, layout=rows.encode(), own=own, payload_bytes=payload_bytes)
    for row, (begin, length) in zip(rows.rows, rows.places(), strict=True):
        view[begin : begin + length] = part(row.key, row).tobytes()
    del view
    slot.seal(6)
    slot.stamp_payload()
    return slot


def held(slots: dict[int, Slot]) -> dict[int, Held]:
    return {rank: Held(slot, run="run", rank=rank, step=6) for rank, slot in slots.items()}


def room(directory):
    def made(num_bytes: int) -> Ring:
        path = directory / "new"
        path.write_bytes(bytes(num_bytes))
        return Ring.open([str(path)])

    return made


@pytest.mark.parametrize(("before", "after"), [(4, 2), (2, 4), (3, 4), (4, 3), (1, 5), (6, 1)])
def test_every_element_is_where_it_belongs(tmp_path, before, after):
    sources = {rank: slot_of(tmp_path, rank, before) for rank in range(before)}
    for rank in range(after):
        wanted = described(rank, after)
        assert recut(held(sources), wanted, room(tmp_path), run="run", rank=rank, world_size=after, step=6) == rank % before
        slot = Slot(str(tmp_path / "new"))
        found = slot.read(run="run", rank=rank, step=6)
        assert (found.world_size, found.own) == (after, b"own %d" % (rank % before))
        for row, (begin, length) in zip(wanted.rows, wanted.places(), strict=True):
            assert bytes(found.payload[begin : begin + length]) == part(row.key, row).tobytes()


def test_nothing_damaged_or_missing_is_used(tmp_path):
    sources = {rank: slot_of(tmp_path, rank, 3) for rank in range(3)}
    words = {"run": "run", "rank": 0, "world_size": 1, "step": 6}
    with pytest.raises(SnapshotMissing, match=r"elements of model\.[wb] are in no rank's memory"):
        recut(held({rank: sources[rank] for rank in range(2)}), described(0, 1), room(tmp_path), **words)
    sources[1].memory[-60] ^= 1
    with pytest.raises(SnapshotCorrupt, match="rank=1"):
        recut(held(sources), described(0, 1), room(tmp_path), **words)
    assert Slot(str(tmp_path / "new")).sealed_step() == -1


@pytest.mark.parametrize("shape", [(), (9,), (5, 7), (4, 3, 5), (2, 3, 1, 4)])
def test_a_box_may_come_in_pieces_that_end_anywhere(shape):
    dice = random.Random(str(shape))
    for _ in range(60):
        whole = np.array(dice.choices(range(100), k=int(np.prod(shape))), dtype="int16").reshape(shape)
        old, row = box_of(shape, dice), box_of(shape, dice)
        view = memoryview(bytearray(row.num_bytes + -row.num_bytes % 64))
        cut = Cut(Layout((row,)), view)
        common = cut.wanted(old)
        assert common == overlap(old, row)
        if common is None:
            continue
        memory = memoryview(bytearray(inside(whole, old).tobytes()))
        first, last = stretch(old, common)
        at = first
        while at < last:
            end = min(last, at + 2 * dice.randrange(1, 12))
            cut.lay(old, memory[at:end], at)
            at = end
        cut.done(old)
        assert (cut.wanted(old), cut.lacks) == (None, common != overlap(row, row))
        found = np.frombuffer(view[: row.num_bytes], "int16").reshape(row.local)
        here = tuple(slice(begin - o, end - o) for (begin, end), o in zip(common, row.offsets, strict=True))
        expected = np.zeros_like(found)
        expected[here] = whole[tuple(slice(begin, end) for begin, end in common)]
        assert (found == expected).all()


def box_of(shape: tuple[int, ...], dice: random.Random) -> Row:
    edges = [sorted(dice.sample(range(size + 1), 2)) for size in shape]
    return Row("w", "int16", shape, tuple(a for a, _ in edges), tuple(b - a for a, b in edges))


def inside(whole: np.ndarray, row: Row) -> np.ndarray:
    return whole[tuple(slice(o, o + n) for o, n in zip(row.offsets, row.local, strict=True))]
