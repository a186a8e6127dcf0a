"""Hashing: snapshots are hashed for their own sake, now and then.

Think of a night watchman who tries the doors that nobody has used today.

Contract: of the ranks seated here in turn the newest snapshot that nobody has asked for, and so nobody has hashed: damage in memory is then
seen before it is restored. At most SHARE of one core, that of audits (audits.py) included.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Final

from resilient.checkpoint.chest import Chest
from resilient.checkpoint.slot import Slot
from resilient.errors import CheckpointError
from resilient_agents.copies import COPY_BYTES_S, COPY_S
from resilient_agents.lane import Errands, Lane

SHARE: Final = 0.05  # of one core


class Hashing:
    """The watchman."""

    def __init__(self, lane: Lane) -> None:
        """`lane`: where it is done."""
        self._lane = lane
        self._busy = False
        self._again_at = 0.0
        self._hashed_at: dict[int, float] = {}
        self._errands = Errands()

    async def close(self) -> None:
        """Stop."""
        await self._errands.close()

    def look(self, chests: Iterable[Chest]) -> None:
        """Begin with the next one, if there was rest enough since the last."""
        if self._busy or time.monotonic() < self._again_at:
            return
        for chest in sorted(chests, key=lambda chest: self._hashed_at.get(chest.rank, 0.0)):
            slot = chest.snapshots.newest() if chest.snapshots is not None else None
            if slot is not None and not slot.is_stamped():
                self._busy = True
                self._hashed_at[chest.rank] = time.monotonic()
                self._errands.start(self._hash(slot))
                return

    def spent(self, seconds: float) -> None:
        """Snapshots were hashed for another reason: that is taken off what is done here."""
        self._again_at = max(self._again_at, time.monotonic()) + seconds / SHARE

    async def _hash(self, slot: Slot) -> None:
        begin = time.monotonic()
        try:
            await self._lane.run(slot.stamp_payload, deadline_s=COPY_S + slot.sealed_bytes() / COPY_BYTES_S)
        except CheckpointError:
            pass  # overwritten meanwhile, or damaged: whoever wants to read it will be told
        finally:
            self._busy = False
            self.spent(time.monotonic() - begin)
