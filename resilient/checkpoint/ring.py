"""Ring: slots that take turns, so that the newest snapshot is never the one being overwritten.

Think of two buckets under a tap: while one fills, the full one can be carried away. A rank's own state has three: two for the
starts of steps in turn, and one for the gate (own state as it is when the step's body has run).

Contract: `newest` is the slot written last, by the slots' generations and not by step, for a rollback makes steps grow twice.
Sealing step s ends every future: copies of steps after s that an abandoned attempt left behind lose their seals. The step named in `keep`
is overwritten last: the newest that every rank is known to have.
Rejected: choosing by step number (after a rollback the old future would be kept for ever, and the new past overwritten).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

from resilient.checkpoint.slot import Slot
from resilient.checkpoint.snapshot import HEADER_BYTES, Snapshot
from resilient.core.messages import NONE
from resilient.errors import SnapshotMissing


class Ring:
    """Slots that are written in turn. One writer at a time."""

    def __init__(self, slots: Sequence[Slot]) -> None:
        """At least one slot; of one, the old snapshot is lost when the new one begins."""
        self.slots = tuple(slots)
        self.keep = NONE
        self._current = self.slots[0]

    @classmethod
    def open(cls, paths: Sequence[str], *, writable: bool = True, populate: bool = False) -> Self:
        """Map whole files, as `Segments.slots` names them. `populate`: see Slot."""
        return cls([Slot(path, writable=writable, populate=populate) for path in paths])

    def close(self) -> None:
        """Unmap all."""
        for slot in self.slots:
            slot.close()

    # ------------------------------------------------------------------ writing

    def begin(self, *, run: str, rank: int, world_size: int, round: int, layout: bytes, own: bytes, payload_bytes: int) -> memoryview:
        """As `Slot.begin`, on the slot whose turn it is."""
        after = self._turn()
        return self._current.begin(
            run=run,
            rank=rank,
            world_size=world_size,
            round=round,
            layout=layout,
            own=own,
            payload_bytes=payload_bytes,
            after=after,
        )

    def seal(self, step: int) -> None:
        """As `Slot.seal`; copies of later steps are then of an abandoned attempt, and no longer count."""
        self._current.seal(step)
        self._end_futures(step)

    def void(self) -> None:
        """What was written last does not count after all."""
        self._current.unseal()

    def receive(self, header: bytes) -> memoryview:
        """As `Slot.receive`, on the slot whose turn it is."""
        after = self._turn()
        return self._current.receive(header, after)

    def accept(self, *, rank: int | None = None, step: int | None = None, hashed: bytes | None = None) -> int:
        """As `Slot.accept`, with the same end of futures as `seal`."""
        found = self._current.accept(rank=rank, step=step, hashed=hashed)
        self._end_futures(found)
        return found

    def _turn(self) -> int:
        """Choose a slot: one without a seal, else the one written longest ago, but for `keep`. Returns the newest generation of all."""
        found = {slot: slot.sealed_step() for slot in self.slots}
        self._current = min(self.slots, key=lambda slot: (found[slot] != NONE, found[slot] == self.keep, slot.generation()))
        return max(slot.generation() for slot in self.slots)

    def _end_futures(self, step: int) -> None:
        for slot in self.slots:
            if slot.sealed_step() > step:
                slot.unseal()

    # ------------------------------------------------------------------ reading

    def newest(self) -> Slot | None:
        """The slot sealed last."""
        sealed = [slot for slot in self.slots if slot.sealed_step() != NONE]
        return max(sealed, key=Slot.generation, default=None)

    def newest_step(self) -> int:
        """The step sealed last, NONE if there is none."""
        slot = self.newest()
        return NONE if slot is None else slot.sealed_step()

    def steps(self) -> tuple[int, ...]:
        """All steps sealed here, ascending."""
        return tuple(sorted({slot.sealed_step() for slot in self.slots} - {NONE}))

    def generations(self) -> tuple[int, ...]:
        """Of all slots: as long as they are the same, nobody has begun to write here."""
        return tuple(slot.generation() for slot in self.slots)

    def find(self, step: int) -> Slot | None:
        """The slot that holds `step`; of two, the one written last."""
        holding = [slot for slot in self.slots if slot.sealed_step() == step]
        return max(holding, key=Slot.generation, default=None)

    def get(self, step: int) -> Slot:
        """The same, or SnapshotMissing."""
        slot = self.find(step)
        if slot is None:
            held = ", ".join(map(str, self.steps())) or "none"
            raise SnapshotMissing(f"snapshot step={step}: not here, sealed steps: {held} ({self.slots[0].where})")
        return slot


class OwnSegment:
    """The own state of one chair: a file of three slots of `own_bytes` each (start a, start b, gate), without payload.

    `write_start` and `write_gate` cost one copy and one hash (about 10 us for 16 KB). One writer: the chair's worker.
    """

    def __init__(self, path: str, own_bytes: int, *, run: str | None = None, rank: int | None = None, writable: bool = True) -> None:
        """`own_bytes`: size of one slot, at least `slot_bytes(0, n, 0)`.

        A writer states `run` and `rank`; a reader that does is refused another's state.
        """
        self.own_bytes = own_bytes
        self.round = 0  # the round written into the next header: for people who look at a dump
        self.world_size = 0
        self._run = run
        self._rank = rank
        start_a, start_b, gate = (Slot(path, offset=i * own_bytes, num_bytes=own_bytes, writable=writable) for i in range(3))
        self.starts = Ring((start_a, start_b))
        self.gate = Ring((gate,))

    def close(self) -> None:
        """Unmap. The file stays."""
        self.starts.close()
        self.gate.close()

    def write_start(self, step: int, own: bytes) -> None:
        """Own state as it is when `step` steps are done. The newest other start stays readable."""
        self._write(self.starts, step, own)
        if self.gate_step() > step + 1:  # left by an abandoned attempt; step + 1 may still be asked for by one who repeats
            self.gate.slots[0].unseal()

    def write_gate(self, step: int, own: bytes) -> None:
        """Own state at the gate of the step that will make it `step`."""
        self._write(self.gate, step, own)

    def start_step(self) -> int:
        """Step of the start written last, NONE if there is none. Three loads."""
        return self.starts.newest_step()

    def gate_step(self) -> int:
        """Step that the gate state belongs to, NONE if there is none."""
        return self.gate.newest_step()

    def read_start(self, step: int) -> bytes:
        """The start of exactly `step`. Raises SnapshotMissing, SnapshotCorrupt, SnapshotMismatch."""
        return self._read(self.starts, step).own

    def read_gate(self, step: int) -> bytes:
        """The gate state of exactly `step`. Raises as `read_start`."""
        return self._read(self.gate, step).own

    def _write(self, ring: Ring, step: int, own: bytes) -> None:
        assert self._run is not None, "a writer of own state states its run"
        assert self._rank is not None, "a writer of own state states its rank"
        ring.begin(
            run=self._run,
            rank=self._rank,
            world_size=self.world_size,
            round=self.round,
            layout=b"",
            own=own,
            payload_bytes=0,
        )
        ring.seal(step)

    def _read(self, ring: Ring, step: int) -> Snapshot:
        slot = ring.get(step)
        found = slot.read(run=self._run, rank=self._rank)
        if found.step != step:
            raise SnapshotMissing(f"own state step={step}: overwritten by step {found.step} just now ({slot.where})")
        return found


def own_slot_bytes(own_bytes: int) -> int:
    """Size of one of the three slots for at most `own_bytes` of own state: a multiple of 64, so that no seal shares a cache line."""
    return -(-(HEADER_BYTES + own_bytes) // 64) * 64
