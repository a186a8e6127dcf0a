"""Export: a committed checkpoint, handed on to somebody else.

Think of a certified copy: every page is compared with the register before it leaves the house, and the stamp comes last.

Contract: `export` copies what torch.distributed.checkpoint reads: the rank files, then `.metadata`. Every byte is checked on the way.
What is there stays: a directory that holds a checkpoint is refused. Memory: one piece of a file at a time.
"""

from __future__ import annotations

from typing import NamedTuple

from resilient.checkpoint.disk import METADATA, DiskTier, directory_of
from resilient.checkpoint.rankfile import PIECE
from resilient.checkpoint.storage import Input, Output, Storage
from resilient.errors import CheckpointError


class Exported(NamedTuple):
    """What was written."""

    step: int
    tensors: int
    num_bytes: int


def export(tier: DiskTier, step: int, directory: str) -> Exported:
    """Write `step` to `directory`, a path or any fsspec URL, which must not hold a checkpoint yet.

    Raises SnapshotMissing, SnapshotCorrupt (naming the file) of what is read, CheckpointError for a directory that is taken.
    """
    target = Storage(directory)
    if target.exists(METADATA):
        raise CheckpointError(f"export to {directory}: it holds a checkpoint already")
    tier.verify(step)
    whole = tier.checkpoint(step)
    tensors, total = set(), 0
    for entry in whole.manifest.ranks:
        tail, described = whole.tail(entry.rank)
        tensors |= {described.rows[item.row].key for item in tail.items}
        with whole.reading(entry.rank) as file, target.writing(entry.file) as output:
            _copy(file, output, entry.tail_at)
        total += entry.tail_at
    target.write(METADATA, whole.storage.read(f"{directory_of(step)}/{METADATA}"))
    return Exported(step, len(tensors), total)


def _copy(file: Input, output: Output, count: int) -> None:
    while output.position < count:
        room = output.room(min(PIECE, count - output.position))
        file.fill(room, output.position)
        output.filled(len(room))
