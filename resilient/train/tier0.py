"""Tier 0, the worker's part: one copy into agent-owned shared memory, and a seal.

Think of a diary kept in somebody else's safe: the writer may die at any word, the safe stays, and a page counts only once it is sealed.

Contract: `own_*` write this rank's own state at the start of a step and at its gate; `snapshot` writes everything into the older of
two slots, so a sealed one always remains; `unpack` is the way back. Sizes are settled at `open`, where all pages are mapped; state that
outgrew its room gets more, before anything is overwritten. Of state on a GPU the slots' pages are registered with its driver.
A snapshot of host tensors is sealed when `snapshot` returns. Of tensors on a GPU it has only begun then: what may change in the body of the
next step (all but what an optimizer or an averaged model owns; own state too) is safe, the rest is copied beside that body, and a thread
presses the seal when the last byte is there. `settle` waits for that; whatever changes tracked tensors calls it first, and the gate before
it votes (I9). Who breaks that rule is found out by address and version counter: the snapshot is then void, and that tensor is
copied first from then on.
Cost: own state about 20 us for 16 KB; a snapshot one pass of memory (checkpoint/movers.py), on a GPU the launch. The training thread's.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import time
from typing import TYPE_CHECKING

from resilient.checkpoint import capture
from resilient.checkpoint.behind import Behind
from resilient.checkpoint.capture_gpu import Registered
from resilient.checkpoint.ring import OwnSegment, Ring
from resilient.checkpoint.slot import Slot
from resilient.checkpoint.snapshot import slot_bytes
from resilient.core.messages import NONE, Layout, Sealed
from resilient.errors import SnapshotMismatch, SnapshotMissing

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from resilient.checkpoint.movers import Movers
    from resilient.checkpoint.snapshot import Snapshot
    from resilient.train.desk import Desk
    from resilient.train.state import Tracked

_ROOM = 64 << 10  # schedulers and loaders grow a little while they run
_BEGUN_BYTES_MAX = 8 << 20  # it travels in one message
_LOOKS = 3  # bodies after which a program is taken to have shown which of its tensors it changes there


class Tier0:
    """The segments of this rank's chair."""

    def __init__(self, desk: Desk, tracked: Tracked, run_id: str, movers: Movers, *, often: bool = False, overlap: bool = False) -> None:
        """Nothing is mapped before `open`. often: a snapshot is taken whether or not `being_read`.

        overlap: host tensors too are copied beside the next body.
        """
        self._desk, self._tracked, self._run_id, self._movers, self._often = desk, tracked, run_id, movers, often
        self._packing: capture.Packing | None = None
        self._overlap = overlap
        self._behind = Behind()
        self._passage: capture.Passage | None = None  # begun at the last snapshot; complete or not
        self._restless: set[str] = set()  # keys of tensors that are changed outside of gates
        self._looked: capture.Watched | None = None  # since the body under way began
        self._looks = 0
        self._watches = False
        self._registered: list[Registered] = []
        self._own: OwnSegment | None = None
        self._ring: Ring | None = None
        self._rank = NONE
        self._world_size = 0
        self._growth = 1  # state that outgrew its room is given twice as much
        self._kept = NONE
        self.cost_s = 0.0  # of the last snapshot, to the training thread
        self._launch_s = 0.0
        self._settling_s: float | None = None  # since when the training thread has been waiting for it

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
            often=self._often and not self._tracked.replicated,
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
        self.keep(self._kept)
        if self._ring is not None and any(item.local.is_cuda for item in self._tracked.shared()):
            self._registered = [Registered(slot.memory) for slot in self._ring.slots]
        self._watches = self._overlap or bool(self._registered)
        if not adopt:
            for ring in (self._own.starts, self._own.gate, self._ring):
                for slot in ring.slots if ring is not None else ():
                    slot.unseal()
        if segments.refused:
            raise SnapshotMissing(segments.refused)
        return segments.own_of

    def close(self) -> None:
        """Unmap."""
        self.settle()
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
        if self._watches and self._looks < _LOOKS:
            self._looks += 1
            self._looked = capture.Watched([item for item in self._tracked.shared() if item.steady])
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
        self.settle()
        for slot in self._ring.slots if self._ring is not None else ():
            if slot.sealed_step() > step:
                slot.unseal()

    def keep(self, step: int) -> None:
        """Every rank has sealed this step: of the snapshots here it is overwritten last."""
        self._kept = step
        if self._ring is not None:
            self._ring.keep = step

    def snapshot(self, step: int, round_: int, own: bytes) -> None:
        """Seal everything this rank holds at `step`: at once, or (what lies on a GPU) before the next `settle` returns."""
        self.settle()
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
        self._passage = packing.begin(payload)
        del payload
        self.cost_s = self._launch_s = time.monotonic() - begin
        if self._passage is None:
            self._behind.do(functools.partial(self._press, self._ring, step))
        else:
            self._behind.start(functools.partial(self._complete, self._ring, step, self._passage), packing.num_bytes)

    def _complete(self, ring: Ring, step: int, passage: capture.Passage) -> bool:
        """On the thread behind: seal what has been begun, unless it was written to meanwhile."""
        passage.finish()
        if passage.touched():
            return False  # `settle` says so
        self._press(ring, step)
        if (since := self._settling_s) is not None:
            self.cost_s = self._launch_s + time.monotonic() - since
        self._desk.send(Sealed())  # the agent looked for it when the step began
        return True

    def _press(self, ring: Ring, step: int) -> bool:
        ring.seal(step)
        return True

    def once_sealed(self, call: Callable[[], None]) -> None:
        """Have `call` made when the last snapshot is sealed: now, or on the thread that seals it. Never, if it comes to nothing."""
        self._behind.after(call)

    def settle(self, patience_s: float | None = None) -> None:
        """Wait until the snapshot that was begun last is sealed: from here on what is tracked may be changed.

        Raises what went wrong with it (it is not sealed then), TierUnavailable if it is not complete in time.
        """
        if self._behind.busy:
            self._settling_s = begin = time.monotonic()
            try:
                self._behind.settle(patience_s)
            finally:
                self._settling_s = None
            self.cost_s = self._launch_s + time.monotonic() - begin
        passage, self._passage = self._passage, None
        looked, self._looked = self._looked, None
        touched = passage.touched() if passage is not None else []
        if touched and self._ring is not None:  # whether before its last byte was copied or after, nobody can say
            self._ring.void()
            what = f"{touched[0]} (of {len(touched)} tensors) was changed outside of a gate while it was copied"
            sys.stderr.write(f"resilient: rank {self._rank}: a snapshot is void: {what}; it is copied first from now on\n")
        learnt = {*touched, *(looked.touched() if looked is not None else ())} - self._restless
        if learnt:
            self._restless |= learnt
            self._packing = None

    @property
    def threads(self) -> int:
        """How many may copy or hash for this rank."""
        return self._movers.threads

    def unpack(self, found: Snapshot, where: str) -> None:
        """Shared state from a verified snapshot. Raises SnapshotMismatch if it cannot be brought into its shape."""
        self.settle()
        self._tracked.shape_like(found.layout, where)
        self._pack().load(found.payload)

    def _pack(self) -> capture.Packing:
        """The list for the shared tensors there are now: the one made before, unless they are others."""
        items = self._tracked.shared()
        if self._packing is None or self._packing.parts is not items:
            self._packing = capture.Packing(items, self._movers, overlap=self._overlap, restless=self._restless)
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

    def being_read(self) -> bool:
        """Whether the agent is reading one of the slots for the persistent tier."""
        return self._ring is not None and any(slot.is_marked() for slot in self._ring.slots)

    @property
    def payload_bytes(self) -> int:
        """Of the newest snapshot, about; 0 = none can be taken."""
        return self._ring.slots[0].num_bytes if self._ring is not None else 0

    def sealed(self, step: int, world_size: int = 0) -> bool:
        """Whether a snapshot of `step` is there. world_size: of such a world, 0 = of any."""
        self.settle()
        slot = self._ring.find(step) if self._ring is not None else None
        return slot is not None and world_size in (0, slot.world_size())


def _rounded(count: int) -> int:
    return (count + _ROOM - 1) // _ROOM * _ROOM + _ROOM


def _pages(count: int) -> int:
    return (count + 4095) // 4096 * 4096
