"""Capture: shared tensors into a snapshot's payload and back.

Think of packing a suitcase by a fixed list: every thing has its place, known before the journey, so packing is one copy and unpacking
another. The list itself (names, dtypes, shapes, offsets) travels in the snapshot's layout. What may be worn before the next stop goes in
first, while everybody waits; the rest is packed while the guests are at breakfast, and nobody touches it meanwhile.

Contract: tensors lie in the order given, each at a multiple of 64 bytes, with zeros between them: what another snapshot has left there
would be under the payload's digest, and whoever puts a payload together from a checkpoint's files does not know it. Both directions touch
every byte once: a state of n bytes costs n / (memory bandwidth). Contiguous host tensors are copied as bytes, by several threads
(movers.py); what has other strides by torch; what lies on a GPU by its driver, on a stream of its own (capture_gpu.py).
All is complete when `save` or `load` returns. `begin` returns as soon as the program may go on: what is not `steady` (changed by nothing
but what waits at a gate) has been copied by then, or stands in the stream before whatever the program launches next. The rest, of tensors
on a GPU (`overlap`: of the host too), is a `Passage`: whoever has finished it knows that every byte is there, and asks whether one of those
tensors was written to meanwhile. Then the payload is worth nothing.
Numbers: besides the bytes, 1 us for each tensor: where it lies is asked anew each time, so a tensor may move between two saves.
Rejected: the host's copy beside forward and backward as a rule (it takes from them the memory bandwidth and the cores that it needs).
"""

from __future__ import annotations

import itertools
import warnings
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Protocol

import torch

from resilient.checkpoint import capture_gpu
from resilient.checkpoint.layout import padded
from resilient.checkpoint.movers import SMALL, Movers, cut
from resilient.errors import SnapshotMismatch

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence

    from resilient.checkpoint.capture_gpu import Piece
    from resilient.checkpoint.movers import Move


_ZEROS: Final = torch.zeros(64, dtype=torch.uint8)  # longer than any gap


class Part(Protocol):
    """What is packed: a tensor on this rank."""

    @property
    def key(self) -> str: ...  # noqa: D102
    @property
    def local(self) -> torch.Tensor: ...  # noqa: D102
    @property
    def num_bytes(self) -> int: ...  # noqa: D102
    @property
    def steady(self) -> bool:
        """Nothing changes it between a boundary and the gate after it."""

    @property
    def version(self) -> int:
        """Grows when something writes to it, as far as torch sees."""


def payload_bytes(parts: Sequence[Part]) -> int:
    """Bytes that `save` needs."""
    return sum(padded(part.num_bytes) for part in parts)


def save(parts: Sequence[Part], payload: memoryview) -> None:
    """Copy every tensor into `payload` ((payload_bytes,) uint8, writable)."""
    Packing(parts, Movers(1)).save(payload)


def load(parts: Sequence[Part], payload: memoryview) -> None:
    """Copy `payload` into the tensors, in place."""
    Packing(parts, Movers(1)).load(payload)


def fill(tensor: torch.Tensor, values: torch.Tensor) -> None:
    """Values of the same shape into a tensor, in place; into one that was expanded, where it has memory."""
    for axis, (size, stride) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
        if stride == 0 and size > 1:
            tensor, values = tensor.narrow(axis, 0, 1), values.narrow(axis, 0, 1)
    tensor.copy_(values)


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """Its values as bytes, (n,) uint8: its own memory if that is plain."""
    return tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)


class Passage:
    """Copies under way out of tensors that are expected to stay as they are meanwhile."""

    def __init__(self, parts: Sequence[Part], ends: Sequence[Callable[[], None]]) -> None:
        """Before the first byte is copied. `ends`: each returns when its share of the copies is complete."""
        self._watched = Watched(parts)
        self._ends = ends

    def finish(self) -> None:
        """Return when every byte is there. Once, on any thread; raises what went wrong."""
        for end in self._ends:
            end()

    def touched(self) -> list[str]:
        """Keys of the tensors that were written to, or lie elsewhere, since the passage began: their bytes may be torn."""
        return self._watched.touched()


class Watched:
    """Tensors, as they are now: by address and version counter. What goes past both (`tensor.data`, the user's own kernels) is not seen."""

    def __init__(self, parts: Sequence[Part]) -> None:
        """1 us for each."""
        self._parts = parts
        self._marks = [_mark(part) for part in parts]

    def touched(self) -> list[str]:
        """Keys of those that are not what they were."""
        return [part.key for part, mark in zip(self._parts, self._marks, strict=True) if _mark(part) != mark]


@dataclass
class _Host:
    """Tensors of the host that are copied at the same time."""

    small: list[torch.Tensor] = field(default_factory=list)
    small_at: list[tuple[int, int]] = field(default_factory=list)  # offset in the payload, bytes
    large: list[torch.Tensor] = field(default_factory=list)
    large_at: list[tuple[int, int]] = field(default_factory=list)
    other: list[tuple[torch.Tensor, int]] = field(default_factory=list)  # not plain bytes, and their offsets

    def add(self, tensor: torch.Tensor, offset: int, count: int) -> None:
        if not plain(tensor):
            self.other.append((tensor, offset))
        else:
            (self.large if count > SMALL else self.small).append(tensor)
            (self.large_at if count > SMALL else self.small_at).append((offset, count))

    def as_sorted(self) -> bool:
        """Whether what was plain still is."""
        return all(map(torch.Tensor.is_contiguous, self.small)) and all(map(torch.Tensor.is_contiguous, self.large))

    def job(self, flat: torch.Tensor, movers: Movers, *, out: bool, held: bool = False) -> Callable[[], None]:
        """The copies, for any thread. Addresses are those of now; raises SnapshotMismatch for a tensor without memory.

        held: what is there now is copied even if the program lets go of it, or puts other memory under its tensor.
        """
        base = flat.data_ptr()
        memory = [tensor.untyped_storage() for tensor in (*self.small, *self.large)] if held else []
        small, large = _moves(self.small, self.small_at, base, out=out), _moves(self.large, self.large_at, base, out=out)

        def run() -> None:
            with torch.no_grad():
                for tensor, offset in self.other:
                    packed = flat[offset : offset + tensor.numel() * tensor.element_size()].view(tensor.dtype).view(tensor.shape)
                    if out:
                        packed.copy_(tensor)
                    else:
                        fill(tensor, packed)
            movers.move(small, [piece for move in large for piece in cut(move)])
            memory.clear()

        return run


class Packing:
    """The list for these parts, made once and used for many journeys. One thread's. Raises SnapshotMismatch for a tensor without memory."""

    def __init__(self, parts: Sequence[Part], movers: Movers, *, overlap: bool = False, restless: Collection[str] = ()) -> None:
        """`parts` keep their dtypes and shapes; an address may change, and memory formats too.

        overlap: steady tensors of the host are copied behind as well. restless: keys of parts that are not steady after all.
        """
        self.parts = parts
        self.num_bytes = payload_bytes(parts)
        self._movers, self._overlap, self._restless = movers, overlap, restless
        self._sort()

    def save(self, payload: memoryview) -> None:
        """Copy every tensor into `payload` ((num_bytes,) uint8, writable)."""
        passage = self.begin(payload)
        if passage is not None:
            passage.finish()

    def begin(self, payload: memoryview) -> Passage | None:
        """The same, returning as soon as the program may go on. None: all is there. Else `payload` stays mapped until it is finished."""
        flat = self._ready(payload)
        ends: list[Callable[[], None]] = []
        passage = Passage(self._behind, ends)
        first = self._first.job(flat, self._movers, out=True)
        rest = self._rest.job(flat, self._movers, out=True, held=True)
        try:
            ends += [lane.save(flat) for lane in self._lanes]
            first()
            base, zeros = flat.data_ptr(), _ZEROS.data_ptr()
            self._movers.move([(base + offset, zeros, gap) for offset, gap in self._gaps], [])
        except BaseException:
            for lane in self._lanes:
                lane.drain()
            raise
        if self._overlap and self.num_bytes:
            ends.append(rest)
        return passage if ends else None

    def load(self, payload: memoryview) -> None:
        """Copy `payload` into the tensors, in place."""
        flat = self._ready(payload)
        jobs = [host.job(flat, self._movers, out=False) for host in (self._first, self._rest)]
        try:
            for lane in self._lanes:
                lane.load(flat)
            for job in jobs:
                job()
        finally:
            for lane in self._lanes:
                lane.drain()
        with torch.no_grad():
            for host in (self._first, self._rest):
                torch.autograd.graph.increment_version([*host.small, *host.large])  # as copy_ would have done

    def _sort(self) -> None:
        """Which tensors are copied first and which behind, where they lie, which are plain bytes, and which of those are large."""
        self._first, self._rest = _Host(), _Host()
        self._behind: list[Part] = []
        self._gaps: list[tuple[int, int]] = []
        cargo: dict[torch.device, tuple[list[Piece], list[Piece]]] = {}
        offsets = itertools.accumulate((padded(part.num_bytes) for part in self.parts), initial=0)
        for part, offset in zip(self.parts, offsets, strict=False):
            steady = part.steady and part.key not in self._restless
            if not part.num_bytes:
                continue
            if gap := padded(part.num_bytes) - part.num_bytes:
                self._gaps.append((offset + part.num_bytes, gap))
            if part.local.is_cuda:
                first, rest = cargo.setdefault(part.local.device, ([], []))
                (rest if steady else first).append((part.local, offset))
            else:
                steady = steady and self._overlap
                (self._rest if steady else self._first).add(part.local, offset, part.num_bytes)
            if steady:
                self._behind.append(part)
        self._lanes = [capture_gpu.Lane(device, first, rest) for device, (first, rest) in cargo.items()]

    def _ready(self, payload: memoryview) -> torch.Tensor:
        """The payload as a tensor; the list as things lie now."""
        assert len(payload) >= self.num_bytes, f"payload: {self.num_bytes} bytes expected, {len(payload)} found"
        if not (self._first.as_sorted() and self._rest.as_sorted() and all(lane.as_sorted() for lane in self._lanes)):
            self._sort()
        return _flat(payload) if self.num_bytes else torch.empty(0, dtype=torch.uint8)


def _mark(part: Part) -> tuple[int, int]:
    return part.version, part.local.data_ptr()


def plain(tensor: torch.Tensor) -> bool:
    """Whether its values are just the bytes behind data_ptr, in the order of its shape."""
    return (
        type(tensor) in (torch.Tensor, torch.nn.Parameter)
        and tensor.device.type == "cpu"
        and tensor.layout == torch.strided
        and tensor.is_contiguous()
        and not tensor.is_conj()
        and not tensor.is_neg()
    )


def _moves(tensors: list[torch.Tensor], places: list[tuple[int, int]], base: int, *, out: bool) -> list[Move]:
    addresses = [tensor.data_ptr() for tensor in tensors]
    if 0 in addresses:
        lost = tensors[addresses.index(0)]
        raise SnapshotMismatch(f"shared tensor {list(lost.shape)}: its memory was given back (storage().resize_(0)) and it is still in use")
    pairs = zip(addresses, places, strict=True)
    if out:
        return [(base + offset, address, count) for address, (offset, count) in pairs]
    return [(address, base + offset, count) for address, (offset, count) in pairs]


def _flat(payload: memoryview) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # "not writable": a sealed snapshot is only read
        return torch.frombuffer(payload, dtype=torch.uint8)
