"""Copies: what this node's ranks seal is sent to the vaults of other nodes, in the background.

Think of a clerk who walks past the mailboxes and carries on whatever is new; if two letters have come since his last round, he takes the
newer one, for nobody will ask for the other. For each house where copies go he has a boy of his own: one who stands before a closed door
keeps nobody else waiting.

Contract: of each rank the newest start, the newest gate and the newest snapshot (not where shared state is replicated: other ranks hold
that) end up at every peer: in each round own state first, and each kind once, so that one which changes faster than it travels keeps none
of the others back. One transfer per rank and peer at a time. A snapshot is sent from where it lies, and its writer does not wait for it:
of two slots it has the other one first. If it comes back before all has gone, the next snapshots of that rank are copied to private
memory before they are sent (one at a time: that is the only memory of a snapshot's size that is ever used here), until the wire has had
STAGED_S to be faster again. A peer that does not answer rests a second.
Rejected: the writer waits for the wire (training at the pace of the network); always a private copy (memory for one snapshot more, and
the time to fill it); a third slot (the same memory, and it would be needed by every rank).
"""

from __future__ import annotations

import asyncio
import functools
import logging
import mmap
import time
from collections.abc import Callable, Iterator
from typing import Final

from resilient.checkpoint.chest import Chest
from resilient.checkpoint.haul import TCP, Limit
from resilient.checkpoint.notes import Notes
from resilient.checkpoint.peer import Peer
from resilient.checkpoint.ring import Ring
from resilient.checkpoint.slot import Slot
from resilient.checkpoint.snapshot import Snapshot
from resilient.checkpoint.tier import Kind, SnapshotKey
from resilient.checkpoint.transport import Transport
from resilient.core.messages import NONE, Recorded
from resilient.errors import CheckpointError, SnapshotCorrupt, SnapshotMissing, TierUnavailable
from resilient_agents.lane import Errands, Lane

REST_S: Final = 1.0
THIN: Final = 2  # connections of a haul where several vaults are at it: those of a group that keeps parity
ROUNDS_MAX: Final = 20  # of one rank and peer, through all kinds, before the next look decides anew
STAGED_S: Final = 60.0  # after a writer has been faster than the wire
COPY_S: Final = 60.0  # plus the time for the bytes
COPY_BYTES_S: Final = 100 << 20  # slower than this, a copy within memory counts as hung
_INLINE_BYTES: Final = 256 << 10  # copied on the spot: less work than handing it to a thread
Mark = tuple[str, int]  # slot, generation: one writing of it
log = logging.getLogger("resilient.vault")


class Copies:
    """Brings other nodes up to date."""

    def __init__(
        self,
        notes: Notes,
        lane: Lane,
        *,
        token: str,
        run: str,
        node: str,
        limit: Limit | None = None,
        transport: Transport = TCP,
    ) -> None:
        """`notes`: those of ranks seated here are sent as well (`keep`). `limit`: of all that is sent to peers."""
        self.whole = True  # snapshots are sent; else own state alone
        self.hold = False  # none is begun with now: ranks are still copying theirs into memory
        self._notes = notes
        self._lane = lane
        self._limit = limit
        self._dial = functools.partial(Peer, token=token, run=run, name=f"vault of {node}", transport=transport)
        self._peers: dict[str, Peer] = {}
        self._sent: dict[tuple[str, int, Kind], Mark] = {}  # peer, rank, kind -> what it has
        self._outbox: dict[str, list[Recorded]] = {}
        self._resting: dict[str, float] = {}  # peer -> until
        self._busy: set[tuple[str, int]] = set()  # peer, rank: whose state is on its way; rank NONE: notes
        self._overtaken: dict[int, float] = {}  # rank whose writer was faster than the wire -> until when it is thought to be
        self._staging = asyncio.Lock()
        self._stamping: dict[int, asyncio.Lock] = {}  # rank
        self._kept: list[Recorded] = []
        self._arrived: dict[tuple[str, int, Kind], int] = {}  # peer, rank, kind -> newest step there
        self._on_copied: Callable[[int], None] = lambda _rank: None
        self._errands = Errands()

    def watch(self, on_copied: Callable[[int], None]) -> None:
        """`on_copied(rank)` is called when `copied` of that rank may have changed."""
        self._on_copied = on_copied

    def copied(self, chest: Chest) -> int | None:
        """Newest step of which all that a successor on another node needs lies there; None if there is no other node."""
        if not self._peers:
            return None
        kind: Kind = "start" if chest.replicated or chest.snapshots is None or not self.whole else "snapshot"  # which has own state in it
        return max(self._arrived.get((address, chest.rank, kind), NONE) for address in self._peers)

    def peer(self, address: str) -> Peer:
        """A client of that vault."""
        return self._dial(address, limit=self._limit)

    def thin_peer(self, address: str) -> Peer:
        """One that is used together with several others."""
        return self._dial(address, streams=THIN)

    def set_peers(self, addresses: tuple[str, ...]) -> None:
        """Where copies go from now on. A new one is sent everything."""
        for address in self._peers.keys() - set(addresses):
            self._peers.pop(address).close()
            self._outbox.pop(address, None)
            self._sent = {key: mark for key, mark in self._sent.items() if key[0] != address}
            self._arrived = {key: step for key, step in self._arrived.items() if key[0] != address}
        for address in addresses:
            if address not in self._peers:
                self._peers[address] = self.peer(address)
                self._outbox[address] = list(self._kept)

    def keep(self, note: Recorded) -> None:
        """A rank seated here has recorded something that its successor will need."""
        self._notes.add(note)
        self._kept.append(note)
        for address, waiting in self._outbox.items():
            waiting.append(note)
            self._send_notes(address)

    def look(self, chest: Chest) -> None:
        """Start what is to be done for this rank, unless it is under way."""
        for address in self._peers:
            self._send_notes(address)
            if (address, chest.rank) not in self._busy and next(self._behind(chest, address), None) is not None:
                self._busy.add((address, chest.rank))
                self._errands.start(self._send(chest, address))

    async def close(self) -> None:
        """Stop; what is under way is not finished."""
        await self._errands.close()
        for peer in self._peers.values():
            peer.close()

    # ------------------------------------------------------------------ state

    def _behind(self, chest: Chest, address: str) -> Iterator[tuple[Kind, Slot, Mark]]:
        """What a peer lacks: (kind, slot, this writing of it). Each kind once, as it is when its turn comes."""
        for kind, ring in _rings(chest, whole=self.whole and not self.hold):
            slot = ring.newest() if self._answers(address) else None
            if slot is not None:
                mark = (slot.where, slot.generation())
                if self._sent.get((address, chest.rank, kind)) != mark:
                    yield kind, slot, mark

    async def _send(self, chest: Chest, address: str) -> None:
        try:
            for _ in range(ROUNDS_MAX):
                done = True
                for kind, slot, mark in self._behind(chest, address):
                    done = False
                    await self._send_one(address, chest.rank, kind, slot, mark)
                if done:
                    return
        finally:
            self._busy.discard((address, chest.rank))

    async def _send_one(self, address: str, rank: int, kind: Kind, slot: Slot, mark: Mark) -> None:
        try:
            if kind != "snapshot":
                step = await self._put(address, *await staged(slot, rank, kind, self._lane))  # its room has some to spare
            elif self._overtaken.get(rank, 0.0) > time.monotonic():
                async with self._staging:
                    step = await self._put(address, *await staged(slot, rank, kind, self._lane), slot.num_bytes)
            else:
                step = await self._put(address, *await self._straight(slot, rank, kind), slot.num_bytes)
        except SnapshotMissing as error:  # its writer was faster: the next round takes the newer one
            if kind == "snapshot":
                log.info("rank %d: %s; snapshots are copied before they are sent for %.0f s", rank, error, STAGED_S)
                self._overtaken[rank] = time.monotonic() + STAGED_S
            return
        except CheckpointError as error:
            log.warning("not copied to other nodes: %s", error)
            self._sent[address, rank, kind] = mark  # nor tried again
            return
        if step != NONE:
            self._sent[address, rank, kind] = mark
            self._arrived[address, rank, kind] = step
            self._on_copied(rank)

    async def _straight(self, slot: Slot, rank: int, kind: Kind) -> tuple[SnapshotKey, Slot]:
        """The slot itself, stamped. Raises SnapshotMissing if its writer was faster."""
        deadline_s = COPY_S + slot.sealed_bytes() / COPY_BYTES_S
        async with self._stamping.setdefault(rank, asyncio.Lock()):  # another peer's turn may be at it
            if not slot.is_stamped():
                await self._lane.run(slot.stamp_payload, deadline_s=deadline_s)
        step = slot.sealed_step()
        if step == NONE:
            raise SnapshotMissing(f"{kind} of rank {rank}: overwritten just now")
        return SnapshotKey(rank, step, kind), slot

    async def _put(self, address: str, key: SnapshotKey, sealed: memoryview | Slot, room: int = 0) -> int:
        """The step that lies there now; NONE if the peer did not take it. Raises SnapshotMissing, SnapshotCorrupt if that is ours."""
        peer = self._peers.get(address)
        if peer is None:
            return NONE
        try:
            await peer.put(key, sealed, room=room)
        except SnapshotMissing:
            raise
        except CheckpointError as error:
            if isinstance(error, SnapshotCorrupt) and isinstance(sealed, Slot):  # damaged on its way, or here?
                deadline_s = COPY_S + sealed.sealed_bytes() / COPY_BYTES_S
                await self._lane.run(lambda: sealed.read(rank=key.rank, step=key.step), deadline_s=deadline_s)
            self._rest(address, error)
            return NONE
        self._resting.pop(address, None)
        return key.step if self._peers.get(address) is peer else NONE

    # ------------------------------------------------------------------ notes

    def _send_notes(self, address: str) -> None:
        if self._outbox.get(address) and (address, NONE) not in self._busy and self._answers(address):
            self._busy.add((address, NONE))
            self._errands.start(self._empty_outbox(address))

    async def _empty_outbox(self, address: str) -> None:
        try:
            while waiting := self._outbox.get(address):
                await self._peers[address].leave_note(waiting[0])
                waiting.pop(0)
                self._resting.pop(address, None)
        except CheckpointError as error:
            self._rest(address, error)
        finally:
            self._busy.discard((address, NONE))

    # ------------------------------------------------------------------ peers that do not answer

    def _answers(self, address: str) -> bool:
        return self._resting.get(address, 0.0) <= time.monotonic()

    def _rest(self, address: str, error: CheckpointError) -> None:
        """Leave that peer alone for a while; the first time is told."""
        if address not in self._resting:
            log.warning("copies to %s wait: %s", address, error)
        self._resting[address] = time.monotonic() + REST_S


async def staged(slot: Slot, rank: int, kind: Kind, lane: Lane) -> tuple[SnapshotKey, memoryview]:
    """A private, stamped copy of what is sealed in `slot`. Raises SnapshotMissing if its writer was faster."""
    num_bytes = slot.sealed_bytes()
    if num_bytes <= _INLINE_BYTES:
        found, sealed = _stage(slot, num_bytes)
    else:
        found, sealed = await lane.run(lambda: _stage(slot, num_bytes), deadline_s=COPY_S + num_bytes / COPY_BYTES_S)
    return SnapshotKey(rank, found.step, kind), sealed


def _stage(slot: Slot, num_bytes: int) -> tuple[Snapshot, memoryview]:
    try:
        spare = memoryview(mmap.mmap(-1, max(num_bytes, 1)))
    except OSError as error:
        raise TierUnavailable(f"{num_bytes} bytes for a copy to be sent: {error}") from error
    found = slot.stage(spare)
    return found, spare[: found.num_bytes]


def _rings(chest: Chest, *, whole: bool) -> Iterator[tuple[Kind, Ring]]:
    if chest.own is not None:
        yield "start", chest.own.starts
        yield "gate", chest.own.gate
    if whole and chest.snapshots is not None and not chest.replicated:
        yield "snapshot", chest.snapshots
