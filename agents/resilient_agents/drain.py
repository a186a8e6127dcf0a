"""Drain: snapshots flow from memory to the persistent tier; training is not involved.

Think of a ship that is unloaded while it waits for its next voyage; one that sails at once has its crates put onto the quay first (private
memory), from where they go, in their own time, into the warehouse.

Contract: a snapshot of a rank seated here that is `due(rank, step)` is written in the background as soon as it is seen sealed, straight
from its slot without holding up its writer, or, where that one comes back too soon, from a copy; then it is listed in `persisted`.
`commit` writes the marker and removes old checkpoints, and is tried again while storage does not answer. At most two snapshots per rank
are on the quay; one more is left out (the next one comes). Every use of storage has
a deadline; what hangs is left behind (lane.py).
"""

from __future__ import annotations

import asyncio
import errno
import functools
import logging
from collections.abc import Callable, Collection, Iterable
from typing import Final

from resilient.checkpoint import layout
from resilient.checkpoint.chest import Berth, Chest
from resilient.checkpoint.disk import DiskTier
from resilient.checkpoint.retention import KEEP, Keep
from resilient.checkpoint.slot import Slot
from resilient.checkpoint.source import Live, Source, Whole
from resilient.checkpoint.tier import SnapshotKey
from resilient.core.messages import NONE, Finding, Layout, Persisted
from resilient.errors import CheckpointError, ReplicasDiffer, SnapshotCorrupt, SnapshotMissing, TierUnavailable
from resilient_agents.copies import staged
from resilient_agents.lane import Errands, Lane

QUAY_MAX: Final = 2  # per rank: one being written, one waiting
ANSWER_S: Final = 60.0  # for listing, a manifest, a marker, a removal
RANKS_S: Final = 20  # ranks whose files a commit looks at in a second, at least
TAILS_BYTES_S: Final = 100_000  # of what these say: 1000 tensors; the index has several entries of each
PACE_BYTES_S: Final = 5 << 20  # slower than this, storage counts as hung
RETRY_S: Final = (0.2, 1.0, 2.0, 5.0, 10.0, 30.0)  # the last one again and again
STEPS_KEPT: Final = 4  # newest steps of a rank in `persisted`: some rank may lag behind
log = logging.getLogger("resilient.vault")


class Drain:
    """This node's use of the checkpoint URL."""

    def __init__(
        self,
        url: str,
        due: Callable[[int, int], bool],
        *,
        keep: Keep = KEEP,
        level: int = 0,
        run: str,
        lane: Lane,
        changed: Callable[[], None],
        differ: Callable[[int, ReplicasDiffer], None],
    ) -> None:
        """`due(rank, step)`: whether that snapshot is to be written. `level`: of zstandard. `lane`: for copies in memory.

        `differ`: a step was not committed because its replicas are not equal. Raises TierUnavailable.
        """
        self.available: tuple[int, ...] | None = None  # committed steps that were there at the start; None = not listed yet
        self.committed = NONE  # the newest one since
        self._writing = Lane("checkpoint storage (writing)", niceness=10)
        self.tier = DiskTier(url, level=level, wanted=self._writing.wanted)
        self._keep = keep
        self._due = due
        self._run = run
        self._copying = lane
        self._reading = Lane("checkpoint storage (reading)", threads=4, niceness=0)  # somebody waits for it
        self._changed, self._differ = changed, differ
        self.trouble: Callable[[Finding], None] = lambda _: None  # told of each file that could not be written
        self._persisted: dict[SnapshotKey, Persisted] = {}
        self._distrusted: set[int] = set()
        self._heeded: frozenset[int] = frozenset()  # of these, those that the coordinator told of
        self._seen: dict[str, tuple[int, int]] = {}  # slot -> (generation, step) of its last snapshot that was looked at
        self._quay: dict[int, int] = {}  # rank -> snapshots on it
        self._outrun: set[int] = set()  # ranks that wrote into a slot before it was drained: theirs are copied first
        self._brought: set[tuple[int, int]] = set()  # (rank, step) that came from the persistent tier: they need not go there again
        self._wish: tuple[int, tuple[Persisted, ...]] = (NONE, ())
        self._errands = Errands()

    def start(self) -> None:
        """Begin to list what is there."""
        self._errands.start(self._list())

    async def settle(self, timeout_s: float) -> bool:
        """Wait for what is being written now; whether all of it is done."""
        return await self._errands.settle(timeout_s)

    async def close(self) -> None:
        """Stop; what is being written is not committed."""
        await self._errands.close()
        for lane in (self._writing, self._reading):
            lane.close()

    # ------------------------------------------------------------------ writing

    def look(self, chest: Chest) -> None:
        """Start to write what is due."""
        for slot in chest.snapshots.slots if chest.snapshots is not None else ():
            if chest.native and slot.world_size() != self.tier.world_size:
                continue  # left by a world of another size: it is a part of nothing that this one commits
            now = (slot.generation(), slot.sealed_step())
            if (chest.rank, now[1]) in self._brought and now[1] not in self._distrusted:
                continue
            if now[1] <= 0 or not self._due(chest.rank, now[1]) or self._seen.get(slot.path) == now:
                continue
            self._seen[slot.path] = now
            if self._quay.get(chest.rank, 0) >= QUAY_MAX:
                log.warning("checkpoint of step %d left out for rank %d: storage is slower than training", now[1], chest.rank)
                continue
            self._quay[chest.rank] = self._quay.get(chest.rank, 0) + 1
            self._errands.start(self._write(slot, chest.rank, often=chest.often))

    def persisted(self) -> tuple[Persisted, ...]:
        """What lies there complete and waits for its commit marker."""
        return tuple(part for _, part in sorted(self._persisted.items()))

    async def _write(self, slot: Slot, rank: int, *, often: bool) -> None:
        try:
            deadline_s = ANSWER_S + slot.sealed_bytes() / PACE_BYTES_S
            if often or rank in self._outrun:
                _, sealed = await staged(slot, rank, "snapshot", self._copying)
                part = await self._writing.run(lambda: self._put(rank, Whole(sealed)), deadline_s=deadline_s)
            else:
                with slot.marked():
                    part = await self._writing.run(lambda: self._put(rank, Live(slot)), deadline_s=deadline_s)
            self._persisted[SnapshotKey(rank, part.step)] = part
        except SnapshotMissing as error:
            self._outrun.add(rank)
            log.warning("rank %d left out of a checkpoint: %s", rank, error)
        except CheckpointError as error:
            log.warning("rank %d is missing in a checkpoint: %s", rank, error)
            self.trouble(told(rank, self.tier.url, error))
        else:
            kept = sorted(key.step for key in self._persisted if key.rank == rank)[-STEPS_KEPT:]
            self._forget(key for key in self._persisted if key.rank == rank and key.step < kept[0])
            self._changed()
        finally:
            self._quay[rank] -= 1

    def _put(self, rank: int, source: Source) -> Persisted:
        key = SnapshotKey(rank, source.found.step)
        return self.tier.write(key, source, again=key.step in self._distrusted)

    # ------------------------------------------------------------------ committing

    def commit(self, step: int, manifest: tuple[Persisted, ...]) -> None:
        """Write the marker of `step`, in the background. Another call replaces this one."""
        if step not in (NONE, self.committed) and (step, manifest) != self._wish:
            self._wish = (step, manifest)
            self._errands.start(self._commit(step, manifest))

    async def _commit(self, step: int, manifest: tuple[Persisted, ...]) -> None:
        work = functools.partial(self.tier.commit, step, manifest, run=self._run)
        for pause_s in _pauses():
            if self._wish != (step, manifest):
                return
            try:
                await self._writing.run(work, deadline_s=commit_s(manifest))
                break
            except TierUnavailable as error:
                log.warning("checkpoint of step %d is not committed yet: %s", step, error)
            except ReplicasDiffer as error:
                self._differ(step, error)
                return
            except CheckpointError as error:
                log.warning("checkpoint of step %d is given up: %s", step, error)
                return
            await asyncio.sleep(pause_s)
        self.committed = step
        self._distrusted.discard(step)
        self._forget(key for key in self._persisted if key.step <= step)
        self._changed()
        await self._prune()

    async def _prune(self) -> None:
        try:
            work = functools.partial(self.tier.prune, self._keep, distrusted=frozenset(self._distrusted))
            gone = await self._writing.run(work, deadline_s=ANSWER_S)
        except CheckpointError as error:
            log.warning("old checkpoints are not removed: %s", error)
            return
        if not set(gone).isdisjoint(self.available or ()):
            self.available = tuple(step for step in self.available or () if step not in gone)
            self._changed()

    def _forget(self, keys: Iterable[SnapshotKey]) -> None:
        for key in list(keys):
            del self._persisted[key]

    # ------------------------------------------------------------------ reading

    async def _list(self) -> None:
        for pause_s in _pauses():
            try:
                self.available = await self._reading.run(self.tier.steps, deadline_s=ANSWER_S)
                break
            except TierUnavailable as error:
                log.warning("checkpoints are not listed yet: %s", error)
            await asyncio.sleep(pause_s)
        self._changed()

    async def fetch(self, key: SnapshotKey, berth: Berth) -> None:
        """Bring a committed snapshot into memory, verified. Raises as `Tier.get`."""
        self._brought.add((key.rank, key.step))
        entry = await self._reading.run(functools.partial(self.tier.entry, key), deadline_s=ANSWER_S)
        work = functools.partial(self.tier.get, key, berth)
        await self._reading.run(work, deadline_s=ANSWER_S + entry.bytes / PACE_BYTES_S)

    async def reshape(self, wanted: Layout, chest: Chest) -> int:
        """As DiskTier.reshape, for the rank and step that `wanted` names, into its chest. SnapshotMissing if that step fits as it is."""
        if not await self.foreign(wanted.reshape):
            raise SnapshotMissing(f"rank {wanted.rank} step {wanted.reshape}: what was fetched of it is not here any more")
        self._brought.add((wanted.rank, wanted.reshape))
        key, rows = SnapshotKey(wanted.rank, wanted.reshape), layout.decode(wanted.rows)

        def work() -> int:
            if not chest.filling.acquire(timeout=ANSWER_S):
                raise TierUnavailable(f"{key}: another copy of that rank is just coming in")
            try:
                return self.tier.reshape(key, rows, chest.grow_snapshots, run=self._run, world_size=wanted.world_size, begun=wanted.own)
            finally:
                chest.filling.release()

        try:
            return await self._reading.run(work, deadline_s=2 * ANSWER_S + wanted.snapshot_bytes / PACE_BYTES_S)
        except CheckpointError as error:
            log.warning("checkpoint of step %d refused for rank %d: %s", wanted.reshape, wanted.rank, error)
            if isinstance(error, SnapshotCorrupt):
                self.distrust(wanted.reshape)
            raise

    async def foreign(self, step: int) -> bool:
        """Whether that step was written in a world of another size, or imported: then it fits no rank as it is."""
        manifest = await self._reading.run(functools.partial(self.tier.manifest, step), deadline_s=ANSWER_S)
        return bool(manifest.origin) or self.tier.world_size not in (None, manifest.world_size)

    def distrust(self, step: int) -> None:
        """Its bytes were read and found wrong: if the run comes past that step again, it is written anew."""
        self._distrusted.add(step)
        if step == self.committed:
            self.committed, self._wish = NONE, (NONE, ())

    def heed(self, steps: Collection[int], world_size: int) -> None:
        """`steps`: what any node found wrong. Who read other files of such a step writes it anew as well: no two attempts are ever mixed.

        `world_size`: of the run, 0 = not known yet.
        """
        self.tier.world_size = world_size or self.tier.world_size
        for step in sorted(self._heeded - set(steps)):
            self._distrusted.discard(step)  # it has been committed anew
        for step in sorted(set(steps) - self._heeded):
            self.distrust(step)
        self._heeded = frozenset(steps)


def told(rank: int, url: str, error: CheckpointError) -> Finding:
    """What the probes would say, who look at that storage now and then: we know it at once. The run goes on, without this checkpoint."""
    cause = error.__cause__
    code = errno.errorcode.get(cause.errno or 0, "") if isinstance(cause, OSError) else ""
    kind = "disk-full" if code in {"ENOSPC", "EDQUOT"} else "io-error"
    return Finding(
        seq=0,
        kind=kind,
        rank=rank,
        probe="checkpoint",
        layer="storage",
        code=code,
        device=f"dev:{url}",
        class_="app-restart",
        role="context",
        text=f"rank {rank} is missing in a checkpoint: {error}",
    )


def commit_s(manifest: Collection[Persisted]) -> float:
    """How long a commit may take: it reads all tails, and writes an index of all tensors."""
    tails = sum(part.num_bytes - part.tail_at for part in manifest)
    return ANSWER_S + len(manifest) / RANKS_S + tails / TAILS_BYTES_S


def _pauses() -> Iterable[float]:
    yield from RETRY_S
    while True:
        yield RETRY_S[-1]
