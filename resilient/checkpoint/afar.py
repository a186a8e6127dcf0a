"""Afar: part of a snapshot that lies in other nodes' memory, each piece checked for itself.

Think of ordering single pages of a book from a library, with the library's own list of what each page weighs: the list adds up to what is
printed on the cover, and each page is weighed when it comes.

Contract: a Source (recut.py), for threads. Head and leaves (tally.py) are fetched once; the leaves must make the digest under which the
snapshot was sealed. Then only pieces come in which something is that is wanted: a tensor of up to 4 MiB is one piece, so of a large one
only what overlaps, to the next 4 MiB; small ones that lie side by side travel together. A piece is compared with its leaf before a byte of
it is handed on, and fetched again if it is another one. What breaks off is gone on with at the same vault, or at another that has the same
snapshot; when none has let a piece pass for PATIENCE_S, or all have said that they cannot, it is the last one's error.
Memory: one piece for each connection. Rejected: whole old snapshots, to be checked by their one digest (most of it is not wanted).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple, TypeVar

from resilient.checkpoint import layout
from resilient.checkpoint.handed import Handed
from resilient.checkpoint.haul import PIECE_BYTES, TCP, payload_place
from resilient.checkpoint.peer import Peer
from resilient.checkpoint.recut import Lay
from resilient.checkpoint.reshape import Box, stretch
from resilient.checkpoint.snapshot import SNAPSHOT_BYTES_MAX, Snapshot, announced_bytes, parse_head, stamped_digest
from resilient.checkpoint.tally import Tally, piece_digest
from resilient.checkpoint.tier import SnapshotKey
from resilient.checkpoint.transport import Transport
from resilient.errors import CheckpointError, SnapshotCorrupt, SnapshotMismatch, SnapshotMissing, TierUnavailable

PATIENCE_S: Final = 30.0  # without a piece: three leases, so a dead node is known before
PAUSE_S: Final = 0.25
TRIES: Final = 3  # at a vault whose pieces are not what was sealed: wires are seldom wrong twice
ORDER_MAX: Final = 4096  # pieces asked for at once: 16 GiB
T = TypeVar("T")
Run = Callable[[Coroutine[Any, Any, T]], T]


class _Leaf(NamedTuple):
    """A piece of a tensor."""

    row: int
    first: int  # of its bytes, within the tensor
    begin: int  # and in the body
    end: int
    digest: bytes


class Afar:
    """One old rank's snapshot at other nodes' vaults."""

    near = False

    def __init__(
        self, peers: Sequence[Peer], key: SnapshotKey, *, run: str, world_size: int, wait: Run[Any], transport: Transport = TCP
    ) -> None:
        """`peers`: those that have it. `wait`: runs what they do where they live, and waits for it; SnapshotMissing to give up."""
        self.num_bytes = 0  # of its payload, that have been asked for
        self._peers = list(peers)
        self._key, self._run, self._world_size = key, run, world_size
        self._wait = wait
        self._transport = transport
        self._lock = threading.Lock()
        self._header = b""
        self._found: Snapshot | None = None
        self._tally: Tally | None = None

    def head(self) -> Snapshot:
        """As `Source.head`."""
        with self._lock:
            if self._found is None:
                self._found = self._try(self._fetch_head)
            return self._found

    def read(self, wanted: Mapping[int, Box], lay: Lay) -> None:
        """As `Source.read`."""
        rows = layout.decode(self.head().layout).rows
        leaves = list(self._leaves({number: stretch(rows[number], box) for number, box in wanted.items()}))
        gathered = _gathered(leaves)
        for at in range(0, len(gathered), ORDER_MAX):
            self._fetch(gathered[at : at + ORDER_MAX], lay, [row.key for row in rows])

    # ------------------------------------------------------------------ what it holds

    def _fetch_head(self, peer: Peer) -> Snapshot:
        header, head = self._wait(peer.head(self._key, world_size=self._world_size))
        found = self._checked(header, head, peer)
        self._header = header
        return found

    def _checked(self, header: bytes, head: bytes, peer: Peer) -> Snapshot:
        where = f"sent by {peer.address}"
        if (num_bytes := announced_bytes(header, where)) > SNAPSHOT_BYTES_MAX:
            raise SnapshotCorrupt(f"{self._key}: at most {SNAPSHOT_BYTES_MAX} bytes expected, {num_bytes} announced ({where})")
        found = parse_head(header, head, run=self._run, rank=self._key.rank, step=self._key.step, where=where)
        if found.world_size != self._world_size:
            raise SnapshotMismatch(f"{self._key}: of {self._world_size} ranks expected, of {found.world_size} found ({where})")
        return found

    def _known(self) -> Tally:
        """The digests of all its pieces."""
        with self._lock:
            if self._tally is None:
                self._tally = self._try(self._fetch_leaves)
            return self._tally

    def _fetch_leaves(self, peer: Peer) -> Tally:
        assert self._found is not None, "head() comes first"
        header = self._header
        tally = Tally(self._found.layout, self._found.num_bytes - len(header) - payload_place(header))
        tally.take(self._wait(peer.leaves(self._key, header, tally.leaves_bytes(), world_size=self._world_size)))
        if tally.digest() != stamped_digest(header):
            raise SnapshotCorrupt(f"{self._key}: its digests do not make that of its payload (sent by {peer.address})")
        return tally

    def _leaves(self, wanted: Mapping[int, tuple[int, int]]) -> Iterator[_Leaf]:
        """The pieces with something of these bytes of these tensors, in the order of the body."""
        tally, at = self._known(), payload_place(self._header)
        for number, (first, last) in sorted(wanted.items()):
            place = at + tally.places[number][0]
            for begin, end, digest in tally.pieces(number):
                if begin < last and first < end:
                    yield _Leaf(number, begin, place + begin, place + end, digest)

    # ------------------------------------------------------------------ fetching

    def _fetch(self, gathered: Sequence[Sequence[_Leaf]], lay: Lay, names: Sequence[str]) -> None:
        def check(number: int, memory: memoryview, _: bytes) -> None:
            start = gathered[number][0].begin
            for leaf in gathered[number]:
                piece = memory[leaf.begin - start : leaf.end - start]
                if piece_digest(piece) != leaf.digest:
                    raise SnapshotCorrupt(f"{self._key}: {names[leaf.row]} is not what was sealed")
                lay(leaf.row, piece, leaf.first)

        parts = [(leaves[0].begin, leaves[-1].end) for leaves in gathered]
        into = Handed([end - begin for begin, end in parts], check, transport=self._transport)

        def pull(peer: Peer) -> None:
            self._wait(peer.pull(self._key, self._header, parts, into, world_size=self._world_size))
            if len(into.have()) < len(parts):
                raise TierUnavailable(f"{self._key}: {len(parts) - len(into.have())} pieces did not come from {peer.address}")

        self._try(pull, lambda: len(into.have()))
        self.num_bytes += sum(end - begin for begin, end in parts)

    def _try(self, work: Callable[[Peer], T], progress: Callable[[], int] = lambda: 0) -> T:
        """At one vault after the other, as long as it may help."""
        left = dict.fromkeys(self._peers, TRIES)
        error: CheckpointError = SnapshotMissing(f"{self._key}: no other node is known to have it")
        until, before = time.monotonic() + PATIENCE_S, progress()
        while left:
            for peer in list(left):
                try:
                    return work(peer)
                except TierUnavailable as unavailable:
                    error = unavailable
                except SnapshotCorrupt as corrupt:
                    error = corrupt
                    left[peer] -= 1
                except CheckpointError as other:
                    error = other
                    left[peer] = 0
                if not left[peer]:
                    del left[peer]
            if (now := progress()) > before:
                until, before = time.monotonic() + PATIENCE_S, now
            if time.monotonic() > until:
                break
            if left:
                time.sleep(PAUSE_S)
        raise error


def _gathered(leaves: Sequence[_Leaf]) -> list[list[_Leaf]]:
    """Those that lie side by side, but for the zeros between tensors, together, up to a piece of a haul."""
    found: list[list[_Leaf]] = []
    for leaf in leaves:
        if found and leaf.begin - found[-1][-1].end < layout.ALIGN and leaf.end - found[-1][0].begin <= PIECE_BYTES:
            found[-1].append(leaf)
        elif leaf.begin < leaf.end:
            found.append([leaf])
    return found
