"""Every damage to a snapshot's bytes is seen: each single bit, each truncation, each torn write, and what Hypothesis thinks of."""

from __future__ import annotations

import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from resilient.checkpoint import tally
from resilient.checkpoint.layout import Layout, Row, padded
from resilient.checkpoint.ring import OwnSegment, Ring, own_slot_bytes
from resilient.checkpoint.slot import Slot
from resilient.checkpoint.snapshot import parse, slot_bytes
from resilient.core.messages import NONE
from resilient.errors import CheckpointError, SnapshotMissing

SIZES, OWN = (100, 0, 65, 1, 64, 0), b"own" * 9
REFUSED = CheckpointError


def layout_of(sizes) -> bytes:
    """Of tensors of so many bytes."""
    return Layout(tuple(Row(str(number), "uint8", (size,), (0,), (size,)) for number, size in enumerate(sizes))).encode() if sizes else b""


def payload_of(sizes) -> bytes:
    """Something in each tensor, and zeros between them."""
    return b"".join(bytes(1 + (size + at) % 255 for at in range(size)).ljust(padded(size), b"\0") for size in sizes)


def sealed(payload: bytes, *, layout: bytes = b"", own: bytes = OWN, step: int = 7, path: str = "/dev/shm") -> bytes:
    """The bytes of a sound, stamped snapshot."""
    name = f"{path}/resilient-test-{os.getpid()}"
    try:
        with open(name, "wb") as file:
            file.truncate(slot_bytes(len(layout), len(own), len(payload)))
        slot = Slot(name)
        view = slot.begin(run="run", rank=3, world_size=4, round=2, layout=layout, own=own, payload_bytes=len(payload))
        view[:] = payload
        slot.seal(step)
        copy = memoryview(bytearray(slot.num_bytes))
        slot.stage(copy)
        slot.close()
        return bytes(copy)
    finally:
        os.unlink(name)


@pytest.fixture(params=["tensors", "large tensors", "no layout", "own state"])
def good(request, monkeypatch):
    """The bytes of a sound snapshot."""
    monkeypatch.setattr(tally, "PIECE", 64 if request.param == "large tensors" else tally.PIECE)
    sizes = SIZES if "tensors" in request.param else ()
    return sealed(payload_of(SIZES) if request.param != "own state" else b"", layout=layout_of(sizes))


def test_every_flipped_bit_is_seen(good):
    assert parse(good, run="run", rank=3, step=7, stamped=True).own == OWN
    missed = []
    for bit in range(8 * len(good)):
        bad = bytearray(good)
        bad[bit // 8] ^= 1 << bit % 8
        try:
            parse(bad, stamped=True)
        except REFUSED:
            continue
        missed.append(bit)
    assert not missed


def test_every_truncation_is_seen(good):
    for length in range(len(good)):
        with pytest.raises(REFUSED):
            parse(good[:length], stamped=True)
        with pytest.raises(REFUSED):  # the rest of the file was never written
            parse(good[:length] + bytes(len(good) - length) if any(good[length:]) else b"", stamped=True)


@settings(max_examples=60, deadline=None)
@given(old=st.binary(max_size=600), new=st.binary(max_size=600), cut=st.integers(0, 10_000), data=st.data())
def test_a_mixture_of_two_snapshots_is_neither(old, new, cut, data):
    """A torn write: the first bytes of one, the rest of the other."""
    one, two = sealed(old, step=7), sealed(new, step=8)
    length = max(len(one), len(two))
    cut %= length
    torn = two.ljust(length, b"\0")[:cut] + one.ljust(length, b"\0")[cut:]
    if torn in (one.ljust(length, b"\0"), two.ljust(length, b"\0")):
        return
    try:
        found = parse(torn, stamped=True)
    except REFUSED:
        return
    whole = {7: old, 8: new}[found.step]
    assert bytes(found.payload) == whole  # what follows the snapshot may be anything


@settings(max_examples=100, deadline=None)
@given(garbage=st.binary(max_size=1000))
def test_garbage_is_refused(garbage):
    with pytest.raises(REFUSED):
        parse(garbage)


@settings(max_examples=60, deadline=None)
@given(sizes=st.lists(st.integers(0, 500), max_size=20), own=st.binary(max_size=5000), step=st.integers(0, 2**32 - 3), data=st.data())
def test_any_contents_come_back(sizes, own, step, data):
    layout, payload = layout_of(sizes), payload_of(sizes) if sizes else data.draw(st.binary(max_size=5000))
    found = parse(sealed(payload, layout=layout, own=own, step=step), run="run", rank=3, step=step, stamped=True)
    assert (found.layout, found.own, bytes(found.payload)) == (layout, own, payload)


@settings(max_examples=60, deadline=None)
@given(steps=st.lists(st.integers(0, 6), max_size=20), crash=st.booleans())
def test_a_ring_holds_the_newest_of_the_present_attempt(steps, crash, tmp_path_factory):
    """Whatever steps are written in whatever order (rollbacks), the last one sealed is there, and no step beyond it."""
    directory = tmp_path_factory.mktemp("ring")
    paths = [str(directory / str(index)) for index in range(2)]
    for path in paths:
        with open(path, "wb") as file:
            file.truncate(slot_bytes(0, 4, 0))
    ring = Ring.open(paths)
    last = before = None
    for step in steps:
        ring.begin(run="run", rank=0, world_size=1, round=1, layout=b"", own=b"%04d" % step, payload_bytes=0)
        ring.seal(step)
        before, last = last, step
    if crash:
        ring.begin(run="run", rank=0, world_size=1, round=1, layout=b"", own=b"torn", payload_bytes=0)
    if last is None:
        assert ring.newest_step() == NONE
        with pytest.raises(SnapshotMissing):
            ring.get(0)
    else:
        assert ring.newest_step() == last
        assert ring.get(last).read(step=last).own == b"%04d" % last
        assert max(ring.steps()) == last
        if not crash and before is not None and before <= last:
            assert before in ring.steps()
    ring.close()


def test_every_flipped_bit_of_an_own_segment_is_seen(tmp_path):
    """All three slots at once: one flipped bit costs at most that slot, never gives wrong state."""
    own_bytes = own_slot_bytes(32)
    path = tmp_path / "own"
    path.write_bytes(bytes(3 * own_bytes))
    writer = OwnSegment(str(path), own_bytes, run="run", rank=0)
    writer.write_start(4, b"start 4")
    writer.write_start(5, b"start 5")
    writer.write_gate(6, b"gate 6")
    good = bytearray(path.read_bytes())
    truth = {("start", 4): b"start 4", ("start", 5): b"start 5", ("gate", 6): b"gate 6"}
    for bit in range(8 * len(good)):
        bad = good.copy()
        bad[bit // 8] ^= 1 << bit % 8
        with open(path, "r+b") as file:  # the same pages that are mapped
            file.write(bad)
        lost = 0
        for (kind, step), own in truth.items():
            try:
                found = writer.read_start(step) if kind == "start" else writer.read_gate(step)
            except REFUSED:
                lost += 1
            else:
                assert found == own
        assert lost <= 1
    writer.close()
