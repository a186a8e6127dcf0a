"""Heir: what a dead agent of this run left in memory is taken over by its successor.

Think of a ship found adrift with its cargo: whoever comes under the same flag boards it, looks into every crate, throws overboard what the
sea has spoilt, and reports the rest to the harbour.

Contract: `take` gives this node's memory tier the chests that a predecessor left (deed.py says whose they are, and that of two heirs one
has them), each slot checked as far as it can be: the header with its run and rank, own state whole, the payload wherever it had been
hashed. What is wrong is unsealed, with a warning, and so never told of; a payload that nobody had hashed yet is hashed now. `seen` says now
and then that we live, and who sits here. `close(over=True)` leaves nothing; else all of it lies there for the next one.
With `keep_s` 0 nothing is taken and nothing left. docs/decisions/0015-adoption.md.
"""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import Final

import msgspec

from resilient.checkpoint import deed, memory
from resilient.checkpoint.chest import Chest, MemoryTier, rank_of
from resilient.checkpoint.deed import Deed, Heap
from resilient.checkpoint.slot import Slot
from resilient.checkpoint.tier import KINDS
from resilient.core.messages import NONE, Recorded
from resilient.errors import CheckpointError, SnapshotMissing
from resilient_agents.lane import Lane

SEEN_S: Final = 30.0  # a small file in memory
CHECK_S: Final = 60.0  # plus the time for the bytes
CHECK_BYTES_S: Final = 100 << 20  # slower than this, memory counts as hung
log = logging.getLogger("resilient.vault")


class Heir:
    """One node's share in what its run holds in memory, beyond the life of its agent."""

    def __init__(
        self, directory: Path | str, key: str, *, run: str, url: str, node: str, position: int, keep_s: float, alone: bool
    ) -> None:
        """`position`: of this node among those of the run, NONE where it is not known. `alone`: no other node can come."""
        self.past = 0  # newest round that anything here is of
        self.minutes: list[Recorded] = []  # of the set-up of ranks that sat here, as long as it counts
        self._said: list[Recorded] = []  # since then, and not written yet
        self._directory, self._key, self._alone = directory, key, alone
        self._deed = Deed(run=run, url=url, kernel=deed.kernel(), keep_s=keep_s, agent=key, node=node, position=position)
        self._claims: dict[str, memory.Claim] = {}
        self._written_s = 0.0

    @property
    def position(self) -> int:
        """That of this node, or of the one that it succeeds."""
        return self._deed.position

    async def take(self, tier: MemoryTier, lane: Lane) -> None:
        """Claim our own key, clear away what is nobody's, take over what is ours. Raises OSError."""
        self._claims[self._key] = memory.Claim(self._directory, self._key)
        if self._deed.keep_s:
            for heaps in await asyncio.to_thread(self._heritage):
                await self._enter_upon(heaps, tier, lane)
            self.minutes = deed.minutes(self._directory, self._claims)
            self._write()
        for path in memory.clean_stale(self._directory, but=lambda key: deed.is_kept(self._directory, key)):
            log.info("removed %s: its owner is gone", path)

    def seen(self, ranks: tuple[int, ...], position: int) -> None:
        """We live, and these ranks sit here."""
        now = msgspec.structs.replace(self._deed, ranks=ranks or self._deed.ranks)
        now = msgspec.structs.replace(now, position=position if position != NONE else now.position)
        if not now.keep_s or (now == self._deed and deed.now_s() < self._written_s + SEEN_S):
            return
        self._deed = now
        try:
            self._write()
        except OSError as error:
            log.warning("what is in memory may not be found by a later agent: %s: %s", error.filename, error.strerror)

    def keep(self, note: Recorded) -> None:
        """A rank that sits here recorded something in its set-up: who takes its chair after our end will ask for it."""
        if not self._deed.keep_s:
            return
        self._said.append(note)
        if note in self.minutes:
            return  # told to a newcomer, or said again
        if self.minutes:  # the group starts again: what was said before is void
            self.minutes = []
            deed.forget_minutes(self._directory, self._claims)
        while self._said:
            try:
                deed.add_minute(self._directory, self._key, self._said.pop(0))
            except OSError as error:
                log.warning("minutes of rank %d are not left to a later agent: %s", note.rank, error)

    def make_room(self) -> bool:
        """Clear away what dead runs left for a restart that may never come: those who live come first. Whether there was anything."""
        removed = memory.clean_stale(self._directory)
        if removed:
            log.warning("%d files that dead runs had left for their restart were removed to make room: %s ...", len(removed), removed[0])
        return bool(removed)

    def close(self, *, over: bool) -> None:
        """The run is over, or only this agent."""
        over = over or not self._deed.keep_s
        for key, claim in self._claims.items():
            memory.remove_all(self._directory, key, but=lambda what: not over and (rank_of(what) != NONE or what in deed.STAYS))
            claim.release(leave=not over)
        self._claims.clear()

    # ------------------------------------------------------------------

    def _heritage(self) -> list[list[Heap]]:
        return list(deed.heritage(self._directory, self._deed, everything=self._alone))

    async def _enter_upon(self, heaps: list[Heap], tier: MemoryTier, lane: Lane) -> None:
        """All that one dead agent had."""
        for key, left, claim in heaps:
            self._claims[key] = claim
            memory.remove_all(self._directory, key, but=lambda what: rank_of(what) != NONE or what in deed.STAYS)
            if self._deed.position == NONE:
                self._deed = msgspec.structs.replace(self._deed, position=left.position)
            self._deed = msgspec.structs.replace(self._deed, ranks=tuple(sorted({*self._deed.ranks, *left.ranks})))
            for rank in sorted({rank_of(what) for what in memory.segments(self._directory, key)} - {NONE}):
                chest = Chest(self._directory, key, rank)
                chest.reopen()
                chest.native = rank in left.ranks
                for kind in KINDS:
                    for slot in chest.slots(kind):
                        await self._check(slot, rank, lane)
                other = tier.chests.get(rank)
                better, worse = (chest, other) if other is None or _worth(chest) > _worth(other) else (other, chest)
                tier.chests[rank] = better
                if worse is not None:
                    worse.unlink()
            log.info("took over what process %s of %s left in memory: ranks %s", key.split("-")[0], left.node, sorted(tier.chests))

    async def _check(self, slot: Slot, rank: int, lane: Lane) -> None:
        try:
            self.past = max(self.past, await lane.run(lambda: self._checked(slot, rank), deadline_s=_allowed_s(slot)))
        except SnapshotMissing:
            pass  # its writer was killed in the middle of it
        except CheckpointError as error:
            slot.unseal()
            log.warning("not taken over: %s", error)

    def _checked(self, slot: Slot, rank: int) -> int:
        """The round in which it was sealed. From here on all of it is under a digest."""
        found = slot.read(run=self._deed.run, rank=rank)
        if not found.stamped:
            slot.stamp_payload()
        return found.round

    def _write(self) -> None:
        """Every heap says who has it now."""
        self._deed, self._written_s = self._deed.seen(), deed.now_s()
        for key in self._claims:
            deed.write(self._directory, key, self._deed)


def _allowed_s(slot: Slot) -> float:
    return CHECK_S + slot.num_bytes / CHECK_BYTES_S


def _worth(chest: Chest) -> tuple[int, bool]:
    """Of two chests of one rank the one that is further, and of equal ones that of its own worker."""
    return max((step for kind in KINDS for step in chest.sealed(kind)), default=NONE), chest.native
