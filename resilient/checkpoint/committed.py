"""Committed: one step of the persistent tier, as its manifest describes it, to be read.

Think of an entry in the register of deeds, with the shelf mark of every paper: whoever has the entry can fetch the papers, and sees at
once if one has been exchanged.

Contract: what is read is checked: a file's size and tail against the manifest, a tensor against its digest. Errors name file and tensor.
Not thread-safe: one reader has one of these.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Final

import msgspec

from resilient.checkpoint import layout, rankfile
from resilient.checkpoint.layout import Layout
from resilient.checkpoint.rankfile import Tail
from resilient.checkpoint.snapshot import layout_of
from resilient.checkpoint.storage import Input, Storage
from resilient.errors import SnapshotCorrupt, SnapshotMissing

_TAILS: Final = 64  # read at a time: a thousand ranks are not asked one after the other


class File(msgspec.Struct, frozen=True):
    """One rank's file, as the manifest lists it."""

    rank: int
    file: str
    bytes: int
    tail_at: int
    xxh3_128: str  # of the tail


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):  # a flipped bit in the name of a field is seen, too
    """COMMIT.json."""

    format: int
    step: int
    world_size: int
    run: str
    ranks: tuple[File, ...]
    metadata: str = ""  # xxh3_128 of `.metadata`
    origin: str = ""  # what it was imported from (imported.py); "" = a run wrote it
    digest: str = ""  # xxh3_128 of this object's JSON with digest = ""


class Checkpoint:
    """A committed step: its files are opened when they are needed, each tail is read and checked once."""

    def __init__(self, storage: Storage, manifest: Manifest) -> None:
        """Nothing is read yet."""
        self.storage, self.manifest = storage, manifest
        self._tails: dict[int, tuple[Tail, Layout]] = {}

    def path(self, rank: int) -> str:
        """Of a rank's file, below the URL."""
        return f"{directory_of(self.manifest.step)}/{self.manifest.ranks[rank].file}"

    def tail(self, rank: int) -> tuple[Tail, Layout]:
        """The tail of that rank's file and the layout in it. Raises SnapshotMissing, SnapshotCorrupt naming the file."""
        if rank not in self._tails:
            with self.reading(rank) as file:
                entry = self.manifest.ranks[rank]
                if file.num_bytes != entry.bytes:
                    raise SnapshotCorrupt(f"{entry.bytes} bytes expected, {file.num_bytes} found")
                found = rankfile.read_tail(file, entry.bytes, entry.tail_at, entry.xxh3_128)
                self._tails[rank] = found, layout.decode(layout_of(found.head))
        return self._tails[rank]

    def all_tails(self) -> dict[int, tuple[Tail, Layout]]:
        """Those of all ranks, many at a time. The sizes of the files have been checked. Raises as `tail`."""
        for begin in range(0, len(self.manifest.ranks), _TAILS):
            batch = self.manifest.ranks[begin : begin + _TAILS]
            try:
                found = self.storage.read_ranges([(self.path(entry.rank), entry.tail_at, entry.bytes) for entry in batch])
            except FileNotFoundError as error:
                raise SnapshotMissing(f"checkpoint step={self.manifest.step}: no such file ({error})") from None
            for entry, data in zip(batch, found, strict=True):
                with self._naming(entry.rank):
                    tail = rankfile.parse_tail(data, entry.xxh3_128)
                    self._tails[entry.rank] = tail, layout.decode(layout_of(tail.head))
        return self._tails

    @contextlib.contextmanager
    def reading(self, rank: int) -> Iterator[Input]:
        """That rank's file; what is wrong with it is told with its name."""
        with self._naming(rank), self.storage.reading(self.path(rank)) as file:
            yield file

    @contextlib.contextmanager
    def _naming(self, rank: int) -> Iterator[None]:
        path = self.path(rank)
        try:
            yield
        except FileNotFoundError:
            raise SnapshotMissing(f"checkpoint step={self.manifest.step}: no such file ({self.storage.where(path)})") from None
        except SnapshotCorrupt as error:
            where = f"({self.storage.where(path)})"
            raise SnapshotCorrupt(f"checkpoint step={self.manifest.step} rank={rank}: {error} {where}") from error

    def fill(self, rank: int, payload: memoryview, *, verify: bool) -> None:
        """The whole payload of a rank. verify: compare the digest of each tensor. Raises SnapshotCorrupt, SnapshotMissing."""
        own, mine = self.tail(rank)
        places, end = mine.places(), 0
        numbers: dict[int, list[int]] = {}
        for number, writer in rankfile.shares(mine, rank):
            numbers.setdefault(writer, []).append(number)
        for writer, wanted in numbers.items():
            tail, theirs = self.tail(writer)
            items = {item.row: item for item in tail.items}
            with self.reading(writer) as file:
                for number in wanted:
                    row, (begin, length) = mine.rows[number], places[number]
                    end = max(end, begin + layout.padded(length))
                    if theirs.rows[number : number + 1] != (row,) or number not in items:
                        raise SnapshotCorrupt(f"{row.key} expected, it is not there")
                    if end > len(payload):
                        raise SnapshotCorrupt(f"{row.key}: a payload of {end} bytes expected, {len(payload)} found")
                    rankfile.fill_row(file, items[number], row, payload[begin : begin + length], own.digests[number] if verify else b"")
                    payload[begin + length : begin + layout.padded(length)] = bytes(layout.padded(length) - length)
        with self.reading(rank) as file:
            if end != len(payload):
                raise SnapshotCorrupt(f"a payload of {end} bytes described, {len(payload)} announced")
            rankfile.check_rest(file, own, mine, self.manifest.ranks[rank].tail_at)

    def verify(self, rank: int) -> None:
        """Read all that `rank` wrote, and compare every byte. Raises SnapshotCorrupt, SnapshotMissing naming the file."""
        tail, described = self.tail(rank)
        with self.reading(rank) as file:
            rankfile.check_items(file, tail, described)
            rankfile.check_rest(file, tail, described, self.manifest.ranks[rank].tail_at)


def directory_of(step: int) -> str:
    """Of a step, below the URL."""
    return f"step-{step:08d}"
