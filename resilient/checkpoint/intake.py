"""Intake: weights from safetensors files become a committed step, from which a run of any size starts.

Think of a museum that is lent a painting: it is unpacked, measured, given a number and entered in the book as any other; only the book says
that it came from outside.

Contract: `Weights` reads headers; SOURCE is a file, or a directory as Hugging Face users have it (an index and its shards, or one file), on
any URL. `intake` writes one rank file and commits it (imported.py says what a run makes of it). The format has no checksums: bytes are
under ours from here on. Memory: one piece of a tensor. Refused, before anything is written: a step that is committed, or older than one
that is (a run would start from that one), and step 0 (a script begins with that, not a checkpoint).
Rejected: importing torch.distributed.checkpoint directories (their index is a pickle, and nothing here ever reads one).
"""

from __future__ import annotations

import bisect
import os
import tempfile
from collections.abc import Callable
from typing import NamedTuple

import msgspec

from resilient.checkpoint import codec, numbers, safetensors
from resilient.checkpoint.disk import DiskTier
from resilient.checkpoint.layout import ITEMSIZES, Layout, Row, padded
from resilient.checkpoint.safetensors import Place
from resilient.checkpoint.slot import Slot
from resilient.checkpoint.snapshot import slot_bytes
from resilient.checkpoint.source import Live
from resilient.checkpoint.storage import Storage
from resilient.checkpoint.tier import SnapshotKey
from resilient.errors import CheckpointError, SnapshotCorrupt, SnapshotMissing

RUN = "imported"  # the run id of such a step
_INDEX_BYTES_MAX = 64 << 20


class _Index(msgspec.Struct):
    weight_map: dict[str, str]


class Weights:
    """Tensors in files of somebody else's."""

    def __init__(self, source: str, storage: Callable[[str], Storage] = Storage) -> None:
        """Read all headers. Raises SnapshotMissing, SnapshotCorrupt naming the file, TierUnavailable."""
        self.source = source
        directory, _, file = source.rstrip("/").rpartition("/") if source.endswith(safetensors.SUFFIX) else (source, "", "")
        self.storage = storage(directory or ".")
        self.places: dict[str, tuple[str, Place]] = {}  # name -> (file, place), in the files' order
        wanted = {file: None} if file else self._files()
        for name, expected in wanted.items():
            try:
                with self.storage.reading(name) as there:
                    found = safetensors.read_header(there, self.storage.size(name))
            except FileNotFoundError:
                raise SnapshotMissing(f"import from {source}: no such file ({self.storage.where(name)})") from None
            except SnapshotCorrupt as error:
                raise SnapshotCorrupt(f"import from {source}: {error} ({self.storage.where(name)})") from error
            if expected is not None and (odd := sorted(expected ^ found.keys())):
                raise SnapshotCorrupt(f"import from {source}: {odd[0]}: the index and {self.storage.where(name)} do not agree on it")
            self.places |= {tensor: (name, place) for tensor, place in found.items()}

    def _files(self) -> dict[str, set[str] | None]:
        """File -> the tensors that the index says are in it."""
        names = [name for name in self.storage.names() if name.endswith(safetensors.SUFFIX)]
        if self.storage.exists(safetensors.INDEX):
            try:
                index = msgspec.json.decode(self.storage.read(safetensors.INDEX, 0, _INDEX_BYTES_MAX), type=_Index)
            except (msgspec.DecodeError, UnicodeDecodeError) as error:
                raise SnapshotCorrupt(f"import from {self.source}: {safetensors.INDEX} is no index: {error}") from error
            files: dict[str, set[str] | None] = {}
            for tensor, name in index.weight_map.items():
                if "/" in name:
                    raise SnapshotCorrupt(f"import from {self.source}: a file beside the index expected, {name!r} found")
                (files.setdefault(name, set()) or files[name]).add(tensor)  # type: ignore[union-attr]
            return files
        if len(names) != 1:
            there = ", ".join(names) or "none"
            raise SnapshotMissing(
                f"import from {self.source}: {safetensors.INDEX} or one {safetensors.SUFFIX} file expected, {there} found"
            )
        return {names[0]: None}


class Taken(NamedTuple):
    """What was imported."""

    step: int
    tensors: int
    num_bytes: int


def intake(weights: Weights, tier: DiskTier, step: int, *, name: str, dtype: str = "") -> Taken:
    """Commit them as `step`: the module that runs track as `name`. dtype: what floating numbers are turned into; "" = as they are.

    Raises CheckpointError for a step that cannot be, SnapshotCorrupt, TierUnavailable.
    """
    if step < 1:
        raise CheckpointError(f"import as step {step}: 1 or more expected; a script begins with step 0 by itself")
    if (there := tier.steps()) and step <= there[-1]:
        raise CheckpointError(f"import as step {step}: {tier.url} holds step {there[-1]}, and a run would start from that one")
    if not weights.places:
        raise SnapshotMissing(f"import from {weights.source}: tensors expected, none found")
    rows = []
    for tensor, (_, place) in weights.places.items():
        kind = dtype if dtype and place.dtype in numbers.FLOATS else place.dtype
        rows.append(Row(f"{name}.{tensor}", kind, place.shape, (0,) * len(place.shape), place.shape))
    layout, own = Layout(tuple(rows)), codec.encode({})
    described, payload_bytes = layout.encode(), sum(padded(row.num_bytes) for row in rows)
    with tempfile.TemporaryDirectory(prefix="resilient-") as spare:
        path = f"{spare}/head"
        with open(path, "wb") as file:
            os.truncate(file.fileno(), slot_bytes(len(described), len(own), payload_bytes))  # sparse: only the head is written
        slot = Slot(path)
        sizes = {"layout": described, "own": own, "payload_bytes": payload_bytes}
        slot.begin(run=RUN, rank=0, world_size=1, round=0, **sizes).release()  # type: ignore[arg-type]
        slot.seal(step)
        part = tier.write(SnapshotKey(0, step), _Files(slot, weights, layout), again=True)
        slot.close()
    tier.commit(step, [part], run=RUN, origin=weights.source)
    return Taken(step, len(rows), sum(row.num_bytes for row in rows))


class _Files(Live):
    """A slot whose payload lies in files."""

    def __init__(self, slot: Slot, weights: Weights, layout: Layout) -> None:
        """The slot's head is sealed."""
        super().__init__(slot)
        self._storage, self._rows, self._where = weights.storage, layout.rows, list(weights.places.values())
        self._begins = [begin for begin, _ in layout.places()]

    def view(self, begin: int, end: int) -> memoryview:
        """As `Source.view`."""
        found = memoryview(bytearray(end - begin))
        self._fill(found, begin)
        return found

    def _fill(self, view: memoryview, offset: int) -> None:
        while view:
            number = bisect.bisect_right(self._begins, offset) - 1
            done, length = offset - self._begins[number], self._rows[number].num_bytes
            if done < length:
                count = min(len(view), length - done)
                self._read(number, view[:count], done)
            else:
                count = min(len(view), padded(length) - done)
                view[:count] = bytes(count)
            view, offset = view[count:], offset + count

    def _read(self, number: int, view: memoryview, done: int) -> None:
        row, (file, place) = self._rows[number], self._where[number]
        with self._storage.reading(file) as there:
            if row.dtype == place.dtype:
                there.fill(view, place.begin + done)
                return
            old, new = ITEMSIZES[place.dtype], ITEMSIZES[row.dtype]
            first, last = done // new, -(-(done + len(view)) // new)  # elements that have bytes in `view`
            values = memoryview(bytearray((last - first) * old))
            there.fill(values, place.begin + first * old)
        view[:] = numbers.converted(values, place.dtype, row.dtype)[done - first * new :][: len(view)]
