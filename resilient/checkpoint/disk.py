"""Disk: the tier that survives everything: checkpoints under a URL that torch itself can read.

Think of a registry of deeds: the papers are brought in one after the other, by whoever has them, and mean nothing until the clerk
enters them in the book. The entry comes last, is made with one stroke, and names every paper with its length and its digest.

    step-00001200/rank-00003.distcp    what one rank wrote (rankfile.py)
    step-00001200/.metadata            the index by which torch.distributed.checkpoint finds every tensor (catalogue.py)
    step-00001200/COMMIT.json          manifest; written last with one put; without it the step is not there

Contract: `list` names committed steps only. `get` puts a rank's snapshot together from the files of all its twins, checks every byte of it,
and names the file and the tensor if one is wrong. A step that is written again, because its bytes were wrong, loses its commit marker
first. The run id is not compared: a later run goes on from an earlier one's steps.
Rejected: a "latest" file (two truths); rename as commit on object stores (there it is a copy and a delete); a format of our own beside
torch's (everything would have to be written twice, or converted before anybody can read it).
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Final

import msgspec
import xxhash

from resilient.checkpoint import imported, layout, rankfile, replicas, reshape, retention
from resilient.checkpoint.catalogue import catalogue
from resilient.checkpoint.committed import Checkpoint, File, Manifest, directory_of
from resilient.checkpoint.layout import Layout
from resilient.checkpoint.replicas import Held
from resilient.checkpoint.retention import KEEP, Keep
from resilient.checkpoint.ring import Ring
from resilient.checkpoint.snapshot import HEADER_BYTES, Buffer, announced_bytes, layout_of, own_of, slot_bytes
from resilient.checkpoint.source import Source, Whole
from resilient.checkpoint.storage import Storage
from resilient.checkpoint.tally import payload_digest
from resilient.checkpoint.tier import Landing, SnapshotKey, check, landing
from resilient.core.messages import Persisted
from resilient.errors import CheckpointError, ReplicasDiffer, SnapshotCorrupt, SnapshotMismatch, SnapshotMissing

FORMAT: Final = 3
MARKER: Final = "COMMIT.json"
METADATA: Final = ".metadata"
Room = Callable[[int], Ring]
_THREADS: Final = 2  # that hash what was read of a rank; the ranks of a node are read at the same time
_STEP_NAME: Final = re.compile(r"step-(\d{8,})")


class DiskTier:
    """Snapshots under one URL. Several nodes may use the same URL at once, each for its own ranks."""

    name = "persistent"

    def __init__(
        self,
        url: str,
        *,
        world_size: int | None = None,
        level: int = 0,
        storage: Storage | None = None,
        wanted: Callable[[], bool] = lambda: True,
    ) -> None:
        """`world_size`: `get` refuses checkpoints of another size (None: any). level: of zstandard, 0 = not compressed.

        storage: that of the URL, if it is there already; else `wanted` and what is raised: as Storage.
        """
        self.url = url
        self.world_size = world_size
        self._level = level
        self._storage = Storage(url, wanted) if storage is None else storage

    # ------------------------------------------------------------------ the four verbs

    def put(self, key: SnapshotKey, sealed: Buffer) -> None:
        """As `Tier.put`. Not listed before `commit`."""
        self.write(key, Whole(check(key, sealed)))

    def get(self, key: SnapshotKey, into: Buffer | Landing) -> int:
        """As `Tier.get`, from a committed step. SnapshotMismatch if that is of another world size than ours."""
        return self._fill(self._checkpoint(key), key, landing(into))

    def reshape(self, key: SnapshotKey, wanted: Layout, room: Room, *, run: str, world_size: int, begun: bytes = b"") -> int:
        """The snapshot of `key` in a world of another size: `wanted` is what that rank tracks, `room(bytes)` where it goes.

        begun: its script's first own state, for an imported step. Gives the old rank whose own state it has. Raises as `get`, unsealed.
        """
        whole = self.checkpoint(key.step)
        called: dict[str, str] | None = None
        if whole.manifest.origin:
            old, (rows, called) = key.rank, imported.fit(wanted, whole.tail(0)[1])
            own = imported.own_state(begun, wanted, imported.rest(whole, wanted, called))
        else:
            old = reshape.own_rank(key.rank, whole.manifest.world_size)
            tail, there = whole.tail(old)
            rows, own = reshape.rows_for(wanted, there), own_of(tail.head)
        described, payload_bytes = rows.encode(), sum(layout.padded(row.num_bytes) for row in rows.rows)
        ring = room(slot_bytes(len(described), len(own), payload_bytes))
        payload = ring.begin(run=run, rank=key.rank, world_size=world_size, round=0, layout=described, own=own, payload_bytes=payload_bytes)
        reshape.assemble(whole, rows, payload, called)
        ring.seal(key.step)
        return old

    def list(self) -> Iterator[SnapshotKey]:
        """As `Tier.list`: sound committed steps only."""
        found: set[SnapshotKey] = set()
        for step in self.steps():
            with contextlib.suppress(SnapshotCorrupt, SnapshotMismatch, SnapshotMissing):
                found.update(SnapshotKey(entry.rank, step) for entry in self.manifest(step).ranks)
        yield from sorted(found)

    def drop(self, key: SnapshotKey) -> None:
        """As `Tier.drop`. A checkpoint that lacks a rank is none, so its marker goes first."""
        self._storage.remove(_marker(key.step))
        self._storage.remove(self.path(key))

    # ------------------------------------------------------------------ writing a checkpoint

    def write(self, key: SnapshotKey, source: Source, *, again: bool = False) -> Persisted:
        """This rank's file of the step, and what the manifest has to list of it.

        A step that is committed already (the run came back to before it) stays as it is, unless `again`: its bytes were wrong.
        Raises as `Source`, TierUnavailable.
        """
        if key.kind != "snapshot":
            raise CheckpointError(f"{key}: the persistent tier keeps snapshots only")
        found = source.found
        if (found.rank, found.step) != (key.rank, key.step):
            raise SnapshotMismatch(f"{key} expected, rank={found.rank} step={found.step} found")
        if not again and self._is_whole(key.step):
            manifest = self.manifest(key.step)
            if manifest.world_size != found.world_size:
                where = self._storage.where(_marker(key.step))
                raise SnapshotMismatch(f"{key}: that step is committed already, by {manifest.world_size} ranks ({where})")
            entry = manifest.ranks[key.rank]
            return Persisted(rank=key.rank, step=key.step, num_bytes=entry.bytes, tail_at=entry.tail_at, digest=entry.xxh3_128)
        self._storage.remove(_marker(key.step))
        with self._storage.writing(self.path(key), found.num_bytes) as output:
            written = rankfile.write(output, source, level=self._level)
        return Persisted(
            rank=key.rank,
            step=key.step,
            num_bytes=written.num_bytes,
            round=found.round,
            tail_at=written.tail_at,
            digest=written.digest,
        )

    def commit(self, step: int, parts: Iterable[Persisted], *, run: str, origin: str = "") -> None:
        """Write index and commit marker: `parts` is one per rank, all written. origin: see Manifest.

        Raises SnapshotMissing if a file is not there whole, ReplicasDiffer if ranks that should hold the same bytes do not.
        """
        entries = tuple(
            File(part.rank, _file_name(part.rank), part.num_bytes, part.tail_at, part.digest)
            for part in sorted(parts, key=lambda part: part.rank)
        )
        if [entry.rank for entry in entries] != list(range(len(entries))) or not entries:
            raise CheckpointError(f"checkpoint step={step}: ranks 0..n-1 expected, {[entry.rank for entry in entries]} given")
        manifest = Manifest(format=FORMAT, step=step, world_size=len(entries), run=run, ranks=entries, origin=origin)
        self.check_sizes(manifest)
        whole = Checkpoint(self._storage, manifest)
        tails = whole.all_tails()
        if differences := replicas.compare([Held((rank,), described, tail.digests) for rank, (tail, described) in tails.items()]):
            raise ReplicasDiffer(f"step {step}: {'; '.join(map(str, differences))}", frozenset(r for d in differences for r in d.ranks))
        index = catalogue((entry.file, *tails[entry.rank]) for entry in entries)
        self._storage.write(f"{directory_of(step)}/{METADATA}", index)
        manifest = msgspec.structs.replace(manifest, metadata=xxhash.xxh3_128_hexdigest(index))
        manifest = msgspec.structs.replace(manifest, digest=_digest(manifest))
        self._storage.write(_marker(step), msgspec.json.format(msgspec.json.encode(manifest), indent=1))

    def prune(self, keep: Keep = KEEP, *, distrusted: Collection[int] = ()) -> tuple[int, ...]:
        """Remove old checkpoints, and uncommitted leftovers older than the newest committed step; the steps removed.

        Counted are only checkpoints that are whole (manifest sound, all files there, not in `distrusted`: steps whose bytes were read
        and found wrong); if none is, nothing is removed.
        """
        doomed = self.outdated(keep, distrusted=distrusted)
        for step in doomed:
            self._storage.remove(_marker(step))  # first, so that what is half removed is not a checkpoint
            self._storage.remove_tree(directory_of(step))
        return doomed

    def outdated(self, keep: Keep = KEEP, *, distrusted: Collection[int] = ()) -> tuple[int, ...]:
        """What `prune` would remove."""
        return retention.outdated(self._directories(), self.steps(), self.whole(distrusted=distrusted), keep)

    # ------------------------------------------------------------------ looking

    def whole(self, *, distrusted: Collection[int] = ()) -> tuple[int, ...]:
        """Committed steps that are trusted, whose manifest is sound and whose files are there in full length; ascending."""
        return tuple(step for step in self.steps() if step not in distrusted and self._is_whole(step))

    def steps(self) -> tuple[int, ...]:
        """Steps that have a commit marker, ascending; whether it is sound is seen when it is read."""
        return tuple(step for step in self._directories() if self._storage.exists(_marker(step)))

    def manifest(self, step: int) -> Manifest:
        """The commit marker of `step`. Raises SnapshotMissing, SnapshotCorrupt naming the file."""
        where = self._storage.where(_marker(step))
        try:
            data = self._storage.read(_marker(step))
        except FileNotFoundError:
            raise SnapshotMissing(f"checkpoint step={step}: no commit marker, so it is not complete ({where})") from None
        try:
            found = msgspec.json.decode(data, type=Manifest)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise SnapshotCorrupt(f"checkpoint step={step}: not a manifest: {error} ({where})") from error
        if found.digest != _digest(found):
            raise SnapshotCorrupt(f"checkpoint step={step}: the manifest is not what was written ({where})")
        ranks = [entry.rank for entry in found.ranks]
        if (found.format, found.step, ranks) != (FORMAT, step, list(range(found.world_size))):
            text = f"format {FORMAT}, step {step} expected, format {found.format}, step {found.step}, {len(ranks)} ranks found"
            raise SnapshotMismatch(f"checkpoint step={step}: {text} ({where})")
        return found

    def checkpoint(self, step: int) -> Checkpoint:
        """A committed step, to be read. Raises as `manifest`."""
        return Checkpoint(self._storage, self.manifest(step))

    def entry(self, key: SnapshotKey) -> File:
        """What the manifest says of `key`. Raises SnapshotMissing, SnapshotCorrupt, SnapshotMismatch (another world size)."""
        return self._checkpoint(key).manifest.ranks[key.rank]

    def path(self, key: SnapshotKey) -> str:
        """Where the file of `key` lies, below the URL."""
        return f"{directory_of(key.step)}/{_file_name(key.rank)}"

    def verify(self, step: int) -> None:
        """Read every byte of a committed step and compare all digests. Raises SnapshotCorrupt, SnapshotMissing naming the file."""
        whole = self.checkpoint(step)
        self.check_sizes(whole.manifest)
        index = f"{directory_of(step)}/{METADATA}"
        try:
            found = xxhash.xxh3_128_hexdigest(self._storage.read(index))
        except FileNotFoundError:
            raise SnapshotMissing(f"checkpoint step={step}: no such file ({self._storage.where(index)})") from None
        if found != whole.manifest.metadata:
            raise SnapshotCorrupt(f"checkpoint step={step}: the index is not what was written ({self._storage.where(index)})")
        for entry in whole.manifest.ranks:
            whole.verify(entry.rank)

    def _checkpoint(self, key: SnapshotKey) -> Checkpoint:
        manifest = self.manifest(key.step)
        where = self._storage.where(_marker(key.step))
        if self.world_size is not None and manifest.world_size != self.world_size:
            text = f"world size {self.world_size} expected, {manifest.world_size} found"
            raise SnapshotMismatch(f"checkpoint step={key.step}: {text} ({where})")
        if key.kind != "snapshot" or not 0 <= key.rank < manifest.world_size:
            raise SnapshotMissing(f"checkpoint step={key.step}: holds no {key} ({where})")
        return Checkpoint(self._storage, manifest)

    def _directories(self) -> tuple[int, ...]:
        found = ((int(match[1]), name) for name in self._storage.names() if (match := _STEP_NAME.fullmatch(name)))
        return tuple(sorted(step for step, name in found if name == directory_of(step)))  # step-000000001 is somebody else's

    def _is_whole(self, step: int) -> bool:
        try:
            self.check_sizes(self.manifest(step))
        except (SnapshotCorrupt, SnapshotMismatch, SnapshotMissing):
            return False
        return True

    def check_sizes(self, manifest: Manifest) -> None:
        """All files of that step are there in full length: one listing. Raises SnapshotMissing, SnapshotCorrupt naming the file."""
        there = self._storage.sizes(directory_of(manifest.step))
        for entry in manifest.ranks:
            where = self._storage.where(f"{directory_of(manifest.step)}/{entry.file}")
            if entry.file not in there:
                raise SnapshotMissing(f"checkpoint step={manifest.step}: no such file ({where})")
            if there[entry.file] != entry.bytes:
                raise SnapshotCorrupt(f"checkpoint step={manifest.step}: {entry.bytes} bytes expected, {there[entry.file]} found ({where})")

    def _fill(self, whole: Checkpoint, key: SnapshotKey, target: Landing) -> int:
        try:
            tail, _ = whole.tail(key.rank)
            num_bytes = announced_bytes(tail.head[:HEADER_BYTES])
            view = target.receive(tail.head[:HEADER_BYTES])
            rest = tail.head[HEADER_BYTES:]
            if HEADER_BYTES + len(view) != num_bytes or len(view) < len(rest):
                raise SnapshotCorrupt(f"{num_bytes} bytes announced, {HEADER_BYTES + len(view)} expected")
            view[: len(rest)] = rest
            payload = view[len(rest) :]
            whole.fill(key.rank, payload, verify=False)
            hashed = payload_digest(layout_of(tail.head), payload, threads=_THREADS) if payload else None
            try:
                target.accept(rank=key.rank, step=key.step, hashed=hashed)
            except SnapshotCorrupt:
                whole.fill(key.rank, payload, verify=True)  # names the file and the tensor
                raise
        except SnapshotMissing as error:  # what a manifest lists is there, or it is damage
            raise SnapshotCorrupt(str(error)) from error
        return num_bytes


def _file_name(rank: int) -> str:
    return f"rank-{rank:05d}.distcp"


def _marker(step: int) -> str:
    return f"{directory_of(step)}/{MARKER}"


def _digest(manifest: Manifest) -> str:
    return xxhash.xxh3_128_hexdigest(msgspec.json.encode(msgspec.structs.replace(manifest, digest="")))
