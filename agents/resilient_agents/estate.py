"""Estate: what a world of another size left in memory, here and on other nodes, is cut for the ranks that sit here.

Think of heirs who divide an estate among new households: each says what it has room for, and is handed just that, from whichever house the
piece stands in; who comes second looks first at what the first one has carried home.

Contract: `heed` says which vaults have which old rank's snapshot; another word than before gives up what is under way. `cut` seals a rank's
snapshot in its chest (recut.py): old ranks in this node's memory are read there, others, and what is damaged here, from those vaults
(afar.py), one rank at a time, so that what two ranks of this node share comes once. The connections are closed when nothing is being cut.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import functools
import logging
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from typing import Any, Final, Self, TypeVar

from resilient.checkpoint.afar import Afar
from resilient.checkpoint.chest import MemoryTier
from resilient.checkpoint.layout import decode
from resilient.checkpoint.peer import Peer
from resilient.checkpoint.recut import Held, Source, recut
from resilient.checkpoint.reshape import own_rank
from resilient.checkpoint.slot import Slot
from resilient.checkpoint.tier import SnapshotKey
from resilient.checkpoint.transport import Transport
from resilient.core.messages import Elder, Layout
from resilient.errors import CheckpointError, SnapshotMissing, TierUnavailable
from resilient_agents.lane import Lane

CUT_S: Final = 240.0  # plus the time for the bytes; a worker waits longer (train/desk.py)
CUT_BYTES_S: Final = 8 << 20  # slower than this counts as hung
CLOSE_S: Final = 1.0
THREADS: Final = 4
T = TypeVar("T")
log = logging.getLogger("resilient.vault")


class Estate:
    """One node's share in it."""

    def __init__(self, memory: MemoryTier, dial: Callable[[str], Peer], *, run: str, transport: Transport) -> None:
        """`dial`: a client of the vault at that address."""
        self._memory = memory
        self._run = run
        self._others = functools.partial(_Others, dial, run, transport)
        self._named = self._others(())
        self._lane = Lane("cutting snapshots anew", threads=THREADS, niceness=0)  # somebody waits for it
        self._turn = threading.Lock()
        self.fetched_bytes = 0  # of payloads that lie on other nodes, in all

    def heed(self, elders: tuple[Elder, ...]) -> None:
        """Where the old ranks' snapshots are. Own vault may be among them."""
        if elders != self._named.elders:
            self._named.give_up()
            self._named = self._others(elders)

    async def cut(self, wanted: Layout) -> int:
        """A rank's snapshot of a step, in its chest. Gives the old rank whose own state it has. Raises as `recut`."""
        if wanted.reshape in self._memory.chest(wanted.rank).sealed("snapshot", wanted.world_size):
            return own_rank(wanted.rank, wanted.origin)  # for somebody who sat here a moment ago
        async with self._named.used() as others:
            sources = {rank: self._source(SnapshotKey(rank, wanted.reshape), wanted.origin, others) for rank in range(wanted.origin)}
            spare = {rank: others.source(SnapshotKey(rank, wanted.reshape), wanted.origin) for rank in sources if others.knows(rank)}
            allowed_s = CUT_S + wanted.snapshot_bytes / CUT_BYTES_S
            try:
                whose, fetched = await self._lane.run(lambda: self._cut(wanted, sources, spare, others, allowed_s), deadline_s=allowed_s)
            except CheckpointError as error:
                log.warning("step %d of %d ranks is not cut for rank %d: %s", wanted.reshape, wanted.origin, wanted.rank, error)
                raise
            self.fetched_bytes += fetched
            here, text = sum(source.near for source in sources.values()), f"step {wanted.reshape} of {wanted.origin} ranks was cut"
            log.info("%s for rank %d: %d of their snapshots are here, %d bytes of others were fetched", text, wanted.rank, here, fetched)
            return whose

    async def close(self) -> None:
        """Stop; what is under way is not finished."""
        self._named.give_up()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_S):
                await self._named.idle.wait()
        self._lane.close()

    # ------------------------------------------------------------------

    def _source(self, key: SnapshotKey, world_size: int, others: _Others) -> Source:
        chest = self._memory.chests.get(key.rank)
        slot = chest.sealed("snapshot", world_size).get(key.step) if chest is not None else None
        if slot is not None:
            return Held(slot, run=self._run, rank=key.rank, step=key.step)
        return others.source(key, world_size)

    def _cut(self, wanted: Layout, sources: dict[int, Source], spare: dict[int, Afar], asked: _Others, allowed_s: float) -> tuple[int, int]:
        """In a thread. Gives the old rank whose own state it has, and the bytes that were fetched for it."""
        chest, step, size, fetched = self._memory.chest(wanted.rank), wanted.reshape, wanted.world_size, 0

        @contextlib.contextmanager
        def turn() -> Iterator[list[Held]]:
            nonlocal fetched
            if not self._turn.acquire(timeout=allowed_s):
                raise TierUnavailable(f"snapshot rank={wanted.rank} step={step}: another rank's has not come to its end")
            before = asked.num_bytes()
            try:
                chests = [other for rank, other in sorted(self._memory.chests.items()) if other.seated and rank != wanted.rank]
                slots = [(other.rank, other.sealed("snapshot", size).get(step)) for other in chests]
                yield [Held(slot, run=self._run, rank=rank, step=step) for rank, slot in slots if slot is not None and _stamped(slot)]
            finally:
                fetched = asked.num_bytes() - before
                self._turn.release()

        if not chest.filling.acquire(timeout=allowed_s):
            raise TierUnavailable(f"snapshot rank={wanted.rank} step={step}: another copy of that rank is just coming in")
        try:
            rows = decode(wanted.rows)
            whose = recut(
                sources, rows, chest.grow_snapshots, run=self._run, rank=wanted.rank, world_size=size, step=step, turn=turn, spare=spare
            )
            return whose, fetched
        finally:
            chest.filling.release()


def _stamped(slot: Slot) -> bool:
    """Whether its payload is hashed, by now."""
    with contextlib.suppress(CheckpointError):
        if not slot.is_stamped():
            slot.stamp_payload()
        return True
    return False


class _Others:
    """Other nodes' vaults, as long as they are those to be asked."""

    def __init__(self, dial: Callable[[str], Peer], run: str, transport: Transport, elders: tuple[Elder, ...]) -> None:
        self.elders = elders
        self.idle = asyncio.Event()  # nothing is being cut
        self.idle.set()
        self._dial, self._run, self._transport = dial, run, transport
        self._over = False
        self._users = 0
        self._sources: dict[int, Afar] = {}
        self._peers: dict[str, Peer] = {}
        self._tasks: set[asyncio.Task[Any]] = set()

    @contextlib.asynccontextmanager
    async def used(self) -> AsyncIterator[Self]:
        """When the last one is done the connections are closed."""
        self._users += 1
        self.idle.clear()
        try:
            yield self
        finally:
            self._users -= 1
            if not self._users:
                for task in self._tasks:  # of a thread that was left behind
                    task.cancel()
                if self._tasks:
                    await asyncio.wait(self._tasks, timeout=CLOSE_S)
                self._sources.clear()
                for peer in self._peers.values():
                    peer.close()
                self._peers.clear()
                self.idle.set()

    def source(self, key: SnapshotKey, world_size: int) -> Afar:
        """The same for all ranks that are cut at a time. Raises SnapshotMissing."""
        if key.rank not in self._sources:
            if not (vaults := self._vaults(key.rank)):
                raise SnapshotMissing(f"{key}, of {world_size} ranks: in no node's memory")
            for address in vaults:
                if address not in self._peers:
                    self._peers[address] = self._dial(address)
            wait = functools.partial(self._wait, asyncio.get_running_loop())
            peers = [self._peers[address] for address in vaults]
            self._sources[key.rank] = Afar(peers, key, run=self._run, world_size=world_size, wait=wait, transport=self._transport)
        return self._sources[key.rank]

    def knows(self, rank: int) -> bool:
        """Whether a vault is named for that old rank."""
        return bool(self._vaults(rank))

    def _vaults(self, rank: int) -> tuple[str, ...]:
        return next((elder.vaults for elder in self.elders if elder.rank == rank), ())

    def num_bytes(self) -> int:
        """That have come."""
        return sum(source.num_bytes for source in self._sources.values())

    def give_up(self) -> None:
        """Whoever waits for another node is told."""
        self._over = True
        for task in self._tasks:
            task.cancel()

    def _wait(self, loop: asyncio.AbstractEventLoop, work: Coroutine[Any, Any, T]) -> T:
        """In a thread, for work on the event loop. Raises what it raises, SnapshotMissing if it was given up."""
        try:
            return asyncio.run_coroutine_threadsafe(self._known(work), loop).result()  # every wait inside has a deadline of its own
        except concurrent.futures.CancelledError:
            raise SnapshotMissing("given up: the run goes on from elsewhere") from None

    async def _known(self, work: Coroutine[Any, Any, T]) -> T:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            if self._over:
                work.close()
                raise asyncio.CancelledError
            return await work
        finally:
            self._tasks.discard(task)
