"""Buffers: what a module keeps beside its parameters (BatchNorm's statistics), as one rank's own state.

Think of the notes on the back of a player's music: they go with the player, and on the back of another piece they would be nonsense.

Contract: persistent buffers only, by their names in the module. `put` looks at all of them before it touches one: a name that is missing,
another dtype or another shape is SnapshotMismatch, for a tensor of another shape would be spread over the place of this one without a
word. A buffer that is registered, or made of None, later (by a first forward) may be missing, or there, on either side: what a module that
has not run yet lacks is registered in it, and told on stderr.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor, nn

from resilient.checkpoint import capture
from resilient.errors import SnapshotMismatch

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping


class Buffers:
    """Those of one module, tracked as `name`."""

    def __init__(self, name: str, module: nn.Module) -> None:
        """Nothing is copied."""
        self._name, self._module = name, module
        self._late: set[str] = set()  # those that were None at some time, or not there
        self._first: set[str] | None = None  # those that were there when somebody asked first

    def __bool__(self) -> bool:
        """Whether there is any."""
        return any(place.tensor is not None for place in self._places())

    def take(self) -> dict[str, Tensor]:
        """By name, by reference."""
        places = list(self._places())
        self._first = {place.fqn for place in places} if self._first is None else self._first
        self._late.update(place.fqn for place in places if place.tensor is None or place.fqn not in self._first)
        return {place.fqn: place.tensor for place in places if place.tensor is not None}

    def put(self, saved: Mapping[str, Tensor]) -> None:
        """What `take` gave, here or in another process. Raises SnapshotMismatch naming the first that does not fit."""
        places = {place.fqn: place for place in self._places()}
        for fqn, place in places.items():
            found, late = saved.get(fqn), place.tensor is None or fqn in self._late
            if found is None and not late:
                raise SnapshotMismatch(f"own state: the buffer {self._name}.{fqn} expected, none found")
            if found is not None and place.tensor is not None and _kind(found) != _kind(place.tensor):
                raise SnapshotMismatch(f"own state: {self._name}.{fqn}: {_kind(place.tensor)} expected, {_kind(found)} found")
        owners = dict(self._module.named_modules())
        foreign = [fqn for fqn in saved if fqn not in places]
        for fqn in foreign:
            owner, _, key = fqn.rpartition(".")
            if owner not in owners or hasattr(owners[owner], key):
                raise SnapshotMismatch(f"own state: the buffer {self._name}.{fqn} found, which the module does not have")
        for fqn, place in places.items():
            if place.tensor is not None and fqn in saved:
                capture.fill(place.tensor.data, saved[fqn])
            elif fqn in saved or self._first is None or fqn in self._first:
                place.owner._buffers[place.key] = saved.get(fqn)  # noqa: SLF001  as register_buffer does
            else:
                delattr(place.owner, place.key)  # it was not registered then
        for fqn in foreign:
            owner, _, key = fqn.rpartition(".")
            sys.stderr.write(f"resilient: the buffer {self._name}.{fqn} is registered: what is put back has it\n")
            owners[owner].register_buffer(key, saved[fqn].clone())
            self._late.add(fqn)

    def _places(self) -> Iterator[_Place]:
        for prefix, owner in self._module.named_modules():
            for key, tensor in owner._buffers.items():  # noqa: SLF001  named_buffers() does not tell the persistent ones
                if key not in owner._non_persistent_buffers_set:  # noqa: SLF001
                    yield _Place(f"{prefix}.{key}" if prefix else key, owner, key, tensor)


class _Place(NamedTuple):
    fqn: str
    owner: nn.Module
    key: str
    tensor: Tensor | None


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
