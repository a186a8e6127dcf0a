"""Export: a committed checkpoint as one that `torch.distributed.checkpoint` reads, made without torch.

Think of a translator who lays the pages out in the order that the other library's readers expect; not a word is changed.

    <directory>/rank-00003.distcp    the tensors of one rank that no rank before had, each as a torch file (torchfile.py)
    <directory>/.metadata            written last (dcp.py); without it there is no checkpoint

Contract: every byte is verified as it is read (DiskTier.get). A tensor that several ranks hold alike, the replicated state of DDP, is
written once. Names are those of the snapshot's layout, `<tracked name>.<key>`, so `{"model": module.state_dict()}` finds its tensors in any
world size. Own states (random numbers, counters) are not part of it. Memory: one rank's file at a time.
"""

from __future__ import annotations

from typing import Any, Final, NamedTuple

import fsspec
import msgspec

from resilient.checkpoint.dcp import Chunk, Tensor, Where, metadata
from resilient.checkpoint.disk import DiskTier
from resilient.checkpoint.snapshot import parse
from resilient.checkpoint.tier import SnapshotKey
from resilient.checkpoint.torchfile import cover
from resilient.errors import CheckpointError, TierUnavailable

_ALIGN: Final = 64  # of tensors in a payload (capture.py)
Row = tuple[str, str, tuple[int, ...], tuple[int, ...], tuple[int, ...]]  # key, dtype, global shape, offsets, local shape


class Exported(NamedTuple):
    """What was written."""

    step: int
    tensors: int
    num_bytes: int


def export(tier: DiskTier, step: int, directory: str) -> Exported:
    """Write `step` to `directory`, a path or any fsspec URL, which must not hold a checkpoint yet.

    Raises SnapshotMissing, SnapshotCorrupt (naming the file) of what is read, CheckpointError for a directory that is taken.
    """
    try:
        fs, root = fsspec.core.url_to_fs(directory)
        if fs.exists(f"{root}/.metadata"):
            msg = f"export to {directory}: it holds a checkpoint already"
            raise CheckpointError(msg)
        fs.makedirs(root, exist_ok=True)
    except (OSError, ImportError, ValueError) as error:
        msg = f"export to {directory}: {error}"
        raise TierUnavailable(msg) from error
    found: dict[str, tuple[str, tuple[int, ...], dict[tuple[int, ...], Chunk]]] = {}
    total = 0
    for entry in tier.manifest(step).ranks:
        data = memoryview(bytearray(entry.bytes))
        tier.get(SnapshotKey(entry.rank, step), data)
        snapshot = parse(data, verify=False)
        name = f"rank-{entry.rank:05d}.distcp"
        with fs.open(f"{root}/{name}", "wb") as out:
            total += _put(out, name, msgspec.msgpack.decode(snapshot.layout, type=list[Row]), snapshot.payload, found)
    tensors = {key: Tensor(dtype, shape, tuple(chunks.values())) for key, (dtype, shape, chunks) in found.items()}
    paths = {key: tuple(key.split(".", 1)) for key in tensors}
    with fs.open(f"{root}/.metadata", "wb") as out:
        out.write(metadata(tensors, {}, paths))
    return Exported(step, len(tensors), total)


def _put(out: Any, name: str, rows: list[Row], payload: memoryview, found: dict[str, Any]) -> int:
    """Write what is new of one rank; gives the bytes written."""
    source = position = 0
    for key, dtype, shape, offsets, local in rows:
        front, back, num_bytes = cover(dtype, local)
        _, _, chunks = found.setdefault(key, (dtype, shape, {}))
        if offsets not in chunks and num_bytes:
            for piece in (front, payload[source : source + num_bytes], back):
                out.write(piece)
            length = len(front) + num_bytes + len(back)
            chunks[offsets] = Chunk(offsets, local, Where(name, position, length))
            position += length
        source += (num_bytes + _ALIGN - 1) // _ALIGN * _ALIGN
    return position
