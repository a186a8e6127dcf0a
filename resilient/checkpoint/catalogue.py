"""Catalogue: the `.metadata` of a checkpoint, from the tails of its rank files.

Think of a library that shelves a book once and has two cards for it: one under the name its author used, one under the name by which
readers ask for it.

Contract: pure. A tensor has a card under each name that the run gave it (`model.module.weight` where DDP wraps it), and one under the name
that torch's state-dict functions use (`model.weight`; `optimizer.state.weight.exp_avg`), if no other tensor has that. Settings of
optimizers stand under their group's number, and under the name of each of its parameters, as those functions give them flattened. A box
that several ranks wrote is listed once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from resilient.checkpoint.dcp import Chunk, Tensor, Where, metadata
from resilient.checkpoint.extras import plain_name, plain_names
from resilient.checkpoint.layout import Layout
from resilient.checkpoint.rankfile import Extra, Tail

Path = tuple[str | int, ...]


class _Card(NamedTuple):
    path: Path
    dtype: str
    shape: tuple[int, ...]
    chunks: dict[tuple[int, ...], Chunk]


def catalogue(files: Iterable[tuple[str, Tail, Layout]]) -> bytes:
    """files: (name below the checkpoint's directory, its tail, its layout), of all ranks in order."""
    cards: dict[str, _Card] = {}  # by the run's own name
    values: dict[str, tuple[Path, Where]] = {}
    named: dict[str, dict[str, Path]] = {}  # torch's name -> the run's -> path
    tied: dict[str, tuple[str, Layout]] = {}
    known: set[str] = set()
    for file, tail, layout in files:
        for item in tail.items:
            row = layout.rows[item.row]
            path = own_path(row.key, layout)
            card = cards.setdefault(row.key, _Card(path, row.dtype, row.shape, {}))
            if row.num_bytes:
                where = Where(file, item.offset, item.length, item.codec)
                card.chunks.setdefault(row.offsets, Chunk(row.offsets, row.local, where))
            plain = torch_path(path, layout)
            named.setdefault(_joined(plain), {})[row.key] = plain
        tied |= {alias: (key, layout) for alias, key in layout.tied.items()}
        for extra in tail.extras:
            if extra.key in known:
                continue  # of several ranks that have it, the first counts
            known.add(extra.key)
            where, begin = Where(file, extra.offset, extra.length), (0,) * len(extra.shape)
            for path in _paths(extra, layout):
                if extra.dtype:
                    cards.setdefault(_joined(path), _Card(path, extra.dtype, extra.shape, {begin: Chunk(begin, extra.shape, where)}))
                else:
                    values.setdefault(_joined(path), (path, where))
    for alias, (key, layout) in tied.items():
        if key in cards and alias not in cards:
            cards[alias] = cards[key]._replace(path=own_path(alias, layout))
            plain = torch_path(cards[alias].path, layout)
            named.setdefault(_joined(plain), {})[alias] = plain
    for name, keys in named.items():
        if len(keys) == 1 and name not in cards:
            ((key, path),) = keys.items()
            cards[name] = cards[key]._replace(path=path)
    tensors = {key: Tensor(card.dtype, card.shape, tuple(card.chunks.values())) for key, card in cards.items()}
    paths = {**{key: card.path for key, card in cards.items()}, **{key: path for key, (path, _) in values.items()}}
    return metadata(tensors, {key: where for key, (_, where) in values.items()}, paths)


def own_path(key: str, layout: Layout) -> Path:
    """The run's name of a tensor as keys of nested dicts: (model, parameter), or (optimizer, "state", parameter's own name, what)."""
    name, _, rest = key.partition(".")
    if name in layout.groups and rest.startswith("state."):
        param, _, what = rest.removeprefix("state.").rpartition(".")
        return name, "state", param, what
    return name, rest


def torch_path(path: Path, layout: Layout) -> Path:
    """The same as torch's state-dict functions give it."""
    match path:
        case (name, "state", param, what):
            return name, "state", plain_name(str(param), layout).partition(".")[2], what
        case (name, rest):
            return name, plain_name(f"{name}.{rest}", layout).partition(".")[2]
        case _:
            return path


def _paths(extra: Extra, layout: Layout) -> Iterator[Path]:
    """All that `extra` is called."""
    yield extra.path
    match extra.path:
        case (str(name), "param_groups", int(number), *rest) if name in layout.groups and rest != ["params"]:
            for param in plain_names(layout.groups[name][number], layout):
                if param:
                    yield name, f"param_groups.{param}.{_joined(tuple(rest))}"
        case (str(name), str(rest)) if (plain := plain_name(f"{name}.{rest}", layout)) != f"{name}.{rest}":
            yield name, plain.partition(".")[2]


def _joined(path: Path) -> str:
    return ".".join(map(str, path))
