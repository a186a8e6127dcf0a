"""Vault: the agent's keeper of all copies of state. It owns the memory tier, serves peers, and drains to the persistent tier.

Think of a bank's strong-room: customers put things into their own boxes whenever they like and never wait for the staff; the staff walk
by, see what is new, and carry duplicates to a branch in another town and, now and then, to the archive.

Contract: used from one event loop; nothing here blocks it except `allocate`, which is called from a thread. `all_seals` is cheap and is
called at every look; it also notices what is new and starts the copying (`poke`). `do` says what should be, and may be repeated.
Results come as `known()`, and `watch` tells when that has changed. When the vault is closed with `unlink`, no file of it is left.
A fault of a copy or of storage is never an exception here: it becomes `Refused`, or a warning and another try.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

import msgspec

from resilient.checkpoint.chest import SLOT_COUNT, MemoryTier
from resilient.checkpoint.haul import TCP, Limit
from resilient.checkpoint.holder import PeerServer
from resilient.checkpoint.notes import Notes
from resilient.checkpoint.retention import KEEP, Keep
from resilient.checkpoint.ring import own_slot_bytes
from resilient.checkpoint.tier import SnapshotKey
from resilient.checkpoint.transport import Transport
from resilient.core.machine import Seals, VaultDo, Vaulted
from resilient.core.messages import NONE, Fetch, Finding, Layout, Persisted, Recorded, Refused, Segments
from resilient.errors import CheckpointError, ReplicasDiffer, SnapshotMissing, TierUnavailable
from resilient_agents import inventory
from resilient_agents.audits import Audits
from resilient_agents.copies import Copies
from resilient_agents.courier import Courier
from resilient_agents.drain import Drain
from resilient_agents.estate import Estate
from resilient_agents.hashing import Hashing
from resilient_agents.heir import Heir
from resilient_agents.lane import Errands, Lane
from resilient_agents.parities import Parities

FILLING_S: Final = 3600.0  # an allocation waits for a fetch into the same chest, which has deadlines of its own
FETCH_PATIENCE_S: Final = 30.0  # with a peer or storage that does not answer: three leases, so a dead node is known before
FETCH_PAUSE_S: Final = 0.5
REFUSED_MAX: Final = 256
log = logging.getLogger("resilient.vault")


class Vault:
    """All copies that one node keeps."""

    def __init__(
        self,
        *,
        run: str,
        directory: Path | str,
        key: str,
        checkpoint_url: str | None,
        checkpoint_every: int,
        keep: Keep = KEEP,
        level: int = 0,
        token: str,
        node: str,
        host: str = "127.0.0.1",
        bind: str = "127.0.0.1",
        data_rate: int = 0,
        transport: Transport = TCP,
        keep_s: float = 0.0,
        position: int = NONE,
        alone: bool = False,
    ) -> None:
        """`checkpoint_every`: steps between two checkpoints, 0 = only those that `sealed` tells of.

        `directory`, `key`: see checkpoint/memory.py. `host`: how other nodes reach this one; `bind`: where to listen.
        `data_rate`: bytes/s at most sent to keep copies elsewhere, 0 = any number; what another node fetches is not held back.
        `keep_s`, `position`, `alone`: see heir.py. Raises TierUnavailable if the URL is of a kind that cannot be opened.
        """
        self._host, self._bind = host, bind
        url = checkpoint_url or ""
        self.heir = Heir(directory, key, run=run, url=url, node=node, position=position, keep_s=keep_s, alone=alone)
        self._memory = MemoryTier(directory, key)
        self._notes = Notes()
        self._lane = Lane("memory", threads=2)
        limit = Limit(data_rate) if data_rate else None
        self._server = PeerServer(self._memory, self._notes, token=token, run=run, limit=limit, transport=transport)
        self._server.changed = self._changed
        self._copies = Copies(self._notes, self._lane, token=token, run=run, node=node, limit=limit, transport=transport)
        self._parities = Parities(self._memory, self._lane, self._copies.thin_peer, run=run, changed=self._changed, transport=transport)
        self._server.heard = self._parities.heard
        self._estate = Estate(self._memory, self._copies.peer, run=run, transport=transport)
        self._drain: Drain | None = None
        if checkpoint_url:
            self._drain = Drain(
                checkpoint_url, self._due, keep=keep, level=level, run=run, lane=self._lane, changed=self._changed, differ=self._differ
            )
        self._every, self._rescue = checkpoint_every, NONE
        self._sealed: dict[int, int] = {}  # rank -> newest step that it sealed for the persistent tier
        self._run, self._round, self._position, self._world_size = run, 0, NONE, 0
        self._address = ""
        self._ranks: frozenset[int] = frozenset()
        self._fetches: dict[Fetch, bool] = {}  # those wanted -> whether they are here
        self._coming: set[int] = set()  # ranks of which copies are just being fetched
        self._refused: dict[tuple[str, int, int], Refused] = {}
        self._sweep = inventory.Sweep(self._memory)
        self._boundary = inventory.Boundary()
        self._hashing = Hashing(self._lane)
        self.audits = Audits(self._memory, self._lane, self._hashing.spent, self._copies.thin_peer, self._changed)
        self._server.sheet = self.audits.sheet
        self._errands = Errands()
        self._told = Vaulted()
        self._on_change: Callable[[], None] = lambda: None
        self._on_note: Callable[[Recorded], None] = lambda _: None

    # ------------------------------------------------------------------ life

    async def start(self) -> int:
        """Take over what a dead agent of this run left, listen for peers, begin to list checkpoints. The data port."""
        await self.heir.take(self._memory, self._lane)
        port = await self._server.start(self._bind)
        self._address = f"{self._host}:{port}"
        if self._drain is not None:
            self._drain.start()
        return port

    async def settle(self, timeout_s: float) -> bool:
        """Wait until what is being written to the persistent tier is there, and committed if that was asked for."""
        return self._drain is None or await self._drain.settle(timeout_s)

    async def close(self, *, unlink: bool = True) -> None:
        """Stop everything; with `unlink` remove the files, else leave them to a successor, if one may come."""
        await self._server.close()
        await self._errands.close()
        await self._hashing.close()
        await self.audits.close()
        await self._copies.close()
        await self._parities.close()
        await self._estate.close()
        if self._drain is not None:
            await self._drain.close()
        self._lane.close()
        if unlink:
            self._memory.unlink()
        self.heir.close(over=unlink)

    def watch(
        self,
        changed: Callable[[], None],
        note: Callable[[Recorded], None] | None = None,
        copied: Callable[[int], None] = lambda _rank: None,
        trouble: Callable[[Finding], None] = lambda _finding: None,
    ) -> None:
        """`changed`: `known()` has; `note`: a Recorded came with a fetched rank; `copied(rank)`: see there; `trouble`: see drain.told."""
        self.audits.watch(copied)
        self._copies.watch(copied)
        self._parities.watch(copied)
        self._on_change, self._on_note = changed, note or self._on_note
        if self._drain is not None:
            self._drain.trouble = trouble

    # ------------------------------------------------------------------ what the host asks

    def allocate(self, layout: Layout) -> Segments:
        """Make the segments of a chair, or take those that it has. Blocks (0.3 s per GB): call it from a thread."""
        chest = self._memory.chest(layout.rank)
        if not chest.filling.acquire(timeout=FILLING_S):
            return inventory.no_segments(layout, "a copy that is being brought in did not arrive")
        try:
            chest.seated = True
            return inventory.allocate(chest, layout, self.heir.make_room)
        except TierUnavailable as error:
            ranks = max(len(self._ranks), 1)
            total = ranks * (3 * own_slot_bytes(layout.own_bytes) + SLOT_COUNT * layout.snapshot_bytes)
            return inventory.no_segments(layout, f"{error}; for all ranks of this node, {ranks}, about {total} bytes are needed")
        except OSError as error:
            return inventory.no_segments(layout, f"memory tier: {error}")
        finally:
            chest.filling.release()

    async def reshape(self, layout: Layout) -> Segments:
        """As `allocate`, and bring a step into these segments that was written in a world of another size."""
        segments = await asyncio.to_thread(self.allocate, layout)
        if segments.error or layout.reshape == NONE:
            return segments
        try:
            own_of = await self._cut(layout)
        except CheckpointError as error:
            return msgspec.structs.replace(segments, refused=str(error))
        segments = await asyncio.to_thread(self.allocate, layout)  # they may have grown
        return msgspec.structs.replace(segments, own_of=own_of)

    async def _cut(self, layout: Layout) -> int:
        if layout.origin:
            return await self._estate.cut(layout)
        if self._drain is None:
            raise SnapshotMissing("no checkpoint URL was given")
        return await self._drain.reshape(layout, self._memory.chest(layout.rank))

    def all_seals(self) -> dict[int, Seals]:
        """What every chest holds, by rank; and start to copy what is new."""
        self.poke()
        return {rank: inventory.seals(chest, self._world_size) for rank, chest in sorted(self._memory.chests.items())}

    def seals(self, rank: int) -> tuple[int, int, tuple[int, ...]]:
        """(newest start, gate, snapshot steps) of one rank."""
        found = inventory.seals(self._memory.chests[rank]) if rank in self._memory.chests else Seals()
        return max(found.own_steps, default=NONE), found.gate_step, tuple(found.snapshots)

    def snapshot_path(self, rank: int, step: int) -> str:
        """The file with that snapshot, "" if it is not here."""
        chest = self._memory.chests.get(rank)
        return chest.sealed("snapshot")[step].path if chest is not None and step in chest.sealed("snapshot") else ""

    def own_segment(self, rank: int) -> tuple[str, int]:
        """(path, bytes of one slot) of a rank's own state, ("", 0) if there is none."""
        chest = self._memory.chests.get(rank)
        return (chest.own_path, chest.own.own_bytes) if chest is not None and chest.own is not None else ("", 0)

    def known(self) -> Vaulted:
        """All results, as the agent's machine takes them."""
        drain = self._drain
        return Vaulted(
            holdings=inventory.all_holdings(self._memory, self._world_size),
            persisted=drain.persisted() if drain is not None else (),
            refused=tuple(self._refused.values()),
            past=self.heir.past,
            available=drain.available if drain is not None else (),
            fetched=tuple(fetch for fetch, here in self._fetches.items() if here),
            committed=drain.committed if drain is not None else NONE,
            parities=self._parities.known(),
            audit=self.audits.known(),
            compared=self.audits.compared,
        )

    # ------------------------------------------------------------------ what the host says

    def do(self, wish: VaultDo) -> None:
        """All that should be; a later one replaces an earlier one."""
        self._ranks = frozenset(wish.ranks)
        for rank, chest in sorted(self._memory.chests.items()):
            chest.seated = rank in self._ranks
            if wish.round > self._round and not (chest.seated and self._round):  # before our first round no worker has written here
                inventory.end_futures(chest, wish.step)
        self._round, self._position, self._world_size = max(self._round, wish.round), wish.node_rank, wish.world_size
        self.set_peers(wish.peers)
        self._estate.heed(wish.elders)
        self._copies.whole = not wish.group
        self._parities.set_group(wish.group, self._address)
        self._rescue = wish.rescue
        if self._drain is not None:
            self._drain.heed(wish.distrusted, wish.world_size)
        self._fetches = {f: here for f, here in self._fetches.items() if f in wish.fetch}
        for fetch in wish.fetch:
            self.fetch(fetch)
        self.commit(wish.commit, wish.manifest)
        self.audits.compare(wish.compare, self._address)
        self._changed()

    def sealed(self, rank: int, step: int) -> None:
        """The worker of this rank says that `step`, its newest so far, is for the persistent tier."""
        self._sealed[rank] = step

    def _due(self, rank: int, step: int) -> bool:
        """Whether a snapshot goes to the persistent tier."""
        by_interval = self._every > 0 and step % self._every == 0
        return by_interval or step in (self._sealed.get(rank, NONE), self._rescue)

    def copied(self, rank: int) -> int | None:
        """See Copies.copied and Parities.copied; None also for a rank of which nothing is known."""
        chest = self._memory.chests.get(rank)
        found = (self._copies.copied(chest), self._parities.copied(chest)) if chest is not None else ()
        return min((step for step in found if step is not None), default=None)

    def set_peers(self, addresses: tuple[str, ...]) -> None:
        """Vaults that copies from here go to."""
        self._copies.set_peers(tuple(address for address in addresses if address != self._address))

    def keep(self, note: Recorded) -> None:
        """Copy this to the peers, beside the rank's own state."""
        self._copies.keep(note)
        self.heir.keep(note)

    def commit(self, step: int, manifest: tuple[Persisted, ...]) -> None:
        """Write the commit marker of `step`."""
        if self._drain is not None:
            self._drain.commit(step, manifest)

    def fetch(self, wanted: Fetch) -> None:
        """Bring that copy here, unless it is here or on its way. Shows in `known().fetched`, or in `.refused`."""
        if wanted not in self._fetches:
            self._fetches[wanted] = False
            self._memory.chest(wanted.rank).seated = wanted.rank in self._ranks
            self._errands.start(self._fetch(wanted))

    def poke(self) -> None:
        """A look happened: start to copy, to hash, to write what is new."""
        self.heir.seen(tuple(sorted(self._ranks)), self._position)
        seated = [chest for _, chest in sorted(self._memory.chests.items()) if chest.seated]
        self._copies.hold = self._boundary.is_open(seated, time.monotonic())
        for chest in seated:
            if chest.rank not in self._coming:  # half of what comes must not go back to where the other half still has to be fetched
                self._copies.look(chest)
                if not self._copies.hold:
                    self._parities.look(chest)
            if self._drain is not None:
                self._drain.look(chest)
            inventory.drop_outdated(chest)
        wanted = {fetch.rank for fetch in self._fetches} | self._parities.kept()
        self._sweep.look(min((chest.start_step() for chest in seated), default=NONE), wanted)
        self._hashing.look(() if self._copies.hold else seated)

    # ------------------------------------------------------------------ bringing copies here

    async def _fetch(self, wanted: Fetch) -> None:
        patient_until = time.monotonic() + FETCH_PATIENCE_S
        elsewhere = wanted.tier == "peer" and wanted.source not in ("", self._address)
        courier = Courier(wanted, self._copies.peer(wanted.source), self._memory, self._notes) if elsewhere else None
        self._coming.add(wanted.rank)
        try:
            while wanted in self._fetches:
                try:
                    await (self._fetch_persistent(wanted) if wanted.tier == "persistent" else self._fetch_peer(wanted, courier))
                    break
                except CheckpointError as error:
                    if not isinstance(error, TierUnavailable) or time.monotonic() > patient_until:
                        self._tell_notes(wanted.rank)
                        self._refuse(wanted, error)
                        return
                await asyncio.sleep(FETCH_PAUSE_S)
        finally:
            self._coming.discard(wanted.rank)
            if courier is not None:
                courier.close()
        self._tell_notes(wanted.rank)
        if wanted in self._fetches:
            self._fetches[wanted] = True
        self._changed()

    def _tell_notes(self, rank: int) -> None:
        """Whatever became of the copy: a newcomer on that chair will ask for the minutes of the set-up."""
        for note in self._notes.of(rank):
            self._on_note(note)

    async def _fetch_persistent(self, wanted: Fetch) -> None:
        if self._drain is None:
            raise SnapshotMissing("no checkpoint URL was given")
        if await self._drain.foreign(wanted.step):
            return  # the worker says what it tracks, and it is cut to that (`reshape`)
        key = SnapshotKey(wanted.rank, wanted.step)
        with self._memory.berth(key) as berth:
            await self._drain.fetch(key, berth)

    async def _fetch_peer(self, wanted: Fetch, courier: Courier | None) -> None:
        """From another node; None: from ourselves."""
        rank = wanted.rank
        for note in self.heir.minutes if wanted.tier == "memory" else ():
            self._notes.add(note)
        if courier is not None:
            await courier.bring()
        if wanted.rebuild is not None and wanted.step not in self._memory.chest(rank).sealed("snapshot"):
            with self._memory.berth(SnapshotKey(rank, wanted.step)) as berth:
                await self._parities.rebuild(wanted, berth)
        if not self._holds(wanted):
            raise SnapshotMissing(f"rank {rank} step {wanted.step}: nothing of it at {wanted.source}")

    def _holds(self, wanted: Fetch) -> bool:
        """Whether what was asked for is in memory: the snapshot; for a peer's, own state of that step or of the one before will do.

        The gate of the one before may be missing: it was sealed last, and its node died before it was copied (train/loop.py).
        """
        chest = self._memory.chest(wanted.rank)
        starts = chest.sealed("start") if wanted.tier != "persistent" and wanted.rebuild is None else {}
        return wanted.step in chest.sealed("snapshot") or wanted.step in starts or wanted.step - 1 in starts

    def _refuse(self, wanted: Fetch, error: CheckpointError) -> None:
        log.warning("copy refused (%s tier, step %d, rank %d): %s", wanted.tier, wanted.step, wanted.rank, error)
        if (damaged := not isinstance(error, TierUnavailable)) and self._drain is not None and wanted.tier == "persistent":
            self._drain.distrust(wanted.step)
        self._tell(Refused(tier=wanted.tier, step=wanted.step, rank=wanted.rank, reason=str(error), damaged=damaged))

    def _differ(self, step: int, error: ReplicasDiffer) -> None:
        """Replicas that should be equal are not: that step is not committed, and somebody has to look at these ranks."""
        log.warning("checkpoint not committed: %s", error)
        for rank in sorted(error.ranks):
            self._tell(Refused(tier="persistent", step=step, rank=rank, reason=str(error), kind="replicas_differ"))

    def _tell(self, refused: Refused) -> None:
        if len(self._refused) < REFUSED_MAX:
            self._refused[refused.tier, refused.step, refused.rank] = refused
        self._changed()

    # ------------------------------------------------------------------ telling

    def _changed(self) -> None:
        now = self.known()
        if now != self._told:
            self._told = now
            self._on_change()
