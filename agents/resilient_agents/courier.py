"""Courier: brings what another vault keeps of one rank into this one's memory.

Think of a removal firm whose van is sent once more when a piece was unpacked broken: perhaps it was the road. If it comes out broken
again, it was broken when it was loaded, and nobody waits for a third van.

Contract: `bring` fetches the snapshot of the wanted step, own state of any step, and the rank's notes. A copy that arrives damaged is
fetched once more, all of it, into a berth of its own; nothing is sealed before every byte of it is right, so nobody sees the first one. If
the second one is damaged too, that is raised. After TierUnavailable `bring` may be called again: what is here is not fetched again, and
what broke off is gone on with. Every wait is the peer's, and has its deadline there. Used from one event loop.
"""

from __future__ import annotations

import logging

from resilient.checkpoint.chest import Berth, MemoryTier
from resilient.checkpoint.notes import Notes
from resilient.checkpoint.peer import Peer
from resilient.checkpoint.tier import SnapshotKey
from resilient.core.messages import Fetch
from resilient.errors import SnapshotCorrupt, SnapshotMismatch

log = logging.getLogger("resilient.vault")


class Courier:
    """One errand."""

    def __init__(self, wanted: Fetch, peer: Peer, memory: MemoryTier, notes: Notes) -> None:
        """`peer`: whoever holds it, closed with this."""
        self._wanted = wanted
        self._peer = peer
        self._memory, self._notes = memory, notes
        self._berths: dict[SnapshotKey, Berth] = {}
        self._here: set[SnapshotKey] = set()

    async def bring(self) -> None:
        """All of it. Raises as `Peer.get`."""
        rank, step = self._wanted.rank, self._wanted.step
        for key in await self._peer.list():  # ascending by step, so that the newest start comes last
            if key.rank == rank and (key.kind != "snapshot" or key.step == step) and key not in self._here:
                try:
                    await self._get(key)
                except (SnapshotCorrupt, SnapshotMismatch) as error:
                    log.warning("copy of %s arrived damaged, it is fetched once more: %s", key, error)
                    del self._berths[key]
                    await self._get(key)
                self._here.add(key)
        for note in await self._peer.notes(rank):
            self._notes.add(note)

    async def _get(self, key: SnapshotKey) -> None:
        with self._berths.setdefault(key, self._memory.berth(key)) as berth:
            await self._peer.get(key, berth)

    def close(self) -> None:
        """Nothing more is wanted of that peer."""
        self._peer.close()
