"""Tier 0, the worker's part: one copy into agent-owned shared memory, and a seal.

Think of a diary kept in somebody else's safe: the writer may die at any word, the safe stays, and a page counts only once it is sealed.

Contract: `own_*` write this rank's own state at the start of a step and at its gate; `snapshot` writes everything into the older of
two slots, so a sealed one always remains; `unpack` is the way back. Sizes are settled at `open`, where all pages are mapped; state that
outgrew its room gets more, before anything is overwritten. Of state on a GPU the slots' pages are registered with its driver.
Cost: own state about 20 us for 16 KB; a snapshot one pass of memory (checkpoint/movers.py). The training thread's.
"""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING

from resilient.checkpoint import capture
from resilient.checkpoint.ring import OwnSegment, Ring
from resilient.checkpoint.slot import Slot
from resilient.checkpoint.snapshot import slot_bytes
from resilient.core.messages import NONE, Layout
from resilient.errors import SnapshotMismatch, SnapshotMissing

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from resilient.checkpoint.movers import Movers
    from resilient.checkpoint.snapshot import Snapshot
    from resilient.train.desk import Desk
    from resilient.train.state import Tracked

_ROOM = 64 << 10  # schedulers and loaders grow a little while they run
_BEGUN_BYTES_MAX = 8 << 20  # it travels in one message


class Tier0:
    """The segments of this rank's chair."""

    def __init__(self, desk: Desk, tracked: Tracked, run_id: str, movers: Movers) -> None:
        """Nothing is mapped before `open`."""
        self._desk, self._tracked, self._run_id, self._movers = desk, tracked, run_id, movers
        self._packing: capture.Packing | None = None
        self._registered: list[capture.Registered] = []
        self._own: OwnSegment | None = None
        self._ring: Ring | None = None
        self._rank = NONE
        self._world_size = 0
        self._growth = 1  # state that outgrew its room is given twice as much
        self.cost_s = 0.0  # of the last snapshot
        self.taken_s = time.monotonic()  # when it ended

    def open(self, rank: int, world_size: int, *, adopt: bool, reshape: int = NONE, origin: int = 0, begun: bytes = b"") -> int:
        """Get this chair's segments. adopt: keep what is sealed there (a newcomer); otherwise an earlier group's seals are void.

        reshape: have that step of the persistent tier, which another world wrote, cut for this rank (origin: from that many ranks'
        snapshots in memory); gives the old rank whose own state comes with it. begun: own state for a step that comes without it.
        Raises TierUnavailable if there is no room, SnapshotMissing if that step cannot be had.
        """
        self.close()
        self._rank, self._world_size = rank, world_size
        rows, digest = self._tracked.layout()
        # Rounded so that a newcomer, whose optimizers have made their state already, asks for no more than its predecessor did at the
        # start: for growing, segments are made anew and copied, in the middle of a recovery.
        own_room = _rounded(2 * len(self._tracked.own())) * self._growth
        own_bytes = slot_bytes(0, own_room, 0)
        room = slot_bytes(_rounded(self._tracked.expected_layout_bytes()), own_room, self._tracked.expected_bytes())
        wish = Layout(
            rank=rank,
            digest=digest,
            replicated=self._tracked.replicated,
            own_bytes=_pages(own_bytes),
            snapshot_bytes=_pages(room),
            often=self._tracked.undo_needed,
            reshape=reshape,
            rows=rows if reshape != NONE else b"",
            world_size=world_size,
            own=begun if len(begun) <= _BEGUN_BYTES_MAX else b"",
            origin=origin,
        )
        segments = self._desk.segments_for(wish)
        self._own = OwnSegment(segments.own, segments.own_bytes, run=self._run_id, rank=rank)
        self._own.world_size = world_size
        self._ring = Ring.open(segments.slots, populate=True) if segments.slots else None
        if self._ring is not None and any(item.local.is_cuda for item in self._tracked.shared()):
            self._registered = [capture.Registered(slot.memory) for slot in self._ring.slots]
        if not adopt:
            for ring in (self._own.starts, self._own.gate, self._ring):
                for slot in ring.slots if ring is not None else ():
                    slot.unseal()
        if segments.refused:
            raise SnapshotMissing(segments.refused)
        return segments.own_of

    def close(self) -> None:
        """Unmap."""
        if self._own is not None:
            self._own.close()
        for registered in self._registered:
            registered.close()
        self._registered = []
        if self._ring is not None:
            self._ring.close()
        self._own = self._ring = None

    def own_start(self, step: int, round_: int, own: bytes) -> None:
        """Seal the own state with which step `step` begins."""
        self._roomy(lambda: self._own_segment(round_).write_start(step, own))

    def read_start(self, step: int) -> bytes:
        """The own state with which this chair began step `step`, whoever sat there. Raises as OwnSegment.read_start."""
        assert self._own is not None, "open() comes first"
        return self._own.read_start(step)

    def read_gate(self, step: int) -> bytes:
        """The own state at the gate of the step that made it `step` steps. Raises as OwnSegment.read_gate."""
        assert self._own is not None, "open() comes first"
        return self._own.read_gate(step)

    def own_gate(self, step: int, round_: int, own: bytes) -> None:
        """Seal the own state at the gate of the step that makes it `step` steps."""
        self._roomy(lambda: self._own_segment(round_).write_gate(step, own))

    def _own_segment(self, round_: int) -> OwnSegment:
        assert self._own is not None, "open() comes first"
        self._own.round = round_
        return self._own

    def _roomy(self, write: Callable[[], None]) -> None:
        """`write`, in more room if there is too little: tracked state may grow (a list of losses). What is sealed is carried over."""
        try:
            write()
        except SnapshotMismatch:
            self._growth *= 2
            self.open(self._rank, self._world_size, adopt=True)
            write()

    def forget_after(self, step: int) -> None:
        """This rank went back to `step`: what was sealed of later ones is of a future that will not be, and its room is used first."""
        for slot in self._ring.slots if self._ring is not None else ():
            if slot.sealed_step() > step:
                slot.unseal()

    def snapshot(self, step: int, round_: int, own: bytes) -> None:
        """Seal everything this rank holds at `step`."""
        self._roomy(lambda: self._snapshot(step, round_, own))

    def _snapshot(self, step: int, round_: int, own: bytes) -> None:
        if self._ring is None:
            return
        begin = time.monotonic()
        layout, _ = self._tracked.layout()
        packing = self._pack()
        payload = self._ring.begin(
            run=self._run_id,
            rank=self._rank,
            world_size=self._world_size,
            round=round_,
            layout=layout,
            own=own,
            payload_bytes=packing.num_bytes,
        )
        packing.save(payload)
        del payload
        self._ring.seal(step)
        self.taken_s = time.monotonic()
        self.cost_s = self.taken_s - begin

    def unpack(self, found: Snapshot, where: str) -> None:
        """Shared state from a verified snapshot. Raises SnapshotMismatch if it cannot be brought into its shape."""
        self._tracked.shape_like(found.layout, where)
        self._pack().load(found.payload)

    def _pack(self) -> capture.Packing:
        """The list for the shared tensors there are now: the one made before, unless they are others."""
        items = self._tracked.shared()
        if self._packing is None or self._packing.parts is not items:
            self._packing = capture.Packing(items, self._movers)
        return self._packing

    @contextlib.contextmanager
    def reading(self, step: int, path: str, *, lent: bool = False) -> Iterator[Slot]:
        """The snapshot of `step`: in this chair's slots, else (or because it is lent) the one at `path`. Raises SnapshotMissing."""
        held = self._ring.find(step) if self._ring is not None and not lent else None
        if held is not None:
            yield held
            return
        if not path:
            msg = f"snapshot rank={self._rank} step={step}: neither in this chair's slots nor fetched"
            raise SnapshotMissing(msg)
        slot = Slot(path, writable=False, populate=True)  # every byte is read at least twice
        try:
            yield slot
        finally:
            slot.close()

    def sealed(self, step: int, world_size: int = 0) -> bool:
        """Whether a snapshot of `step` is there. world_size: of such a world, 0 = of any."""
        slot = self._ring.find(step) if self._ring is not None else None
        return slot is not None and world_size in (0, slot.world_size())


def _rounded(count: int) -> int:
    return (count + _ROOM - 1) // _ROOM * _ROOM + _ROOM


def _pages(count: int) -> int:
    return (count + 4095) // 4096 * 4096
