"""Source: a sealed snapshot that is read once, from its start to its end, while it is written elsewhere.

Think of a scribe who copies from a slate: the owner of the slate may come back for it. Then what was copied is worth nothing, and the
scribe knows.

Contract: `view` gives payload where it lies, without a copy; `finish(digest)` says what the payload's digest is, checks that nothing has
changed meanwhile, and gives the stamped head. Raises SnapshotMissing (overwritten meanwhile), SnapshotCorrupt (the payload is not what was
hashed before).
"""

from __future__ import annotations

from typing import Protocol

from resilient.checkpoint.slot import Slot
from resilient.checkpoint.snapshot import Buffer, Snapshot, parse, stamped_digest
from resilient.errors import SnapshotCorrupt


class Source(Protocol):
    """See the module's text."""

    found: Snapshot  # its `payload` is not to be read

    def view(self, begin: int, end: int) -> memoryview:
        """That part of the payload. Nobody else will use this memory for anything, unless `finish` raises."""
        ...

    def finish(self, digest: bytes) -> bytes:
        """The head, with this digest of the whole payload as its stamp."""
        ...


class Whole:
    """Sealed, stamped bytes in private memory."""

    def __init__(self, sealed: Buffer) -> None:
        """Raises as `parse`."""
        self._sealed = memoryview(sealed).cast("B")
        self.found = parse(self._sealed, verify=False, stamped=True, where="sealed bytes to be written")

    def view(self, begin: int, end: int) -> memoryview:
        """As `Source.view`."""
        return self.found.payload[begin:end]

    def finish(self, digest: bytes) -> bytes:
        """As `Source.finish`."""
        head = bytes(self._sealed[: self.found.num_bytes - len(self.found.payload)])
        if self.found.payload and stamped_digest(head) != digest:
            raise SnapshotCorrupt(f"snapshot rank={self.found.rank} step={self.found.step}: the payload is not what was hashed")
        return head


class Live:
    """A slot, read where it lies; its writer is not held up."""

    def __init__(self, slot: Slot) -> None:
        """Raises SnapshotMissing if nothing is sealed there."""
        self._slot = slot
        self._generation = slot.generation()
        self.found = slot.read(verify=False)

    def view(self, begin: int, end: int) -> memoryview:
        """As `Source.view`."""
        return self.found.payload[begin:end]

    def finish(self, digest: bytes) -> bytes:
        """As `Source.finish`."""
        return self._slot.stamped_head(self._generation, digest)
