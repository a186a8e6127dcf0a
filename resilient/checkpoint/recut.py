"""Recut: a rank's snapshot in another world than the one whose snapshots lie in memory, here and on other nodes.

Think of a tablecloth sewn anew for a longer table: first from the panels of the old one that lie in this chest; for what is lacking then,
the neighbours are asked, for just those panels.

Contract: as `DiskTier.reshape`, from memory: `sources` are all ranks' sealed snapshots of one step, of a world of so many ranks. Of those
in this node's memory (Held) the whole payload's digest is compared before a byte is used, of those elsewhere (afar.py) each piece's. A box
of which several ranks have the same is read once, from the nearest; if that is damaged or gone, from another, or another node's copy. Old
snapshots are looked at once more before the seal, for a writer in the meantime voids what was read. What boxes there are, and whose own
state is given, says reshape.py.
Memory: none here but the slot itself. Rejected: bringing whole old snapshots to every node first (a whole state per node, most of it for
nothing); a copy in the form of files in between (twice the bytes, to use one reader for both).
"""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Final, Protocol, Self

from resilient.checkpoint import layout, reshape
from resilient.checkpoint.layout import Layout, Row
from resilient.checkpoint.reshape import Box, Cut
from resilient.checkpoint.ring import Ring
from resilient.checkpoint.slot import Slot
from resilient.checkpoint.snapshot import Snapshot, slot_bytes
from resilient.errors import CheckpointError, SnapshotMissing

Lay = Callable[[int, memoryview, int], None]  # number of a row, bytes of it that are right, number of the first one
THREADS: Final = 2  # that hash a snapshot; the ranks of a node are cut at the same time
log = logging.getLogger(__name__)


class Source(Protocol):
    """One old rank's snapshot. Thread-safe."""

    near: bool  # in this node's memory

    def head(self) -> Snapshot:
        """Layout and own state, checked. Raises as `Tier.get`."""
        ...

    def read(self, wanted: Mapping[int, Box], lay: Lay) -> None:
        """At least these boxes of these rows, checked, by any thread. Raises as `Tier.get`; what was laid then may be laid again."""
        ...


class Held:
    """A snapshot in this node's memory. A context: within it the slot's writer is asked to wait."""

    near = True

    def __init__(self, slot: Slot, *, run: str, rank: int, step: int) -> None:
        """Nothing is read yet."""
        self._slot, self._run, self._rank, self._step = slot, run, rank, step
        self._generation = slot.generation()
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        """Ask."""
        self._stack.enter_context(self._slot.held())
        self._generation = self._slot.generation()
        return self

    def __exit__(self, *_: object) -> None:
        """It may be written again."""
        self._stack.close()

    def head(self) -> Snapshot:
        """As `Source.head`."""
        return self._slot.read(run=self._run, rank=self._rank, step=self._step, verify=False)

    def read(self, wanted: Mapping[int, Box], lay: Lay) -> None:
        """As `Source.read`: the whole payload is looked at, once. It must have been hashed before."""
        found = self._slot.read(run=self._run, rank=self._rank, step=self._step, stamped=True, threads=THREADS)
        places = layout.decode(found.layout).places()
        for number in wanted:
            begin, length = places[number]
            lay(number, found.payload[begin : begin + length], 0)
        self.check()

    def check(self) -> None:
        """Nobody has written there, or SnapshotMissing."""
        if self._slot.generation() != self._generation:
            raise SnapshotMissing(f"snapshot rank={self._rank} step={self._step}: overwritten while it was being read")


Turn = Callable[[], contextlib.AbstractContextManager[Iterable[Source]]]


def nobody() -> contextlib.AbstractContextManager[Iterable[Source]]:
    """Nobody else is being cut on this node."""
    return contextlib.nullcontext(())


def recut(
    sources: Mapping[int, Source],
    wanted: Layout,
    room: Callable[[int], Ring],
    *,
    run: str,
    rank: int,
    world_size: int,
    step: int,
    turn: Turn = nobody,
    spare: Mapping[int, Source] = MappingProxyType({}),
) -> int:
    """Seal the snapshot of `rank` at `step` in the ring that `room(bytes)` gives. Gives the old rank whose own state it has.

    turn: entered before other nodes are asked; gives what has been cut for other ranks of this node, which may hold the same.
    spare: the same snapshots as near ones, on other nodes, for those that are damaged or gone.
    Raises SnapshotMissing, SnapshotCorrupt, SnapshotMismatch, TierUnavailable; nothing is sealed then.
    """
    whose = reshape.own_rank(rank, len(sources))
    with contextlib.ExitStack() as held:
        here = [held.enter_context(source) for source in sources.values() if isinstance(source, Held)]
        head = _head(sources[whose], spare.get(whose))
        rows = reshape.rows_for(wanted, layout.decode(head.layout))
        described, payload_bytes = rows.encode(), sum(layout.padded(row.num_bytes) for row in rows.rows)
        ring = room(slot_bytes(len(described), len(head.own), payload_bytes))
        payload = ring.begin(
            run=run, rank=rank, world_size=world_size, round=0, layout=described, own=head.own, payload_bytes=payload_bytes
        )
        cut = Cut(rows, payload)
        order = sorted(sources, key=lambda old: abs((2 * old + 1) * world_size - (2 * rank + 1) * len(sources)))  # where its boxes lay
        spoilt = _fill(cut, [sources[old] for old in order if sources[old].near], cut.wanted)
        if cut.lacks:
            far = [spare.get(old) if sources[old] in spoilt else sources[old] for old in order]
            with turn() as others:
                spoilt |= _fill(cut, others, cut.same)
                spoilt |= _fill(cut, [source for source in far if source is not None and not source.near], cut.wanted)
        if spoilt and cut.lacks:
            raise next(iter(spoilt.values()))
        for error in spoilt.values():
            log.warning("rank %d: another copy is used: %s", rank, error)
        cut.check(f"snapshot step={step}", "in no rank's memory")
        for source in here:
            if source not in spoilt:
                source.check()
        del payload, cut
        ring.seal(step)
    return whose


def _head(source: Source, spare: Source | None) -> Snapshot:
    try:
        return source.head()
    except CheckpointError as error:
        if spare is None:
            raise
        log.warning("another copy's head is used: %s", error)
        return spare.head()


def _fill(cut: Cut, sources: Iterable[Source], choose: Callable[[Row], Box | None]) -> dict[Source, CheckpointError]:
    """What these have of it; what was wrong."""
    wrong: dict[Source, CheckpointError] = {}
    for source in sources:
        if not cut.lacks:
            break
        try:
            rows = layout.decode(source.head().layout).rows
            chosen = {number: box for number, row in enumerate(rows) if (box := choose(row)) is not None}
            if chosen:
                source.read(chosen, functools.partial(_lay, cut, rows))
        except CheckpointError as error:
            wrong[source] = error
            continue
        for number in chosen:
            cut.done(rows[number])
    return wrong


def _lay(cut: Cut, rows: Sequence[Row], number: int, memory: memoryview, begin: int) -> None:
    cut.lay(rows[number], memory, begin)
