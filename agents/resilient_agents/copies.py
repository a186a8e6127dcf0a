"""Copies: what this node's ranks seal is sent to the vaults of other nodes, in the background.

Think of a clerk who walks past the mailboxes and carries on whatever is new; if two letters have come since his last round, he takes the
newer one, for nobody will ask for the other. He empties one mailbox after the other: the fullest one does not keep him from the rest.

Contract: of each rank the newest start, the newest gate and the newest snapshot (not where shared state is replicated: other ranks hold
that) end up at every peer: in each round own state first, and each kind once, so that one which changes faster than it travels keeps none
of the others back. One transfer per rank at a time. A snapshot is copied to private memory before it is sent, so its writer waits for
memory at most (Slot.begin), never for a peer; if the writer was faster, the newer one is taken. A peer that does not answer rests a second.
"""

from __future__ import annotations

import logging
import mmap
import time
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, Final

from resilient.checkpoint.chest import Chest
from resilient.checkpoint.notes import Notes
from resilient.checkpoint.peer import Peer
from resilient.checkpoint.ring import Ring
from resilient.checkpoint.snapshot import Slot, Snapshot
from resilient.checkpoint.tier import Kind, SnapshotKey
from resilient.core.messages import NONE, Recorded
from resilient.errors import CheckpointError, SnapshotMissing, TierUnavailable
from resilient_agents.lane import Errands, Lane

REST_S: Final = 1.0
ROUNDS_MAX: Final = 20  # of one rank, through all kinds, before the next look decides anew
COPY_S: Final = 60.0  # plus the time for the bytes
COPY_BYTES_S: Final = 100 << 20  # slower than this, a copy within memory counts as hung
_INLINE_BYTES: Final = 256 << 10  # copied on the spot: less work than handing it to a thread
Mark = tuple[str, int]  # slot, generation: one writing of it
log = logging.getLogger("resilient.vault")


class Copies:
    """Brings other nodes up to date."""

    def __init__(self, notes: Notes, lane: Lane, *, token: str, run: str, node: str) -> None:
        """`notes`: those of ranks seated here are sent as well (`keep`)."""
        self._notes = notes
        self._lane = lane
        self._token, self._run, self._node = token, run, node
        self._peers: dict[str, Peer] = {}
        self._sent: dict[tuple[str, int, Kind], Mark] = {}  # peer, rank, kind -> what it has
        self._outbox: dict[str, list[Recorded]] = {}
        self._resting: dict[str, float] = {}  # peer -> until
        self._busy: set[int | str] = set()  # ranks whose state, peers whose notes are on their way
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
        kinds: list[Kind] = ["start"] if chest.replicated or chest.snapshots is None else ["start", "snapshot"]
        return max(min(self._arrived.get((address, chest.rank, kind), NONE) for kind in kinds) for address in self._peers)

    def peer(self, address: str) -> Peer:
        """A client of that vault."""
        return Peer(address, token=self._token, run=self._run, name=f"vault of {self._node}")

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
        if chest.rank not in self._busy and next(self._behind(chest), None) is not None:
            self._busy.add(chest.rank)
            self._errands.start(self._send(chest))

    async def close(self) -> None:
        """Stop; what is under way is not finished."""
        await self._errands.close()
        for peer in self._peers.values():
            peer.close()

    # ------------------------------------------------------------------ state

    def _behind(self, chest: Chest) -> Iterator[tuple[Kind, Slot, Mark, list[str]]]:
        """What some peers lack: (kind, slot, this writing of it, those peers). Each kind once, as it is when its turn comes."""
        for kind, ring in _rings(chest):
            now = time.monotonic()
            peers = [address for address in self._peers if self._resting.get(address, 0.0) <= now]
            slot = ring.newest() if peers else None
            if slot is not None:
                mark = (slot.where, slot.generation())
                lacking = [address for address in peers if self._sent.get((address, chest.rank, kind)) != mark]
                if lacking:
                    yield kind, slot, mark, lacking

    async def _send(self, chest: Chest) -> None:
        try:
            for _ in range(ROUNDS_MAX):
                done = True
                for kind, slot, mark, lacking in self._behind(chest):
                    done = False
                    await self._send_one(chest.rank, kind, slot, mark, lacking)
                if done:
                    return
        finally:
            self._busy.discard(chest.rank)

    async def _send_one(self, rank: int, kind: Kind, slot: Slot, mark: Mark, lacking: list[str]) -> None:
        try:
            key, sealed = await staged(slot, rank, kind, self._lane)
        except SnapshotMissing:
            return  # its writer was faster: the next round takes the newer one
        except CheckpointError as error:
            log.warning("not copied to other nodes: %s", error)
            self._sent.update({(address, rank, kind): mark for address in lacking})  # nor tried again
            return
        for address in lacking:
            if await self._try(address, lambda peer: peer.put(key, sealed)):
                self._sent[address, rank, kind] = mark
                self._arrived[address, rank, kind] = key.step
                self._on_copied(rank)

    # ------------------------------------------------------------------ notes

    def _send_notes(self, address: str) -> None:
        if self._outbox.get(address) and address not in self._busy and self._resting.get(address, 0.0) <= time.monotonic():
            self._busy.add(address)
            self._errands.start(self._empty_outbox(address))

    async def _empty_outbox(self, address: str) -> None:
        try:
            while waiting := self._outbox.get(address):
                if not await self._try(address, lambda peer, note=waiting[0]: peer.leave_note(note)):  # type: ignore[misc]
                    return
                waiting.pop(0)
        finally:
            self._busy.discard(address)

    async def _try(self, address: str, request: Callable[[Peer], Coroutine[Any, Any, None]]) -> bool:
        """Whether it worked. If not, that peer rests, and the first time is told."""
        if address not in self._peers:
            return False
        try:
            await request(self._peers[address])
        except CheckpointError as error:
            if address not in self._resting:
                log.warning("copies to %s wait: %s", address, error)
            self._resting[address] = time.monotonic() + REST_S
            return False
        self._resting.pop(address, None)
        return True


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


def _rings(chest: Chest) -> Iterator[tuple[Kind, Ring]]:
    if chest.own is not None:
        yield "start", chest.own.starts
        yield "gate", chest.own.gate
    if chest.snapshots is not None and not chest.replicated:
        yield "snapshot", chest.snapshots
