"""Inventory: what this node's chests hold, in the words of the core, and which of it has done its work.

Think of the list by the door of a store-room: what lies on which shelf, and a red cross where something can go.

Contract: reads seals, a few loads from mapped memory for each chest. What goes is named here once: a fetched snapshot that its worker is
past, and copies that their owner sends elsewhere now.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator
from typing import Final

from resilient.checkpoint.chest import Chest, MemoryTier
from resilient.checkpoint.layout import decode
from resilient.checkpoint.recut import recut
from resilient.checkpoint.reshape import own_rank
from resilient.checkpoint.ring import OwnSegment, Ring, own_slot_bytes
from resilient.checkpoint.tier import KINDS
from resilient.core.machine import Seals
from resilient.core.messages import NONE, Holding, Layout, Segments
from resilient.errors import SnapshotMissing, TierUnavailable

FORSAKEN_STEPS: Final = 100  # a copy serves for a step or two; all ranks are within one step of each other
SWEEP_STEPS: Final = 10
BOUNDARY_S: Final = 1.0
COPIED_BYTES_S: Final = 2 << 30  # into memory, by a rank that shares its cores
FILLING_S: Final = 60.0  # a copy that comes in while a rank is cut anew: none is on its way then
log = logging.getLogger("resilient.vault")


def seals(chest: Chest, world_size: int = 0) -> Seals:
    """What is sealed in it. world_size: snapshots of such a world only, 0 = of any."""
    return Seals(
        own=chest.own_path,
        own_bytes=chest.own.own_bytes if chest.own is not None else 0,
        own_steps=tuple(chest.sealed("start")),
        gate_step=max(chest.sealed("gate"), default=NONE),
        snapshots={step: slot.path for step, slot in chest.sealed("snapshot", world_size).items()},
    )


def holdings(rank: int, chest: Chest, world_size: int) -> Iterator[Holding]:
    """What a peer has sent here of a rank, or a predecessor left; of a rank that sits here, only what is of a world of another size."""
    worlds: dict[int, set[int]] = {}
    for slot in chest.slots("snapshot"):
        if slot.sealed_step() != NONE:
            worlds.setdefault(slot.world_size(), set()).add(slot.sealed_step())
    own = chest.sealed("start") if not chest.seated else {}
    newest = chest.snapshots.newest() if chest.snapshots is not None else None
    for world in sorted(worlds) or ([0] if own else []):
        if chest.seated and world_size in (0, world):
            continue
        with_own = own and (newest is None or world == newest.world_size())
        yield Holding(
            rank=rank,
            own_step=chest.start_step() if with_own else NONE,
            gate_step=max(chest.sealed("gate"), default=NONE) if with_own else NONE,
            snapshots=tuple(sorted(worlds.get(world, ()))),
            own_steps=tuple(own) if with_own else (),
            native=chest.native,
            world_size=world,
        )


def cut(memory: MemoryTier, wanted: Layout, run: str) -> int:
    """A rank's snapshot of a step, from those of a world of another size. Gives the old rank whose own state it has. Raises as `recut`."""
    step, chest = wanted.reshape, memory.chest(wanted.rank)
    if step in chest.sealed("snapshot", wanted.world_size):
        return own_rank(wanted.rank, wanted.origin)  # for somebody who sat here a moment ago
    sources = {}
    for rank in range(wanted.origin):
        old = memory.chests.get(rank)
        slot = old.sealed("snapshot", wanted.origin).get(step) if old is not None else None
        if slot is None:
            raise SnapshotMissing(f"snapshot rank={rank} step={step}, of {wanted.origin} ranks: not in this node's memory")
        sources[rank] = slot
    rows, size = decode(wanted.rows), wanted.world_size
    if not chest.filling.acquire(timeout=FILLING_S):
        raise TierUnavailable(f"snapshot rank={wanted.rank} step={step}: another copy of that rank is just coming in")
    try:
        return recut(sources, rows, chest.grow_snapshots, run=run, rank=wanted.rank, world_size=size, step=step)
    finally:
        chest.filling.release()


def allocate(chest: Chest, layout: Layout, make_room: Callable[[], bool]) -> Segments:
    """Room for what its rank will seal. make_room: asked once where there is too little. Raises TierUnavailable, OSError."""
    chest.replicated, chest.often = layout.replicated, layout.often
    try:
        own, ring = _grown(chest, layout)
    except TierUnavailable:
        if not make_room():
            raise
        own, ring = _grown(chest, layout)
    return Segments(
        rank=layout.rank,
        own=chest.own_path,
        own_bytes=own.own_bytes,
        slots=tuple(slot.path for slot in ring.slots) if ring is not None else (),
        snapshot_bytes=ring.slots[0].num_bytes if ring is not None else 0,
    )


def _grown(chest: Chest, layout: Layout) -> tuple[OwnSegment, Ring | None]:
    own = chest.grow_own(own_slot_bytes(layout.own_bytes))
    return own, chest.grow_snapshots(layout.snapshot_bytes) if layout.snapshot_bytes else None


def no_segments(layout: Layout, error: str) -> Segments:
    """The answer to a chair for which there is no room."""
    return Segments(rank=layout.rank, own="", own_bytes=0, slots=(), snapshot_bytes=0, error=error)


def drop_outdated(chest: Chest) -> None:
    """A fetched snapshot has done its work when the worker has begun the step after the next."""
    step = chest.fetched.newest_step() if chest.fetched is not None else NONE
    if step != NONE and chest.start_step() > step + 1:
        chest.drop_fetched()


def end_futures(chest: Chest, step: int) -> None:
    """A round begins at `step`: copies of later ones are of an attempt that was given up, and must not be mixed with what comes now."""
    for kind in KINDS:
        for held, slot in chest.sealed(kind).items():
            if held > max(step, 0) + (kind == "gate"):
                slot.unseal()


class Boundary:
    """Whether ranks may still be copying into memory what others have sealed. All wait for the last one, so cores are theirs first.

    Of the ranks seated here that is known; those of other nodes are thought to be done when as many bytes could have been copied once
    more. Who seals at fixed steps may be waiting for his copies, and is not held back.
    """

    def __init__(self) -> None:
        """Nothing has been looked at."""
        self._sealed: dict[int, int] = {}
        self._since, self._open = 0.0, False

    def is_open(self, chests: Collection[Chest], now: float) -> bool:
        """At most for BOUNDARY_S: one of them may have died, or gone back."""
        rings = {c.rank: c.snapshots for c in chests if c.snapshots is not None and not (c.replicated or c.often)}
        sealed = {rank: ring.newest_step() for rank, ring in rings.items()}
        if sealed != self._sealed and not self._open:  # who seals again within it gets no more time
            self._since = now
        again_s = max((ring.slots[0].num_bytes for ring in rings.values()), default=0) / COPIED_BYTES_S
        patience_s = BOUNDARY_S if len(set(sealed.values())) > 1 else min(again_s, BOUNDARY_S)
        self._sealed, self._open = sealed, now < self._since + patience_s
        return self._open


class Sweep:
    """Gives back the memory of copies that are no longer sent here."""

    def __init__(self, memory: MemoryTier) -> None:
        """Nothing has been looked at."""
        self._memory = memory
        self._step = NONE

    def look(self, step: int, wanted: Collection[int]) -> None:
        """`step`: where the ranks seated here are at least; `wanted`: ranks that stay."""
        if abs(step - self._step) < SWEEP_STEPS:
            return
        self._step = step
        for rank, chest in list(self._memory.chests.items()):
            newest = max((s for kind in KINDS for s in chest.sealed(kind)), default=NONE)
            stays = chest.seated or newest == NONE or rank in wanted
            if not stays and newest < step - FORSAKEN_STEPS and self._memory.forget(rank):
                log.info("copies of rank %d, the newest of step %d, are no longer sent here: removed", rank, newest)
