"""Audits: this node's part in the comparison of replicas between checkpoints.

Think of the clerk who adds up the day's book when the bell rings, writes one number on a card for the head office, and keeps the sum of
each page for a day, should anybody ask.

Contract: `begin` is called when a worker says that it has sealed the step which the vote has named. Its payload is hashed in the
background, one rank at a time; `done` then tells the worker that it may overwrite it, and how long this node has hashed for that step.
`known` is the newest step that all ranks seated here have come to. Of each rank the newest SHEETS sheets are kept (checkpoint/replicas.py),
16 bytes for each tensor and its name; `sheet` gives them out. `compare` is the leader's: sheets are brought together, and `compared` says
what they show. A snapshot that was overwritten or is damaged, and a node that does not answer, make an audit void: one line in the log.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from resilient.checkpoint import replicas
from resilient.checkpoint.chest import MemoryTier
from resilient.checkpoint.layout import Twins
from resilient.checkpoint.peer import Peer
from resilient.checkpoint.slot import Slot
from resilient.checkpoint.tier import SnapshotKey
from resilient.core.messages import NONE, Audit, Compared, Comparison, Difference, Sheet, Sum
from resilient.errors import CheckpointError, SnapshotMissing
from resilient_agents.copies import COPY_BYTES_S, COPY_S
from resilient_agents.lane import Errands, Lane

COMPARE_S: Final = 60.0  # for all sheets of a comparison
SHEETS: Final = 2  # a comparison of one step ends while the next one is being hashed
log = logging.getLogger("resilient.vault")


@dataclass(frozen=True)
class _Kept:
    """What is known of one rank at one step."""

    twins: Twins
    digest: str
    sheet: bytes


class Audits:
    """The vault's."""

    def __init__(
        self,
        memory: MemoryTier,
        lane: Lane,
        spent: Callable[[float], None],
        dial: Callable[[str], Peer],
        changed: Callable[[], None],
    ) -> None:
        """`lane`: where snapshots are hashed; `spent(seconds)`: they were.

        `dial`: a client of the vault at an address. `changed`: `known` or `compared` has.
        """
        self.compared: Compared | None = None
        self._memory, self._lane, self._spent, self._dial, self._changed = memory, lane, spent, dial, changed
        self._on_done: Callable[[int], None] = lambda _rank: None
        self._done: dict[int, int] = {}  # rank -> step
        self._cost: tuple[int, float] = (NONE, 0.0)  # the step under way, seconds for it so far
        self._kept: dict[int, dict[tuple[int, int], _Kept]] = {}  # rank -> (round, step) -> what is known
        self._busy: dict[int, int] = {}  # rank that is being hashed -> the newest step that was begun with
        self._turn = asyncio.Lock()
        self._wish: Comparison | None = None
        self._errands = Errands()

    def watch(self, on_done: Callable[[int], None]) -> None:
        """`on_done(rank)`: `done` of that rank has changed."""
        self._on_done = on_done

    async def close(self) -> None:
        """Stop."""
        await self._errands.close()

    # ------------------------------------------------------------------ one digest for each rank

    def begin(self, rank: int, step: int) -> None:
        """The worker of this rank has sealed the step that is audited. Void at once, while the one before is being hashed."""
        busy = rank in self._busy
        self._busy[rank] = step
        if busy:
            self._done[rank] = step
            self._on_done(rank)
        else:
            self._errands.start(self._hash(rank, step))

    def done(self, rank: int) -> tuple[int, float]:
        """(the step that was audited last on this rank, seconds that this node hashed for the newest one, all its ranks together)."""
        return self._done.get(rank, NONE), self._cost[1]

    async def _hash(self, rank: int, step: int) -> None:
        seconds = 0.0
        try:
            slot = self._memory.slot(SnapshotKey(rank, step))
            async with self._turn:
                begin = time.monotonic()
                try:
                    round_, kept = await self._lane.run(
                        lambda: _read(slot, rank, step), deadline_s=COPY_S + slot.sealed_bytes() / COPY_BYTES_S
                    )
                finally:
                    seconds = time.monotonic() - begin
            steps = self._kept.setdefault(rank, {})
            steps[round_, step] = kept
            for old in sorted(steps)[:-SHEETS]:
                del steps[old]
        except CheckpointError as error:
            log.info("replicas of step %d are not compared: %s", step, error)
        finally:
            self._done[rank] = self._busy.pop(rank)
            self._cost = (step, seconds + (self._cost[1] if self._cost[0] == step else 0.0))
            self._spent(seconds)
            self._on_done(rank)
        self._changed()

    def known(self) -> Audit | None:
        """The newest step that is known of all ranks seated here."""
        seated = [rank for rank, chest in sorted(self._memory.chests.items()) if chest.seated]
        steps = [self._kept.get(rank, {}).keys() for rank in seated]
        common = set(steps[0]).intersection(*steps[1:]) if steps else set()
        if not common:
            return None
        newest = max(common)
        alike: dict[tuple[tuple[int, int, int], str], list[int]] = {}
        for rank in seated:
            kept = self._kept[rank][newest]
            alike.setdefault(((kept.twins.first, kept.twins.count, kept.twins.stride), kept.digest), []).append(rank)
        sums = tuple(Sum(twins=twins, digest=digest, ranks=tuple(ranks)) for (twins, digest), ranks in alike.items())
        return Audit(step=newest[1], round=newest[0], sums=sums)

    def sheet(self, digest: str) -> bytes:
        """That with this digest. Raises SnapshotMissing."""
        for steps in self._kept.values():
            for kept in steps.values():
                if kept.digest == digest:
                    return kept.sheet
        raise SnapshotMissing(f"sheet {digest}: not kept here, or no longer")

    # ------------------------------------------------------------------ the leader's part

    def compare(self, wish: Comparison | None, here: str) -> None:
        """Find out what differs, unless that is under way; None: the coordinator has heard. `here`: the address of this vault."""
        if wish is None:
            self.compared = None
        elif wish != self._wish:
            self._wish = wish
            self._errands.start(self._compare(wish, here))

    async def _compare(self, wish: Comparison, here: str) -> None:
        try:
            async with asyncio.timeout(COMPARE_S):
                sheets = [(it, await self._fetch(it, here)) for it in wish.sheets]
            found = await self._lane.run(lambda: _compared(sheets), deadline_s=COPY_S)
            texts = [f"step {wish.step}: {difference}" for difference in found]
            told = tuple(Difference(ranks=it.ranks, twins=it.twins, text=text) for it, text in zip(found, texts, strict=True))
            self.compared = Compared(step=wish.step, round=wish.round, differences=told)
            for text in texts:
                log.warning("replicas are not equal: %s", text)
        except (CheckpointError, TimeoutError) as error:
            why = str(error) or f"the sheets did not come within {COMPARE_S:.0f} s"
            log.warning("replicas of step %d are not equal; which tensors are not could not be seen: %s", wish.step, why)
            self.compared = Compared(step=wish.step, round=wish.round, void=why)
        self._changed()

    async def _fetch(self, it: Sheet, here: str) -> bytes:
        if it.vault == here:
            return self.sheet(it.digest)
        peer = self._dial(it.vault)
        try:
            return await peer.sheet(it.digest)
        finally:
            peer.close()


def _read(slot: Slot, rank: int, step: int) -> tuple[int, _Kept]:
    """In a thread: (round, what is known). Raises SnapshotMissing, SnapshotCorrupt."""
    found, tally = slot.hashed()
    if (found.rank, found.step) != (rank, step):
        raise SnapshotMissing(f"snapshot rank={rank} step={step}: overwritten by rank={found.rank} step={found.step} ({slot.where})")
    twins = tally.layout.twins
    sheet = replicas.sheet(found.layout, tally.rows()) if twins.count > 1 else b""
    return found.round, _Kept(twins, replicas.digest_of(sheet) if sheet else "", sheet)


def _compared(sheets: list[tuple[Sheet, bytes]]) -> list[replicas.Difference]:
    return replicas.compare([replicas.held(it.ranks, sheet, f"sheet of rank {it.ranks[0]} at {it.vault}") for it, sheet in sheets])
