"""Snapshots in a segment file: what is written is read, what is broken is refused, the newest is never overwritten."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from resilient.checkpoint import hold
from resilient.checkpoint.ring import OwnSegment, Ring, own_slot_bytes
from resilient.checkpoint.slot import Slot
from resilient.checkpoint.snapshot import HEADER_BYTES, parse, slot_bytes
from resilient.core.messages import NONE
from resilient.errors import SnapshotCorrupt, SnapshotMismatch, SnapshotMissing

LAYOUT, OWN = b"names and shapes", b"rng and position"


def segment(path: Path, num_bytes: int) -> str:
    path.write_bytes(bytes(num_bytes))
    return str(path)


def room(payload_bytes: int) -> int:
    return slot_bytes(len(LAYOUT), len(OWN), payload_bytes)


def write(slot: Slot | Ring, step: int, payload: bytes, *, own: bytes = OWN, rank: int = 3) -> None:
    view = slot.begin(run="run", rank=rank, world_size=4, round=2, layout=LAYOUT, own=own, payload_bytes=len(payload))
    view[:] = payload
    slot.seal(step)


@pytest.fixture
def slot(tmp_path):
    found = Slot(segment(tmp_path / "slot", room(10_000)))
    yield found
    found.close()


def test_what_was_written_is_read(slot):
    assert slot.sealed_step() == NONE
    assert slot.sealed_bytes() == 0
    payload = os.urandom(10_000)
    write(slot, 7, payload)
    found = slot.read(run="run", rank=3, step=7)
    assert (found.step, found.rank, found.world_size, found.round) == (7, 3, 4, 2)
    assert (found.layout, found.own, bytes(found.payload)) == (LAYOUT, OWN, payload)
    assert slot.sealed_step() == 7
    assert slot.sealed_bytes() == room(10_000) == found.num_bytes


def test_the_payload_begins_at_a_page(slot):
    write(slot, 1, b"x" * 100)
    data = Path(slot.path).read_bytes()
    assert data.index(b"x" * 100) == 4096


def test_another_process_reads_it_without_writing(slot):
    write(slot, 7, b"payload")
    reader = Slot(slot.path, writable=False)
    assert bytes(reader.read(step=7).payload) == b"payload"
    with pytest.raises(TypeError):
        reader.unseal()
    reader.close()


@pytest.mark.parametrize("wanted", [{"run": "other"}, {"rank": 0}, {"step": 8}])
def test_another_snapshot_than_expected_is_a_mismatch(slot, wanted):
    write(slot, 7, b"payload")
    with pytest.raises(SnapshotMismatch, match=f"{next(iter(wanted))} .* expected"):
        slot.read(**wanted)


def test_nothing_is_there_between_begin_and_seal(slot):
    write(slot, 7, b"first")
    slot.begin(run="run", rank=3, world_size=4, round=2, layout=LAYOUT, own=OWN, payload_bytes=6)
    assert slot.sealed_step() == NONE
    with pytest.raises(SnapshotMissing, match="not sealed"):
        slot.read()


def test_what_does_not_fit_leaves_the_old_snapshot(slot):
    write(slot, 7, b"first")
    with pytest.raises(SnapshotMismatch, match=r"18193 bytes wanted .*14097 payload.*, 14096 there"):
        slot.begin(run="run", rank=3, world_size=4, round=2, layout=LAYOUT, own=OWN, payload_bytes=10_001 + 4096)
    assert bytes(slot.read(step=7).payload) == b"first"


def test_a_file_that_is_missing_or_too_short(tmp_path):
    with pytest.raises(SnapshotMissing, match="no such file"):
        Slot(str(tmp_path / "none"))
    with pytest.raises(SnapshotCorrupt, match=r"256 bytes .* expected, 100 found"):
        Slot(segment(tmp_path / "short", 100))
    with pytest.raises(SnapshotCorrupt, match=r"5000 bytes .* expected, 4096 found"):
        Slot(segment(tmp_path / "page", 4096), num_bytes=5000)


def test_seal_without_begin_is_a_fault_of_ours(slot):
    write(slot, 1, b"")
    with pytest.raises(AssertionError, match="without begin"):
        slot.seal(2)


# --------------------------------------------------------------------------- stamping and staging


def test_a_stamp_guards_the_payload(slot):
    write(slot, 7, b"payload")
    assert not slot.read().stamped
    with pytest.raises(SnapshotCorrupt, match="not hashed"):
        slot.read(stamped=True)
    digest = slot.stamp_payload()
    assert slot.is_stamped()
    assert slot.read(stamped=True).stamped
    assert slot.stamp_payload() == digest
    slot._memory[4096] ^= 1
    with pytest.raises(SnapshotCorrupt, match="payload is not what was hashed"):
        slot.read()
    assert slot.read(verify=False).step == 7


def test_a_stamp_does_not_outlive_its_seal(slot):
    write(slot, 7, b"payload")
    slot.stamp_payload()
    write(slot, 7, b"another")  # the same step again, as a replay writes it
    assert not slot.is_stamped()
    assert not slot.read().stamped


def test_a_writer_that_overtakes_the_stamp_is_noticed(slot, monkeypatch):
    monkeypatch.setattr(hold, "PATIENCE_S", 0.01)
    write(slot, 7, b"payload")
    real = slot.read
    monkeypatch.setattr(slot, "read", lambda **kw: (real(**kw), write(slot, 7, b"another"))[0])
    with pytest.raises(SnapshotMissing, match="overwritten"):
        slot.stamp_payload()
    assert not slot.is_stamped()
    with pytest.raises(SnapshotMissing, match="overwritten"):
        slot.stage(memoryview(bytearray(room(10_000))))


def test_a_staged_copy_stands_alone(slot):
    payload = os.urandom(9_999)
    write(slot, 7, payload)
    copy = memoryview(bytearray(room(10_000)))
    num_bytes = slot.stage(copy).num_bytes
    write(slot, 8, b"overwritten")
    found = parse(copy[:num_bytes], run="run", rank=3, step=7, stamped=True)
    assert bytes(found.payload) == payload


def test_a_writer_waits_for_a_copy_under_way(slot, monkeypatch):
    write(slot, 7, b"payload")
    writer, waits = threading.Thread(target=write, args=(slot, 8, b"another")), []
    real = slot.fill

    def fill(*args):
        writer.start()
        writer.join(0.2)
        waits.append((writer.is_alive(), slot.sealed_step()))
        real(*args)

    monkeypatch.setattr(slot, "fill", fill)
    spare = memoryview(bytearray(room(10_000)))
    assert bytes(slot.stage(spare).payload) == b"payload"
    writer.join(10)
    assert waits == [(True, 7)]
    assert bytes(slot.read(step=8).payload) == b"another"


def test_a_copy_that_hangs_holds_nobody_up_for_ever(slot, monkeypatch):
    monkeypatch.setattr(hold, "PATIENCE_S", 0.05)
    write(slot, 7, b"payload")
    real = slot.fill
    monkeypatch.setattr(slot, "fill", lambda *args: (write(slot, 8, b"another"), real(*args)))
    with pytest.raises(SnapshotMissing, match="overwritten"):
        slot.stage(memoryview(bytearray(room(10_000))))
    assert bytes(slot.read(step=8).payload) == b"another"
    assert not hold.is_held(slot._fd)


def test_the_same_bytes_travel_wherever_they_were_written(tmp_path):
    """Generations are a memory's own affair: two slots with different histories give the same bytes."""
    copies = []
    for index, history in enumerate((1, 5)):
        slot = Slot(segment(tmp_path / str(index), room(100)))
        for step in range(history):
            write(slot, step, b"history")
        write(slot, 7, b"payload")
        copy = memoryview(bytearray(slot.num_bytes))
        copies.append(bytes(copy[: slot.stage(copy).num_bytes]))
        slot.close()
    assert copies[0] == copies[1]


# --------------------------------------------------------------------------- receiving


def sealed_bytes(tmp_path: Path, step: int, payload: bytes) -> bytes:
    slot = Slot(segment(tmp_path / f"source-{step}", room(len(payload))))
    write(slot, step, payload)
    copy = memoryview(bytearray(slot.num_bytes))
    slot.stage(copy)
    slot.close()
    return bytes(copy)


def test_a_received_copy_counts_only_when_it_is_whole_and_right(slot, tmp_path):
    write(slot, 6, b"older")
    data = sealed_bytes(tmp_path, 7, b"payload")
    view = slot.receive(data[:HEADER_BYTES])
    assert slot.sealed_step() == NONE
    view[:] = data[HEADER_BYTES:]
    assert slot.sealed_step() == NONE
    assert slot.accept(rank=3, step=7) == 7
    assert slot.is_stamped()
    assert bytes(slot.read(stamped=True).payload) == b"payload"


def test_a_received_copy_that_is_wrong_stays_unsealed(slot, tmp_path):
    data = sealed_bytes(tmp_path, 7, b"payload")
    slot.receive(data[:HEADER_BYTES])[:] = data[HEADER_BYTES:-1] + b"?"
    with pytest.raises(SnapshotCorrupt):
        slot.accept(rank=3, step=7)
    assert slot.sealed_step() == NONE
    slot.receive(data[:HEADER_BYTES])[:] = data[HEADER_BYTES:]
    with pytest.raises(SnapshotMismatch):
        slot.accept(rank=4, step=7)
    assert slot.sealed_step() == NONE


def test_an_announcement_that_is_none_leaves_the_old_snapshot(slot, tmp_path):
    write(slot, 6, b"older")
    data = sealed_bytes(tmp_path, 7, bytes(100_000))
    with pytest.raises(SnapshotMismatch, match="announced"):
        slot.receive(data[:HEADER_BYTES])
    with pytest.raises(SnapshotCorrupt):
        slot.receive(data[: HEADER_BYTES - 1])
    with pytest.raises(SnapshotCorrupt, match="format mark"):
        slot.receive(b"?" * HEADER_BYTES)
    assert slot.read().step == 6


# --------------------------------------------------------------------------- rings


@pytest.fixture
def ring(tmp_path):
    found = Ring.open([segment(tmp_path / str(i), room(100)) for i in range(2)])
    yield found
    found.close()


def test_the_newest_is_never_overwritten(ring):
    for step in range(10):
        newest = ring.newest_step()
        ring.begin(run="run", rank=3, world_size=4, round=1, layout=b"", own=b"", payload_bytes=5)
        assert ring.newest_step() == newest  # still there while the next one is written
        ring.seal(step)
        assert ring.newest_step() == step
    assert ring.steps() == (8, 9)
    assert ring.get(8).read().step == 8
    with pytest.raises(SnapshotMissing, match="sealed steps: 8, 9"):
        ring.get(7)


def test_what_every_rank_has_is_overwritten_last(ring):
    write(ring, 4, b"")
    ring.keep = 4
    for step in (5, 6, 7):  # sealed here alone
        write(ring, step, b"")
        assert ring.steps() == (4, step)
    ring.keep = 7
    write(ring, 8, b"")
    assert ring.steps() == (7, 8)


def test_a_rollback_ends_the_abandoned_future(ring):
    for step in (10, 11):
        write(ring, step, b"old")
    write(ring, 8, b"new")
    assert ring.steps() == (8,)
    write(ring, 9, b"new")
    write(ring, 10, b"new")
    assert ring.steps() == (9, 10)
    assert ring.newest_step() == 10


def test_a_replayed_step_is_the_newer_one_of_two(ring):
    write(ring, 5, b"first")
    write(ring, 5, b"again")
    assert ring.steps() == (5,)
    assert bytes(ring.get(5).read().payload) == b"again"


def test_a_successor_goes_on_where_the_dead_writer_stopped(ring):
    write(ring, 4, b"")
    write(ring, 5, b"")
    ring.begin(run="run", rank=3, world_size=4, round=1, layout=b"", own=b"", payload_bytes=0)  # and is killed here
    successor = Ring.open([slot.path for slot in ring.slots])
    assert successor.steps() == (5,)
    write(successor, 6, b"")
    assert successor.steps() == (5, 6)
    successor.close()


def test_own_state_of_three_kinds(tmp_path):
    own_bytes = own_slot_bytes(1000)
    path = segment(tmp_path / "own", 3 * own_bytes)
    writer = OwnSegment(path, own_bytes, run="run", rank=3)
    assert (writer.start_step(), writer.gate_step()) == (NONE, NONE)
    for step in range(5):
        writer.write_start(step, b"start %d" % step)
        writer.write_gate(step + 1, b"gate %d" % (step + 1))
    reader = OwnSegment(path, own_bytes, rank=3, writable=False)
    assert (reader.start_step(), reader.gate_step()) == (4, 5)
    assert reader.starts.steps() == (3, 4)
    assert reader.read_start(4) == b"start 4"
    assert reader.read_start(3) == b"start 3"
    assert reader.read_gate(5) == b"gate 5"
    with pytest.raises(SnapshotMissing):
        reader.read_gate(4)
    with pytest.raises(SnapshotMismatch, match="bytes wanted"):
        writer.write_start(5, bytes(1001 + 64))
    assert reader.read_start(4) == b"start 4"
    with pytest.raises(SnapshotMismatch, match="rank 2 expected"):
        OwnSegment(path, own_bytes, rank=2, writable=False).read_start(4)


def test_own_state_after_a_rollback(tmp_path):
    own_bytes = own_slot_bytes(100)
    own = OwnSegment(segment(tmp_path / "own", 3 * own_bytes), own_bytes, run="run", rank=0)
    own.write_start(7, b"")
    own.write_gate(8, b"gate")
    own.write_start(7, b"")  # replayed: one who repeats step 7 may still ask for gate 8
    assert own.gate_step() == 8
    own.write_start(5, b"")
    assert (own.start_step(), own.starts.steps(), own.gate_step()) == (5, (5,), NONE)


def test_a_view_that_is_still_held_does_not_keep_the_slot_from_closing(slot):
    write(slot, 7, b"payload")
    payload = slot.read().payload
    slot.close()
    slot.close()
    assert bytes(payload) == b"payload"
