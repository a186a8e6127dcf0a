"""Chests: room that is right from the first copy on, growth that takes nothing beside the files, and when their copies are left in peace."""

from __future__ import annotations

import os
import tracemalloc

import pytest
from resilient_agents.inventory import BOUNDARY_S, COPIED_BYTES_S, Boundary

from resilient.checkpoint.chest import LATER_MAX, Chest, MemoryTier
from resilient.checkpoint.ring import Ring
from resilient.checkpoint.snapshot import slot_bytes
from resilient.checkpoint.tier import SnapshotKey
from resilient.errors import TierUnavailable

KEY = "1-1-abcd"
PAYLOAD = 3 << 20
SIZE = slot_bytes(0, 3, PAYLOAD)


def seal(ring: Ring, step: int, payload: bytes, rank: int = 0) -> None:
    ring.begin(run="run", rank=rank, world_size=2, round=1, layout=b"", own=b"own", payload_bytes=len(payload))[:] = payload
    ring.seal(step)


def seated(directory, rank: int) -> Chest:
    chest = Chest(directory, KEY, rank)
    chest.seated = True
    chest.grow_snapshots(SIZE)
    return chest


def test_the_first_copy_has_the_room_that_its_owner_has(tmp_path):
    source, tier = seated(tmp_path, 7).snapshots, MemoryTier(tmp_path, KEY)
    files = []
    for step, length in ((1, PAYLOAD // 3), (2, PAYLOAD)):  # before the optimizer has made its state, and after
        seal(source, step, bytes([step]) * length)
        slot = source.get(step)
        slot.stamp_payload()
        with tier.berth(SnapshotKey(0, step)) as berth:
            berth.receive(slot.header(), slot.num_bytes)[:] = slot.body()
            berth.accept(step=step)
        assert [slot.num_bytes for slot in tier.chest(0).snapshots.slots] == [SIZE, SIZE]
        files.append([os.stat(path).st_ino for path in tier.chest(0).slot_paths])
    assert files[0] == files[1]


def test_room_for_later_copies_is_made_where_it_can_be_and_believed_up_to_a_limit(tmp_path, monkeypatch):
    asked = []

    def full(self, num_bytes):
        asked.append(num_bytes)
        if num_bytes > SIZE:
            raise TierUnavailable("no room")
        return grow(self, num_bytes)

    grow = Chest.grow_snapshots
    monkeypatch.setattr(Chest, "grow_snapshots", full)
    key = SnapshotKey(0, 1)
    assert Chest(tmp_path, KEY, 0).room(key, SIZE, 3 * SIZE).slots[0].num_bytes == SIZE
    assert Chest(tmp_path, KEY, 1).room(key, SIZE, 1 << 60).slots[0].num_bytes == SIZE
    assert asked == [3 * SIZE, SIZE, LATER_MAX * SIZE, SIZE]
    with pytest.raises(TierUnavailable):
        Chest(tmp_path, KEY, 2).room(key, 2 * SIZE, 1)


def test_growing_carries_over_what_is_sound_and_needs_no_memory_of_its_size(tmp_path):
    chest = seated(tmp_path, 0)
    for step in (1, 2):
        seal(chest.snapshots, step, bytes([step]) * PAYLOAD)
    chest.snapshots.get(1).stamp_payload()
    tracemalloc.start()
    chest.grow_snapshots(2 * SIZE)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 20
    assert chest.snapshots.steps() == (1, 2)
    assert bytes(chest.snapshots.get(2).read(stamped=True).payload) == bytes([2]) * PAYLOAD
    chest.snapshots.get(1).memory[-1] ^= 1  # no longer within the snapshot
    chest.snapshots.get(2).memory[SIZE - 1] ^= 1
    assert chest.grow_snapshots(3 * SIZE).steps() == (1,)


def test_copies_are_begun_when_all_ranks_have_sealed_and_may_be_done_elsewhere(tmp_path):
    chests, boundary, again_s = [seated(tmp_path, rank) for rank in (0, 1)], Boundary(), SIZE / COPIED_BYTES_S
    assert boundary.is_open(chests, 100.0) is True  # nothing was known before
    assert boundary.is_open(chests, 100.0 + 1.1 * again_s) is False
    seal(chests[0].snapshots, 1, bytes(PAYLOAD))
    assert boundary.is_open(chests, 200.0) is True
    assert boundary.is_open(chests, 200.0 + 0.9 * BOUNDARY_S) is True
    assert boundary.is_open(chests, 200.0 + 1.1 * BOUNDARY_S) is False  # the other one has died
    seal(chests[1].snapshots, 1, bytes(PAYLOAD))
    assert boundary.is_open(chests, 300.0) is True
    assert boundary.is_open(chests, 300.0 + 1.1 * again_s) is False
    for chest in chests:
        chest.often = True  # may be waiting for its copies
    seal(chests[0].snapshots, 2, bytes(PAYLOAD))
    assert boundary.is_open(chests, 400.0) is False
