"""Capture: shared tensors into a snapshot's payload and back.

Think of packing a suitcase by a fixed list: every thing has its place, known before the journey, so packing is one copy and unpacking
another. The list itself (names, dtypes, shapes, offsets) travels in the snapshot's layout.

Contract: tensors lie in the order given, each at a multiple of 64 bytes, with zeros between them: what another snapshot has left there
would be under the payload's digest, and whoever puts a payload together from a checkpoint's files does not know it. Both directions touch
every byte once: a state of n bytes costs n / (memory bandwidth). Contiguous host tensors are copied as bytes, by several threads
(movers.py); what has other strides by torch; what lies on an accelerator by the driver, on a stream of its own beside the host's copy. All
is complete when `save` or `load` returns.
Numbers: besides the bytes, 1 us for each tensor: where it lies is asked anew each time, so a tensor may move between two saves.
Not run on a GPU yet: the branches for CUDA (`_Queue`, `Registered`).
"""

from __future__ import annotations

import contextlib
import warnings
from typing import TYPE_CHECKING, Final, Protocol

import torch

from resilient.checkpoint.layout import padded
from resilient.checkpoint.movers import SMALL, Movers, cut
from resilient.errors import SnapshotMismatch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from resilient.checkpoint.movers import Move

_ZEROS: Final = torch.zeros(64, dtype=torch.uint8)  # longer than any gap
_PORTABLE: Final = 1  # cudaHostRegisterPortable: pinned for every context of the process


class Part(Protocol):
    """What is packed: a tensor on this rank."""

    @property
    def local(self) -> torch.Tensor: ...  # noqa: D102
    @property
    def num_bytes(self) -> int: ...  # noqa: D102


def payload_bytes(parts: Sequence[Part]) -> int:
    """Bytes that `save` needs."""
    return sum(padded(part.num_bytes) for part in parts)


def save(parts: Sequence[Part], payload: memoryview) -> None:
    """Copy every tensor into `payload` ((payload_bytes,) uint8, writable)."""
    Packing(parts, Movers(1)).save(payload)


def load(parts: Sequence[Part], payload: memoryview) -> None:
    """Copy `payload` into the tensors, in place."""
    Packing(parts, Movers(1)).load(payload)


class Packing:
    """The list for these parts, made once and used for many journeys. One thread's. Raises SnapshotMismatch for a tensor without memory."""

    def __init__(self, parts: Sequence[Part], movers: Movers) -> None:
        """`parts` keep their dtypes and shapes; an address may change, and memory formats too."""
        self.parts = parts
        self.num_bytes = payload_bytes(parts)
        self._movers = movers
        self._queue = _Queue()
        self._small: list[torch.Tensor] = []
        self._large: list[torch.Tensor] = []
        self._other: list[tuple[torch.Tensor, int]] = []  # not plain bytes of this host, and their offsets
        self._small_at: list[tuple[int, int]] = []  # offset in the payload, bytes
        self._large_at: list[tuple[int, int]] = []
        self._gaps: list[tuple[int, int]] = []
        self._sort()

    def save(self, payload: memoryview) -> None:
        """Copy every tensor into `payload` ((num_bytes,) uint8, writable)."""
        self._carry(payload, out=True)

    def load(self, payload: memoryview) -> None:
        """Copy `payload` into the tensors, in place."""
        self._carry(payload, out=False)
        with torch.no_grad():
            torch.autograd.graph.increment_version([*self._small, *self._large])  # as copy_ would have done

    def _sort(self) -> None:
        """Which tensors are plain bytes, which of them are large."""
        for found in (self._small, self._large, self._small_at, self._large_at, self._other, self._gaps):
            found.clear()
        offset = 0
        for part in self.parts:
            count = part.num_bytes
            if count and not _plain(part.local):
                self._other.append((part.local, offset))
            elif count > SMALL:
                self._large.append(part.local)
                self._large_at.append((offset, count))
            elif count:
                self._small.append(part.local)
                self._small_at.append((offset, count))
            if gap := padded(count) - count:
                self._gaps.append((offset + count, gap))
            offset += padded(count)

    def _carry(self, payload: memoryview, *, out: bool) -> None:
        assert len(payload) >= self.num_bytes, f"payload: {self.num_bytes} bytes expected, {len(payload)} found"
        if not self.num_bytes:
            return
        if not all(map(torch.Tensor.is_contiguous, self._small)) or not all(map(torch.Tensor.is_contiguous, self._large)):
            self._sort()
        flat = _flat(payload)
        base = flat.data_ptr()
        small, large = _moves(self._small, self._small_at, base, out=out), _moves(self._large, self._large_at, base, out=out)
        if out:
            small += [(base + offset, _ZEROS.data_ptr(), gap) for offset, gap in self._gaps]
        try:
            for tensor, offset in self._other:
                packed = flat[offset : offset + tensor.numel() * tensor.element_size()].view(tensor.dtype).view(tensor.shape)
                self._queue.copy(*((packed, tensor) if out else (tensor, packed)))
            self._movers.move(small, [piece for move in large for piece in cut(move)])
        finally:
            self._queue.finish()


class _Queue:
    """Copies that torch makes; those from and to a CUDA device on a side stream, which starts when what was computed is there."""

    def __init__(self) -> None:
        """No stream is made before there is need of one."""
        self._streams: dict[torch.device, torch.cuda.Stream] = {}
        self._busy: set[torch.device] = set()

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Done at once between host tensors; else when `finish` returns."""
        device = source.device if source.is_cuda else target.device
        with torch.no_grad():
            if device.type != "cuda":
                target.copy_(source)
                return
            stream = self._streams.setdefault(device, torch.cuda.Stream(device))
            if device not in self._busy:
                stream.wait_stream(torch.cuda.current_stream(device))
                self._busy.add(device)
            with torch.cuda.stream(stream):
                target.copy_(source, non_blocking=True)

    def finish(self) -> None:
        """Wait for what is under way."""
        while self._busy:
            self._streams[self._busy.pop()].synchronize()


class Registered:
    """Host memory that the CUDA driver may copy from and to by itself: page-locked as long as this is open.

    Where the driver refuses (a limit on locked memory), copies go through its own buffers: slower, and as right.
    """

    def __init__(self, memory: memoryview) -> None:
        """`memory` begins at a page and stays mapped until `close`."""
        self._address = _flat(memory).data_ptr()
        self.held = int(torch.cuda.cudart().cudaHostRegister(self._address, len(memory), _PORTABLE)) == 0
        if not self.held:
            with contextlib.suppress(RuntimeError):  # the refusal stays the driver's last error, which the next kernel would raise
                torch.ones(1, device="cuda")

    def close(self) -> None:
        """Before the memory is unmapped. May be called again."""
        if self.held:
            torch.cuda.cudart().cudaHostUnregister(self._address)
            self.held = False


def _plain(tensor: torch.Tensor) -> bool:
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
