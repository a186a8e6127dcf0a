"""Disk: the tier that survives everything, on any place fsspec opens (a directory, s3://, gs://, memory:// ...).

Think of a registry of deeds: the papers are brought in one after the other, by whoever has them, and mean nothing until the clerk
enters them in the book. The entry comes last, is made with one stroke, and names every paper with its length and its digest.

    step-00001200/rank-00003.snap      the sealed bytes of checkpoint/snapshot.py, one file per rank
    step-00001200/COMMIT.json          manifest; written last with one put; without it the step is not there

Contract: `list` names committed steps only. `get` compares length and digest of the file with the manifest, and every digest inside it,
and names the file if one is wrong. Local files are written under another name, fsynced, renamed, and their directory fsynced.
A step that is written again, because its bytes were wrong, loses its commit marker first. The run id is not compared: a later run
goes on from an earlier one's steps.
Rejected: a "latest" file (two truths); rename as commit on object stores (there it is a copy and a delete).
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Collection, Iterable, Iterator
from typing import Any, Final

import fsspec
import msgspec
import xxhash
from fsspec.implementations.local import LocalFileSystem

from resilient.checkpoint.snapshot import HEADER_BYTES, Buffer
from resilient.checkpoint.tier import Landing, SnapshotKey, check, landing
from resilient.core.messages import Persisted
from resilient.errors import CheckpointError, SnapshotCorrupt, SnapshotMismatch, SnapshotMissing, TierUnavailable

FORMAT: Final = 1
MARKER: Final = "COMMIT.json"
KEEP_LAST: Final = 3  # one being read back after a fault, one found damaged, one more
_PIECE: Final = 4 << 20
_STEP_NAME: Final = re.compile(r"step-(\d{8,})")
_MANIFEST_BYTES_MAX: Final = 64 << 20  # 100,000 ranks are 12 MB


class File(msgspec.Struct, frozen=True):
    """One rank's file, as the manifest lists it."""

    rank: int
    file: str
    bytes: int
    xxh3_128: str  # of the whole file


class Manifest(msgspec.Struct, frozen=True):
    """COMMIT.json."""

    format: int
    step: int
    world_size: int
    run: str
    ranks: tuple[File, ...]
    digest: str = ""  # xxh3_128 of this object's JSON with digest = ""


class DiskTier:
    """Snapshots under one URL. Several nodes may use the same URL at once, each for its own ranks."""

    name = "persistent"

    def __init__(self, url: str, *, world_size: int | None = None) -> None:
        """`world_size`: checkpoints of another size are refused (None: any). Nothing is opened yet but fsspec's own driver."""
        self.url = url
        self.world_size = world_size
        try:
            fs, root = fsspec.core.url_to_fs(url)
        except (ImportError, ValueError) as error:
            raise TierUnavailable(f"checkpoint URL {url!r}: {error}") from error
        self._fs: Any = fs
        self._root = str(root).rstrip("/")
        self._local = isinstance(fs, LocalFileSystem)

    # ------------------------------------------------------------------ the four verbs

    def put(self, key: SnapshotKey, sealed: Buffer) -> None:
        """As `Tier.put`. Not listed before `commit`."""
        self.write(key, sealed)

    def get(self, key: SnapshotKey, into: Buffer | Landing) -> int:
        """As `Tier.get`, from a committed step. SnapshotMismatch if that is of another world size than ours."""
        entry = self.entry(key)
        self._fill(entry, key, landing(into))
        return entry.bytes

    def list(self) -> Iterator[SnapshotKey]:
        """As `Tier.list`: sound committed steps only."""
        found: set[SnapshotKey] = set()
        for step in self.steps():
            with contextlib.suppress(SnapshotCorrupt, SnapshotMismatch, SnapshotMissing):
                found.update(SnapshotKey(entry.rank, step) for entry in self.manifest(step).ranks)
        yield from sorted(found)

    def drop(self, key: SnapshotKey) -> None:
        """As `Tier.drop`. A checkpoint that lacks a rank is none, so its marker goes first."""
        self._remove(self._marker(key.step))
        self._remove(self.path(key))

    # ------------------------------------------------------------------ writing a checkpoint

    def write(self, key: SnapshotKey, sealed: Buffer, *, again: bool = False) -> Persisted:
        """The same as `put`, and says what the manifest has to list.

        A step that is committed already (the run came back to before it) stays as it is, unless `again`: its bytes were wrong.
        """
        if key.kind != "snapshot":
            raise CheckpointError(f"{key}: the persistent tier keeps snapshots only")
        data = check(key, sealed)
        if not again and self._is_whole(key.step):
            with contextlib.suppress(SnapshotMissing, SnapshotMismatch):
                entry = self.entry(key)
                return Persisted(rank=key.rank, step=key.step, num_bytes=entry.bytes, digest=entry.xxh3_128)
        self._remove(self._marker(key.step))
        self._write(self.path(key), data)
        return Persisted(rank=key.rank, step=key.step, num_bytes=len(data), digest=xxhash.xxh3_128_hexdigest(data))

    def commit(self, step: int, parts: Iterable[Persisted], *, run: str) -> None:
        """Write the commit marker: `parts` is one per rank, all written. Raises SnapshotMissing if a file is not there whole."""
        entries = tuple(
            File(part.rank, self.path(SnapshotKey(part.rank, step)).rpartition("/")[2], part.num_bytes, part.digest)
            for part in sorted(parts, key=lambda part: part.rank)
        )
        if [entry.rank for entry in entries] != list(range(len(entries))) or not entries:
            raise CheckpointError(f"checkpoint step={step}: ranks 0..n-1 expected, {[entry.rank for entry in entries]} given")
        manifest = Manifest(format=FORMAT, step=step, world_size=len(entries), run=run, ranks=entries)
        self._check_sizes(manifest)
        whole = msgspec.structs.replace(manifest, digest=_digest(manifest))
        self._write(self._marker(step), memoryview(msgspec.json.format(msgspec.json.encode(whole), indent=1)))

    def prune(self, *, keep_last: int = KEEP_LAST, distrusted: Collection[int] = ()) -> tuple[int, ...]:
        """Remove old checkpoints, and uncommitted leftovers older than the newest committed step; the steps removed.

        Counted are only checkpoints that are whole (manifest sound, all files there, not in `distrusted`: steps whose bytes were
        read and found wrong); if none is, nothing is removed.
        """
        committed = self.steps()
        whole = [step for step in committed if step not in distrusted and self._is_whole(step)]
        if not whole:
            return ()
        oldest_kept = whole[-max(1, keep_last) :][0]
        newest = whole[-1]
        doomed = tuple(step for step in self._directories() if step < oldest_kept or (step < newest and step not in committed))
        for step in doomed:
            self._remove(self._marker(step))  # first, so that what is half removed is not a checkpoint
            self._remove_tree(self._directory(step))
        return doomed

    # ------------------------------------------------------------------ looking

    def steps(self) -> tuple[int, ...]:
        """Steps that have a commit marker, ascending; whether it is sound is seen when it is read."""
        with self._answering():
            self._fs.invalidate_cache()
            return tuple(step for step in self._directories() if self._fs.exists(self._marker(step)))

    def manifest(self, step: int) -> Manifest:
        """The commit marker of `step`. Raises SnapshotMissing, SnapshotCorrupt naming the file."""
        path = self._marker(step)
        try:
            with self._answering():
                data: bytes = self._fs.cat_file(path, end=_MANIFEST_BYTES_MAX)
        except FileNotFoundError:
            raise SnapshotMissing(f"checkpoint step={step}: no commit marker, so it is not complete ({path})") from None
        try:
            found = msgspec.json.decode(data, type=Manifest)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise SnapshotCorrupt(f"checkpoint step={step}: not a manifest: {error} ({path})") from error
        if found.digest != _digest(found):
            raise SnapshotCorrupt(f"checkpoint step={step}: the manifest is not what was written ({path})")
        if (found.format, found.step) != (FORMAT, step):
            text = f"format {FORMAT}, step {step} expected, format {found.format}, step {found.step} found"
            raise SnapshotMismatch(f"checkpoint step={step}: {text} ({path})")
        return found

    def entry(self, key: SnapshotKey) -> File:
        """What the manifest says of `key`. Raises SnapshotMissing, SnapshotCorrupt, SnapshotMismatch (another world size)."""
        manifest = self.manifest(key.step)
        if self.world_size is not None and manifest.world_size != self.world_size:
            text = f"world size {self.world_size} expected, {manifest.world_size} found"
            raise SnapshotMismatch(f"checkpoint step={key.step}: {text} ({self._marker(key.step)})")
        entry = next((entry for entry in manifest.ranks if entry.rank == key.rank), None)
        if entry is None or key.kind != "snapshot":
            raise SnapshotMissing(f"checkpoint step={key.step}: holds no {key} ({self._marker(key.step)})")
        return entry

    def path(self, key: SnapshotKey) -> str:
        """Where the file of `key` lies."""
        return f"{self._directory(key.step)}/rank-{key.rank:05d}.snap"

    def _directory(self, step: int) -> str:
        return f"{self._root}/step-{step:08d}"

    def _marker(self, step: int) -> str:
        return f"{self._directory(step)}/{MARKER}"

    def _directories(self) -> tuple[int, ...]:
        with self._answering():
            try:
                names = [str(path).rstrip("/").rpartition("/")[2] for path in self._fs.ls(self._root, detail=False)]
            except FileNotFoundError:
                return ()
        return tuple(sorted(int(match[1]) for name in names if (match := _STEP_NAME.fullmatch(name))))

    def _is_whole(self, step: int) -> bool:
        try:
            self._check_sizes(self.manifest(step))
        except CheckpointError:
            return False
        return True

    def _check_sizes(self, manifest: Manifest) -> None:
        for entry in manifest.ranks:
            path = self.path(SnapshotKey(entry.rank, manifest.step))
            try:
                with self._answering():
                    found = self._fs.size(path)
            except FileNotFoundError:
                raise SnapshotMissing(f"checkpoint step={manifest.step}: no such file ({path})") from None
            if found != entry.bytes:
                raise SnapshotCorrupt(f"checkpoint step={manifest.step}: {entry.bytes} bytes expected, {found} found ({path})")

    # ------------------------------------------------------------------ bytes

    def _fill(self, entry: File, key: SnapshotKey, target: Landing) -> None:
        path = self.path(key)
        digest = xxhash.xxh3_128()
        try:
            with self._answering(), self._fs.open(path, "rb", block_size=_PIECE, cache_type="readahead") as file:
                header = file.read(HEADER_BYTES)
                view = target.receive(header)
                if HEADER_BYTES + len(view) != entry.bytes:
                    raise SnapshotCorrupt(f"{entry.bytes} bytes expected, {HEADER_BYTES + len(view)} announced")
                digest.update(header)
                _read_into(file, view, digest)
            if digest.hexdigest() != entry.xxh3_128:
                raise SnapshotCorrupt(f"digest {entry.xxh3_128} expected, {digest.hexdigest()} found")
            target.accept(rank=key.rank, step=key.step)
        except FileNotFoundError:
            raise SnapshotMissing(f"checkpoint step={key.step}: no such file ({path})") from None
        except (SnapshotCorrupt, SnapshotMissing) as error:  # no seal in a file that a manifest lists is damage as well
            raise SnapshotCorrupt(f"checkpoint step={key.step} rank={key.rank}: {error} ({path})") from error

    def _write(self, path: str, data: memoryview) -> None:
        with self._answering():
            if not self._local:
                with self._fs.open(path, "wb", block_size=max(_PIECE, 5 << 20)) as file:
                    _write_from(file, data)
                return
            directory = os.path.dirname(path)
            os.makedirs(directory, exist_ok=True)
            spare = f"{path}.{os.getpid()}.part"
            with open(spare, "wb") as local:
                _write_from(local, data)
                local.flush()
                os.fsync(local.fileno())
            os.replace(spare, path)
            for changed in (directory, os.path.dirname(directory)):
                _sync_directory(changed)

    def _remove(self, path: str) -> None:
        with self._answering(), contextlib.suppress(FileNotFoundError):
            self._fs.rm_file(path)

    def _remove_tree(self, path: str) -> None:
        with self._answering(), contextlib.suppress(FileNotFoundError):
            self._fs.rm(path, recursive=True)

    @contextlib.contextmanager
    def _answering(self) -> Iterator[None]:
        """Storage that fails is TierUnavailable with the URL; a file that is not there stays FileNotFoundError."""
        try:
            yield
        except FileNotFoundError:
            raise
        except OSError as error:
            raise TierUnavailable(f"checkpoint URL {self.url!r}: {error}") from error


def _digest(manifest: Manifest) -> str:
    return xxhash.xxh3_128_hexdigest(msgspec.json.encode(msgspec.structs.replace(manifest, digest="")))


def _read_into(file: Any, view: memoryview, digest: xxhash.xxh3_128) -> None:
    done = 0
    while done < len(view):
        piece = view[done : done + _PIECE]
        count = file.readinto(piece)
        if not count:
            raise SnapshotCorrupt(f"{HEADER_BYTES + len(view)} bytes expected, {HEADER_BYTES + done} found")
        digest.update(piece[:count])
        done += count
    if file.read(1):
        raise SnapshotCorrupt(f"{HEADER_BYTES + len(view)} bytes expected, more found")


def _write_from(file: Any, data: memoryview) -> None:
    for start in range(0, len(data), _PIECE):
        file.write(data[start : start + _PIECE])


def _sync_directory(path: str) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
