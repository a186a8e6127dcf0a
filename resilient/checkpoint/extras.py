"""Extras: what torch's own checkpoints hold beside parameters and optimizer state: buffers, settings, counters.

Think of the leaflet that comes with a machine: the machine runs without it, but who sells it on has to put it in.

Contract: pure; from a rank's own state and layout, without torch. `of` gives tensors (`pieces()` is a torch file) and plain values (a
pickle that torch.load reads), each with its key as `torch.distributed.checkpoint` flattens it. Random numbers are not among them, nor
what only our codec can carry (sets, numpy arrays, ...): who loads with torch cannot ask for it.
Rejected: making it from the run's objects (the agent has none, and the worker has no time).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final, NamedTuple

import msgspec

from resilient.checkpoint import codec
from resilient.checkpoint.layout import ITEMSIZES, Layout
from resilient.checkpoint.pickling import encode
from resilient.checkpoint.torchfile import cover, cover_value

_PLAIN: Final = (type(None), bool, int, float, str)
_INT_BITS_MAX: Final = 2000  # of what the pickles here can say


class Tensor(NamedTuple):
    """A tensor of own state: raw memory."""

    dtype: str
    shape: tuple[int, ...]
    memory: memoryview


class Value(NamedTuple):
    """One entry."""

    key: str
    path: tuple[str | int, ...]
    value: Any  # a Tensor, or plain data

    @property
    def dtype(self) -> str:
        """Of a tensor, else ""."""
        return self.value.dtype if isinstance(self.value, Tensor) else ""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of a tensor, else ()."""
        return self.value.shape if isinstance(self.value, Tensor) else ()

    def pieces(self) -> tuple[bytes | memoryview, ...]:
        """The torch file."""
        if isinstance(self.value, Tensor):
            covers = cover(self.value.dtype, self.value.shape)
            return covers.front, self.value.memory, covers.back
        return (cover_value(encode(self.value, protocol=2)),)


def of(own: bytes, layout: Layout) -> Iterator[Value]:
    """All entries. Raises SnapshotCorrupt if `own` is none."""
    tree = codec.decode(own, leaf=_leaf)
    for name, state in tree.items():
        if name.startswith(" "):
            continue  # random numbers, and which gradients there were
        if name in layout.groups:
            names = [plain_names(group, layout) for group in layout.groups[name]]
            yield from _walk((name,), {"param_groups": _groups(state["groups"], names)})
        else:
            yield from _walk((name,), state)


def plain_names(keys: tuple[str, ...], layout: Layout) -> list[str]:
    """Names of parameters as torch's checkpoints have them: without the name given to `track`, and without the wrappers'."""
    return [plain_name(key, layout).partition(".")[2] for key in keys]


def plain_name(key: str, layout: Layout) -> str:
    """`key` without what wrappers have put into it."""
    for prefix in sorted(layout.wrapped, key=len, reverse=True):
        if key.startswith(prefix + "module."):
            key = prefix + key.removeprefix(prefix + "module.")
    return key.replace("_checkpoint_wrapped_module.", "").replace("_orig_mod.", "")


def _groups(groups: list[dict[str, Any]], params: list[list[str]]) -> list[dict[str, Any]]:
    return [{**group, "params": names} for group, names in zip(groups, params, strict=True)]


def _walk(path: tuple[str | int, ...], value: Any) -> Iterator[Value]:
    """As torch flattens a state dict: dicts always, lists if there is a tensor or a dict in them."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _walk((*path, str(key)), item)
    elif isinstance(value, list) and not _is_leaf(value):
        for index, item in enumerate(value):
            yield from _walk((*path, index), item)
    elif isinstance(value, Tensor):
        if value.dtype in ITEMSIZES:
            yield Value(_key(path), path, value)
    elif _is_plain(value):
        yield Value(_key(path), path, value)


def _is_leaf(values: list[Any]) -> bool:
    return not any(isinstance(v, (Tensor, Mapping)) or (isinstance(v, list) and not _is_leaf(v)) for v in values)


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return type(value) in (list, tuple) and all(map(_is_plain, value))
    return type(value) in _PLAIN and not (type(value) is int and value.bit_length() > _INT_BITS_MAX)


def _key(path: tuple[str | int, ...]) -> str:
    return ".".join(map(str, path))


def _leaf(kind: str, header: bytes, data: memoryview) -> Any:
    if kind != "tensor":
        return object()
    dtype, shape, _ = msgspec.msgpack.decode(header)
    return Tensor(dtype, tuple(shape), data)
