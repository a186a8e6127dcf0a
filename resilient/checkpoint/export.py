"""Export: a committed checkpoint, handed on to somebody else.

Think of a certified copy: every page is compared with the register before it leaves the house, and the stamp comes last.

Contract: `export` copies what torch.distributed.checkpoint reads: the rank files, then `.metadata`. `export_safetensors` writes the
parameters and buffers of one module, put together from all ranks, under the names that the plain module has, tied tensors once, as Hugging
Face users have them: `model.safetensors`, or numbered shards and, last, their index. Every byte is checked on the way. What is there stays:
a directory that holds one of the files is refused, and an export that is broken off takes its own files away again. Memory: one piece of a
file, or one tensor, at a time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import msgspec

from resilient.checkpoint import safetensors
from resilient.checkpoint.committed import directory_of
from resilient.checkpoint.disk import METADATA, DiskTier
from resilient.checkpoint.output import Output, put
from resilient.checkpoint.storage import Input, Storage
from resilient.checkpoint.tally import PIECE
from resilient.checkpoint.tensors import Entry, Tensors
from resilient.errors import CheckpointError, SnapshotMissing, TierUnavailable


class Exported(NamedTuple):
    """What was written."""

    step: int
    tensors: int
    num_bytes: int
    files: int


def export(tier: DiskTier, step: int, directory: str) -> Exported:
    """Write `step` to `directory`, a path or any fsspec URL, which must not hold a checkpoint yet.

    Raises SnapshotMissing, SnapshotCorrupt (naming the file) of what is read, CheckpointError for a directory that is taken.
    """
    whole = tier.checkpoint(step)
    tensors, total = set(), 0
    names = METADATA, *(entry.file for entry in whole.manifest.ranks)
    _free(Storage(directory), names)
    tier.verify(step)  # takes its time
    with _into(directory, *names) as target:
        for entry in whole.manifest.ranks:
            tail, described = whole.tail(entry.rank)
            tensors |= {described.rows[item.row].key for item in tail.items}
            with whole.reading(entry.rank) as file, target.writing(entry.file) as output:
                _copy(file, output, entry.tail_at)
            total += entry.tail_at
        target.write(METADATA, whole.storage.read(f"{directory_of(step)}/{METADATA}"))
    return Exported(step, len(tensors), total, len(whole.manifest.ranks) + 1)


def export_safetensors(tier: DiskTier, step: int, directory: str, *, name: str, shard_bytes_max: int) -> Exported:
    """Write the module that was tracked as `name`. Raises as `export`; SnapshotMissing if there is none of that name."""
    tensors = Tensors(tier.checkpoint(step))
    if not (entries := tensors.of(name)):
        names = sorted({str(entry.path[0]) for entry in tensors.entries.values() if len(entry.path) == 2})
        raise SnapshotMissing(f"{tier.url} step {step}: module {name!r} expected, {', '.join(names) or 'none'} found")
    shards = list(_shards(entries, shard_bytes_max))
    numbers = [f"-{number:05d}-of-{len(shards):05d}" if len(shards) > 1 else "" for number in range(1, len(shards) + 1)]
    files = ["model" + number + safetensors.SUFFIX for number in numbers]
    total = 0
    where: dict[str, str] = {}
    with _into(directory, safetensors.INDEX, "model" + safetensors.SUFFIX, *files) as target:
        for file, shard in zip(files, shards, strict=True):
            _write_file(target, file, tensors, shard)
            where |= dict.fromkeys((_name(entry) for entry in shard), file)
            total += sum(entry.num_bytes for entry in shard)
        if len(shards) > 1:
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
            target.write(safetensors.INDEX, msgspec.json.format(msgspec.json.encode(index), indent=2))
    return Exported(step, len(entries), total, len(shards) + (len(shards) > 1))


class _Target(Storage):
    """Where an export goes: knows which files it has begun."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.begun: list[str] = []

    @contextlib.contextmanager
    def writing(self, path: str, about_bytes: int = 0) -> Iterator[Output]:
        self.begun.append(path)
        with super().writing(path, about_bytes) as output:
            yield output


@contextlib.contextmanager
def _into(directory: str, *names: str) -> Iterator[Storage]:
    """Where files of these names come: none of them is there before, and none that was begun stays if the block ends with an exception."""
    target = _Target(directory)
    _free(target, names)
    try:
        yield target
    except BaseException:
        for name in target.begun:
            with contextlib.suppress(TierUnavailable):  # the first error is the one to be told
                target.remove(name)
        raise


def _free(target: Storage, names: Sequence[str]) -> None:
    there = set(target.names())
    if taken := [name for name in names if name in there]:
        raise CheckpointError(f"export to {target.url}: a directory without {taken[0]} expected, it is there already")


def _name(entry: Entry) -> str:
    return str(entry.path[1])


def _shards(entries: Iterable[Entry], num_bytes_max: int) -> Iterable[list[Entry]]:
    """In the module's order, as many as fit; a tensor that fits nowhere has a file of its own."""
    shard: list[Entry] = []
    size = 0
    for entry in entries:
        if shard and size + entry.num_bytes > num_bytes_max:
            yield shard
            shard, size = [], 0
        shard.append(entry)
        size += entry.num_bytes
    yield shard


def _write_file(target: Storage, file: str, tensors: Tensors, shard: list[Entry]) -> None:
    named = {_name(entry): entry for entry in shard}
    front, places = safetensors.header((name, entry.dtype, entry.shape) for name, entry in named.items())
    with target.writing(file) as output:
        put(output, front)
        for place in places:
            put(output, tensors.read(named[place.name]))


def _copy(file: Input, output: Output, count: int) -> None:
    while output.position < count:
        room = output.room(min(PIECE, count - output.position))
        file.fill(room, output.position)
        output.filled(len(room))
