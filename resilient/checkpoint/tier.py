"""Tiers: places where snapshots are kept. Four verbs, the same for memory, another node and a disk.

Think of libraries: whichever you go to, you bring a book, borrow one, read the catalogue, or have one taken out; and each looks the book
over at the door, when it comes in and when it goes out.

Contract: what goes in and comes out are the sealed bytes of checkpoint/snapshot.py, stamped. `put` refuses bytes that do not check;
`get` fills memory that the caller owns and has checked every byte when it returns; `list` names only what `get` could give.
A tier blocks: whoever must not wait calls it from a thread. tests/contract/test_tier.py is what a third party's tier has to pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Literal, Protocol, get_args

from resilient.checkpoint.snapshot import HEADER_BYTES, Buffer, announced_bytes, parse
from resilient.errors import SnapshotMismatch

Kind = Literal["snapshot", "start", "gate"]  # of a step's state, of own state at its start, of own state at the gate that leads to it
KINDS: Final[tuple[Kind, ...]] = get_args(Kind)


@dataclass(frozen=True, order=True)
class SnapshotKey:
    """Which snapshot: the rank's, at this step, of this kind."""

    rank: int
    step: int
    kind: Kind = "snapshot"

    def __str__(self) -> str:
        return f"{self.kind} rank={self.rank} step={self.step}"


class Landing(Protocol):
    """Memory that can take a snapshot without ever showing half of one: a Slot, a Ring, a Berth, or a Spare."""

    def receive(self, header: bytes) -> memoryview:
        """Say what comes; get the memory for all that follows the header."""
        ...

    def accept(self, *, rank: int | None = None, step: int | None = None, hashed: bytes | None = None) -> int:
        """All of it is there: check it, make it visible. `hashed`: the payload's digest, if it is known already. Returns the step."""
        ...


class Tier(Protocol):
    """A place where snapshots are kept."""

    name: str

    def put(self, key: SnapshotKey, sealed: Buffer) -> None:
        """Keep a copy of `sealed` (stamped). Raises SnapshotCorrupt before anything is kept, TierUnavailable if it cannot be."""
        ...

    def get(self, key: SnapshotKey, into: Buffer | Landing) -> int:
        """Fill `into` from its start; the number of bytes. Raises SnapshotMissing, SnapshotCorrupt, SnapshotMismatch, TierUnavailable.

        What `into` holds after an error is worth nothing (a Landing is then without a seal).
        """
        ...

    def list(self) -> Iterator[SnapshotKey]:
        """What is here, in order of rank and step."""
        ...

    def drop(self, key: SnapshotKey) -> None:
        """Forget it. Nothing happens if it is not here."""
        ...


class Spare:
    """Private memory as a Landing: nobody else looks at it, so it may be filled in any order."""

    def __init__(self, memory: Buffer, where: str = "memory") -> None:
        """`memory`: writable, at least as long as what will come."""
        self._memory = memoryview(memory).cast("B")
        self._where = where
        self.num_bytes = 0

    def receive(self, header: bytes) -> memoryview:
        """As `Landing.receive`. Raises SnapshotMismatch if it does not fit."""
        self.num_bytes = announced_bytes(header, self._where)
        if self.num_bytes > len(self._memory):
            raise SnapshotMismatch(f"snapshot: {self.num_bytes} bytes announced, room for {len(self._memory)} ({self._where})")
        self._memory[:HEADER_BYTES] = header
        return self._memory[HEADER_BYTES : self.num_bytes]

    def accept(self, *, rank: int | None = None, step: int | None = None, hashed: bytes | None = None) -> int:
        """As `Landing.accept`."""
        whole = self._memory[: self.num_bytes]
        return parse(whole, rank=rank, step=step, stamped=True, hashed=hashed, where=self._where).step


def landing(into: Buffer | Landing) -> Landing:
    """`into` as something that takes a snapshot."""
    return Spare(into) if isinstance(into, Buffer) else into


def check(key: SnapshotKey, sealed: Buffer) -> memoryview:
    """What every `put` does first: every byte of `sealed` is right, and it is what `key` says. Returns exactly its bytes."""
    found = parse(sealed, rank=key.rank, step=key.step, stamped=True, where=f"{key} to be kept")
    return memoryview(sealed).cast("B")[: found.num_bytes].toreadonly()
