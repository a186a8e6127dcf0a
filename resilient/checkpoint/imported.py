"""Imported: a step that no run wrote: weights from elsewhere, without optimizer state, random numbers, or a place in the data.

Think of a violinist who takes over a famous violin: the instrument is as its maker left it, the fingers and the sheet music are his own.

Contract: such a step has one file, of a world of 1, whose rows are named as the plain module names them (`model.layer.weight`), and its
manifest says where it came from. `fit` (pure) finds for every tensor that a rank tracks the row it begins with, whatever wrappers call it;
optimizer state is not among them, so optimizers begin fresh. `own_state` is the own state with which the script began, with buffers
replaced by the step's. Every tensor of a tracked module must be there, and nothing else: what is missing, left over, or of another shape or
dtype is refused with its name.
Rejected: loading what fits and leaving the rest as the script made it (a misspelt name would train from noise, without a word).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from resilient.checkpoint import codec
from resilient.checkpoint.extras import plain_name
from resilient.checkpoint.layout import Layout, Row
from resilient.checkpoint.reshape import param_of
from resilient.errors import SnapshotMismatch

if TYPE_CHECKING:
    from resilient.checkpoint.committed import Checkpoint

_HINT = " (`resilient ckpt import --dtype` converts)"


def fit(wanted: Layout, there: Layout) -> tuple[Layout, dict[str, str]]:
    """The rows of this rank's snapshot, and name in the step -> name here. Raises SnapshotMismatch naming the first that does not fit."""
    held = {row.key: row for row in there.rows}
    others: dict[str, list[str]] = {}
    for alias, key in wanted.tied.items():
        others.setdefault(key, []).append(alias)
    rows, called = [], {}
    for row in wanted.rows:
        if param_of(row.key, wanted) is not None:
            continue
        names = [plain_name(key, wanted) for key in (row.key, *others.get(row.key, ()))]
        found = next((held[name] for name in names if name in held), None)
        if found is None:
            raise SnapshotMismatch(f"{names[0]}: it is not in the imported step")
        if (found.dtype, found.shape) != (row.dtype, row.shape):
            hint = _HINT if found.shape == row.shape else ""
            raise SnapshotMismatch(f"{names[0]}: {row.dtype} {list(row.shape)} expected, {found.dtype} {list(found.shape)} found{hint}")
        called[found.key] = row.key
        rows.append(row)
    return msgspec.structs.replace(wanted, rows=tuple(rows)), called


def rest(whole: Checkpoint, wanted: Layout, called: Mapping[str, str]) -> dict[str, tuple[Row, memoryview]]:
    """The step's tensors that are no parameters: buffers. Raises SnapshotCorrupt."""
    from resilient.checkpoint.tensors import Tensors  # noqa: PLC0415  it imports disk.py, which imports this file

    tensors = Tensors(whole)
    known = {*called, *(plain_name(alias, wanted) for alias in wanted.tied)}
    left = [entry for key, entry in tensors.entries.items() if key not in known]
    return {entry.key: (entry.row, tensors.read(entry)) for entry in left}


class _Held(NamedTuple):
    kind: str
    header: bytes
    data: bytes | memoryview


def own_state(begun: bytes, wanted: Layout, buffers: Mapping[str, tuple[Row, memoryview]]) -> bytes:
    """`begun` with these buffers. Raises SnapshotMismatch for one that is missing, or is none."""
    if not begun:
        raise SnapshotMismatch("own state: that with which the script began expected, none found: it is too large, or kept in no file")
    tree = codec.decode(begun, leaf=_Held)
    left = dict(buffers)
    modules = {row.key.partition(".")[0] for row in wanted.rows if param_of(row.key, wanted) is None}
    for name in sorted(modules & tree.keys()):
        for fqn, held in tree[name].items():
            if isinstance(held, _Held):
                tree[name][fqn] = _replaced(held, plain_name(f"{name}.{fqn}", wanted), left)
    if left:
        raise SnapshotMismatch(f"{min(left)}: it is in the imported step, and not tracked here")
    return codec.encode(tree, leaf=lambda thing: (thing.kind, thing.header, thing.data) if isinstance(thing, _Held) else None)


def _replaced(held: _Held, key: str, left: dict[str, tuple[Row, memoryview]]) -> _Held:
    if key not in left:
        raise SnapshotMismatch(f"{key}: it is not in the imported step")
    row, memory = left.pop(key)
    dtype, shape, device = msgspec.msgpack.decode(held.header)
    if (dtype, tuple(shape)) != (row.dtype, row.shape):
        hint = _HINT if tuple(shape) == row.shape else ""
        raise SnapshotMismatch(f"{key}: {dtype} {shape} expected, {row.dtype} {list(row.shape)} found{hint}")
    return _Held("tensor", msgspec.msgpack.encode([dtype, shape, device]), memory)
