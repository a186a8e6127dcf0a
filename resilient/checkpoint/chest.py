"""Chests: all that one node keeps in memory for one rank, and the memory tier made of them.

Think of a chest with the rank's number on it: inside lie its own segment (start a, start b, gate) and two snapshot slots. It does not
matter whether the rank sits on this node or on another that sent copies here: when a chair moves to this node, its chest is already
right, and nothing has to be unpacked.

Contract: sizes only grow; when they do, what is sealed is carried over into new files of the same names. They grow only on behalf of
the one who writes: the chair's worker (`seated`), or who sends copies (not `seated`); for a worker that has files mapped would go on
writing into the old ones. What is fetched for a seated rank and does not fit therefore gets a file of its own, until it is outdated.
    resilient.<key>.rank-<rank>.own       three slots
    resilient.<key>.rank-<rank>.slot-<i>  one snapshot each
    resilient.<key>.rank-<rank>.fetched   one snapshot
Thread-safety: whoever changes a chest holds its `filling` lock; reading seals needs none.
"""

from __future__ import annotations

import contextlib
import os
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Final, Self

from resilient.checkpoint.memory import create, remove, segment_path
from resilient.checkpoint.ring import OwnSegment, Ring, own_slot_bytes
from resilient.checkpoint.slot import Slot
from resilient.checkpoint.snapshot import HEADER_BYTES, SNAPSHOT_BYTES_MAX, Buffer, announced_bytes
from resilient.checkpoint.tier import KINDS, Kind, Landing, SnapshotKey, check, landing
from resilient.core.messages import NONE
from resilient.errors import SnapshotCorrupt, SnapshotMissing, TierUnavailable

_FILE: Final = re.compile(r"rank-(\d+)\.(?:own|slot-\d|fetched)")
SLOT_COUNT: Final = 2  # one is being filled while the other is whole
LATER_MAX: Final = 8  # times the first copy's size are believed of later ones: optimizer state, which comes with a step, makes it three


class Chest:
    """One rank's segments on this node."""

    def __init__(self, directory: Path | str, key: str, rank: int) -> None:
        """Nothing is allocated yet."""
        self.rank = rank
        self.seated = False  # the rank sits on this node: its worker writes here, no peer
        self.replicated = False  # its shared state lies on every other rank as well
        self.often = False  # its worker overwrites what is being read
        self.native = False  # taken over, and written by a worker of this node: no copy that another node sent
        self.filling = threading.Lock()
        self.own: OwnSegment | None = None
        self.snapshots: Ring | None = None
        self.fetched: Ring | None = None  # of one slot
        self._own_path = segment_path(directory, key, f"rank-{rank}.own")
        self._slot_paths = tuple(segment_path(directory, key, f"rank-{rank}.slot-{i}") for i in range(SLOT_COUNT))
        self._fetched_path = segment_path(directory, key, f"rank-{rank}.fetched")

    # ------------------------------------------------------------------ room

    def grow_own(self, own_bytes: int) -> OwnSegment:
        """Room for three own states whose slots have `own_bytes`. Raises TierUnavailable."""
        old = self.own
        if old is not None and old.own_bytes >= own_bytes:
            return old
        spare = _create_anew(self._own_path + ".new", 3 * own_bytes)
        new = OwnSegment(spare, own_bytes)
        if old is not None:
            for source, target in ((old.starts, new.starts), (old.gate, new.gate)):
                _carry_over(source, target)
        os.replace(spare, self._own_path)
        for slot in (*new.starts.slots, *new.gate.slots):
            slot.renamed(self._own_path)
        self.own = new
        return new

    def grow_snapshots(self, num_bytes: int) -> Ring:
        """Room for two snapshots of up to `num_bytes`. Raises TierUnavailable, with the old ones untouched."""
        old = self.snapshots
        if old is not None and self._room() >= num_bytes:
            return old
        spares: list[str] = []
        try:
            for number, path in enumerate(self._slot_paths):
                spares.append(_create_anew(f"{path}.new", num_bytes, (SLOT_COUNT - number) * num_bytes))
            new = Ring.open(spares, populate=not self.seated)  # who receives here writes; who only reads gets many pages with one fault
            if old is not None:
                _carry_over(old, new)
        finally:
            if len(spares) < len(self._slot_paths):
                for spare in spares:
                    remove(spare)
        for slot, path in zip(new.slots, self._slot_paths, strict=True):
            os.replace(slot.path, path)
            slot.renamed(path)
        self.snapshots = new
        return new

    def room(self, key: SnapshotKey, num_bytes: int, owner_has: int = 0) -> Ring:
        """The ring for a copy of `key` that comes in, `num_bytes` long. Raises TierUnavailable.

        owner_has: room for each of its own, made where it can be.
        """
        if key.kind != "snapshot":
            fits = self.own is not None and (self.seated or self.own.own_bytes >= num_bytes)
            own = self.own if self.own is not None and fits else self.grow_own(own_slot_bytes(2 * num_bytes))
            return own.starts if key.kind == "start" else own.gate
        if self.snapshots is not None and self._room() >= num_bytes:
            return self.snapshots
        if not self.seated:
            later = min(owner_has, num_bytes * LATER_MAX, SNAPSHOT_BYTES_MAX)
            with contextlib.suppress(TierUnavailable):
                if later > num_bytes:
                    return self.grow_snapshots(later)
            return self.grow_snapshots(num_bytes)
        self.drop_fetched()
        self.fetched = Ring.open([create(self._fetched_path, num_bytes)])
        return self.fetched

    def _room(self) -> int:
        """Bytes of the smallest of the two slots: a predecessor may have died while it made them larger."""
        slots = self.snapshots.slots if self.snapshots is not None else ()
        return min(slot.num_bytes for slot in slots) if len(slots) == SLOT_COUNT else 0

    def reopen(self) -> None:
        """Map what a dead owner of these files left. What in it is sound is not looked at; what cannot be mapped is removed."""
        own_bytes = os.path.getsize(self._own_path) // 3 if os.path.exists(self._own_path) else 0
        if own_bytes % 64 == 0 and own_bytes >= HEADER_BYTES:
            self.own = OwnSegment(self._own_path, own_bytes)
        slots = [slot for path in self._slot_paths if (slot := _reopened(path)) is not None]
        self.snapshots = Ring(slots) if slots else None
        fetched = _reopened(self._fetched_path)
        self.fetched = Ring([fetched]) if fetched is not None else None

    def drop_fetched(self) -> None:
        """The fetched snapshot is no longer needed."""
        self.fetched = None
        remove(self._fetched_path)

    def unlink(self) -> None:
        """Remove the files; what is mapped goes when the last thread that reads it lets go."""
        self.own = self.snapshots = self.fetched = None
        for path in (self._own_path, *self._slot_paths, self._fetched_path):
            remove(path)

    # ------------------------------------------------------------------ contents

    @property
    def own_path(self) -> str:
        """Path of the own segment, "" before there is one."""
        return self._own_path if self.own is not None else ""

    @property
    def slot_paths(self) -> tuple[str, ...]:
        """Paths of the snapshot slots, none before there are any."""
        return self._slot_paths if self.snapshots is not None else ()

    def rings(self, kind: Kind) -> tuple[Ring, ...]:
        """Where snapshots of this kind are written in turn."""
        if kind == "snapshot":
            return tuple(ring for ring in (self.snapshots, self.fetched) if ring is not None)
        return () if self.own is None else (self.own.starts if kind == "start" else self.own.gate,)

    def slots(self, kind: Kind) -> tuple[Slot, ...]:
        """Where snapshots of this kind lie, sealed or not."""
        return tuple(slot for ring in self.rings(kind) for slot in ring.slots)

    def start_step(self) -> int:
        """The step that the rank began last, as far as is known here."""
        return self.own.start_step() if self.own is not None else NONE

    def sealed(self, kind: Kind, world_size: int = 0) -> dict[int, Slot]:
        """Step -> slot of what is sealed, ascending: a few loads from mapped memory. world_size: only of such a world, 0 = of any."""
        found = [(s.sealed_step(), s.generation(), s) for s in self.slots(kind) if world_size in (0, s.world_size())]
        return {step: slot for step, _, slot in sorted(found, key=lambda row: row[:2]) if step != NONE}


def rank_of(what: str) -> int:
    """Whose segment that is, NONE if it is none of a chest."""
    match = _FILE.fullmatch(what)
    return int(match[1]) if match else NONE


def _reopened(path: str) -> Slot | None:
    try:
        return Slot(path)
    except SnapshotMissing:
        return None
    except SnapshotCorrupt:
        remove(path)
        return None


def _create_anew(path: str, num_bytes: int, of_bytes: int = 0) -> str:
    remove(path)  # left over from an attempt that failed
    return create(path, num_bytes, of_bytes)


def _carry_over(source: Ring, target: Ring) -> None:
    """Copy what is sealed and sound, straight to its new place; oldest first, so that the order of writing stays as it was."""
    for slot in sorted(source.slots, key=Slot.generation):
        if slot.sealed_step() != NONE:
            with contextlib.suppress(SnapshotCorrupt):
                if not slot.is_stamped():
                    slot.stamp_payload()
                slot.fill(target.receive(slot.header()), HEADER_BYTES)
                target.accept()


class Berth:
    """A place in a chest for one copy that comes in: makes room when it hears the size. A Landing, and a context."""

    def __init__(self, chest: Chest, key: SnapshotKey) -> None:
        """Nothing is touched before `receive`."""
        self._chest = chest
        self._key = key
        self._ring: Ring | None = None
        self._received: tuple[int, ...] = ()  # generations of the ring's slots when the copy began to come in

    def __enter__(self) -> Self:
        """Take the chest's lock. Raises TierUnavailable if another copy of the rank is on its way."""
        if not self._chest.filling.acquire(blocking=False):
            raise TierUnavailable(f"{self._key}: another copy of that rank is just coming in")
        return self

    def __exit__(self, *_: object) -> None:
        """Whatever happened, the next one may come."""
        self._chest.filling.release()

    def receive(self, header: bytes, owner_has: int = 0) -> memoryview:
        """As `Landing.receive`; allocates (0.3 s per GB) where there is no room yet. owner_has: see `Chest.room`."""
        self._ring = self._chest.room(self._key, announced_bytes(header, f"{self._key} coming in"), owner_has)
        view = self._ring.receive(header)
        self._received = self._ring.generations()
        return view

    def untouched(self) -> bool:
        """Whether nobody has written here since `receive`: what has come in until then can be gone on with."""
        return self._ring in self._chest.rings(self._key.kind) and self._ring.generations() == self._received

    def accept(self, *, rank: int | None = None, step: int | None = None, hashed: bytes | None = None) -> int:
        """As `Landing.accept`."""
        assert self._ring is not None, "accept() without receive()"
        return self._ring.accept(rank=rank, step=step, hashed=hashed)


class MemoryTier:
    """This node's chests as a tier."""

    name = "memory"

    def __init__(self, directory: Path | str, key: str) -> None:
        """`key`: whose files they are (memory.new_key). Nothing is allocated yet."""
        self.chests: dict[int, Chest] = {}
        self._directory = directory
        self._key = key

    def chest(self, rank: int) -> Chest:
        """The chest of `rank`, made if there is none."""
        return self.chests.setdefault(rank, Chest(self._directory, self._key, rank))  # atomic

    def berth(self, key: SnapshotKey) -> Berth:
        """Where a copy of `key` may land."""
        return Berth(self.chest(key.rank), key)

    def put(self, key: SnapshotKey, sealed: Buffer) -> None:
        """As `Tier.put`."""
        data = check(key, sealed)
        with self.berth(key) as berth:
            berth.receive(bytes(data[:HEADER_BYTES]))[:] = data[HEADER_BYTES:]
            berth.accept(rank=key.rank, step=key.step)

    def get(self, key: SnapshotKey, into: Buffer | Landing) -> int:
        """As `Tier.get`."""
        slot = self.slot(key)
        if not slot.is_stamped():
            slot.stamp_payload()
        target, header, generation = landing(into), slot.header(), slot.generation()
        target.receive(header)[:] = slot.body()
        if slot.generation() != generation:
            raise SnapshotMissing(f"{key}: overwritten while it was being read")
        target.accept(rank=key.rank, step=key.step)
        return announced_bytes(header)

    def list(self) -> Iterator[SnapshotKey]:
        """As `Tier.list`."""
        for rank, chest in sorted(self.chests.items()):  # a copy: another thread may add one
            yield from sorted(SnapshotKey(rank, step, kind) for kind in KINDS for step in chest.sealed(kind))

    def drop(self, key: SnapshotKey) -> None:
        """As `Tier.drop`: breaks the seals; the memory is used again."""
        chest = self.chests.get(key.rank)
        for slot in chest.slots(key.kind) if chest is not None else ():
            if slot.sealed_step() == key.step:
                slot.unseal()

    def slot(self, key: SnapshotKey, world_size: int = 0) -> Slot:
        """The slot that holds `key`, or SnapshotMissing. world_size: sealed in such a world, 0 = in any."""
        chest = self.chests.get(key.rank)
        held = chest.sealed(key.kind, world_size) if chest is not None else {}
        if key.step not in held:
            steps = ", ".join(map(str, held)) or "none"
            of = f", of {world_size} ranks" if world_size else ""
            raise SnapshotMissing(f"{key}{of}: not in this node's memory (steps there: {steps})")
        return held[key.step]

    def forget(self, rank: int) -> bool:
        """Remove the chest of `rank`; whether nobody was just filling it."""
        chest = self.chests[rank]
        if not chest.filling.acquire(blocking=False):
            return False
        del self.chests[rank]
        chest.unlink()
        chest.filling.release()
        return True

    def unlink(self) -> None:
        """Unmap and remove everything."""
        for chest in self.chests.values():
            chest.unlink()
        self.chests.clear()
