"""Capture on a GPU: its tensors into page-locked host memory and back, beside what the program computes.

Think of a dumb waiter between kitchen and dining room: large dishes go down one by one; cups are put on a tray first, for the journey
takes as long with one cup as with forty. The cooks go on; only who wants to use a pot that has still to be emptied waits at the shaft.

Contract: one `Lane` for the tensors of one device. `save` launches and returns: its copies begin when everything that was launched before
on the current stream is done; what the program launches there afterwards waits for the copies of `first`, and for no others. What `save`
returns is called on any thread and returns when every byte is in host memory. `load` is complete after `drain`. Sources are held by the
lane, so the caching allocator gives their memory to nobody meanwhile; the tray belongs to the lane's stream alone. (Hence no record_stream:
it would cost 1 us per tensor. A storage that is emptied by resize_(0) is found afterwards, see capture.Watched.)
Numbers: about 6 us of the training thread per copy launched. Tensors up to PACK that lie side by side in the payload travel together, up to
TRAY bytes, by one gathering kernel for a hundred of them: at most 2 x 128 copies and the gathering per GB, however many tensors. Memory
on the device: the tray, 64 MiB, once per process, nothing where there is none to be had (then all go one by one).
Rejected: a private copy on the device first (memory of the state's size where it is scarcest); a callback on the stream (cudaLaunchHostFunc
may call nothing of CUDA, and a Python function there waits for the lock of the interpreter with the stream standing still).

Where the driver refuses to lock the pages, copies go through its own buffers: as right, and `save` returns when they are done.
Written against the documentation of torch 2.11 to 2.13; tests/gpu shows it at work where there is a GPU.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import torch

from resilient.checkpoint.layout import padded
from resilient.errors import SnapshotMismatch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

Piece = tuple[torch.Tensor, int]  # a tensor on the device, its offset in the payload

PACK: Final = 8 << 20  # larger tensors are worth a copy of their own
TRAY: Final = 64 << 20
_PORTABLE: Final = 1  # cudaHostRegisterPortable: pinned for every context of the process


class Lane:
    """The tensors of one device. The training thread's, but for what `save` returns."""

    def __init__(self, device: torch.device, first: Sequence[Piece], rest: Sequence[Piece]) -> None:
        """`first`: those that may change before the next gate."""
        self._device = device
        self._pieces = [*first, *rest]
        self._addresses = [tensor.data_ptr() for tensor, _ in self._pieces]
        self._first, self._rest = lots(first), lots(rest)

    def as_sorted(self) -> bool:
        """Whether all tensors lie where they lay."""
        return self._addresses == [tensor.data_ptr() for tensor, _ in self._pieces]

    def save(self, flat: torch.Tensor) -> Callable[[], None]:
        """Launch the copies into `flat`, the payload ((n,) uint8, host). What is returned waits for their end."""
        self._check_memory()
        stream, current = _stream(self._device), torch.cuda.current_stream(self._device)
        stream.wait_stream(current)
        done = torch.cuda.Event(blocking=True)  # who waits for it sleeps
        with torch.no_grad(), torch.cuda.stream(stream):
            for lot in self._first:
                lot.launch(flat)
            if self._first:
                current.wait_event(stream.record_event())
            for lot in self._rest:
                lot.launch(flat)
            done.record(stream)

        def end() -> None:
            with torch.cuda.device(self._device):  # another thread's first call would make a context on device 0
                done.synchronize()

        return end

    def load(self, flat: torch.Tensor) -> None:
        """Launch the copies from `flat`."""
        self._check_memory()
        stream = _stream(self._device)
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.no_grad(), torch.cuda.stream(stream):
            for tensor, offset in self._pieces:
                tensor.copy_(_place(flat, tensor, offset), non_blocking=True)

    def drain(self) -> None:
        """Wait for what was launched."""
        _stream(self._device).synchronize()

    def _check_memory(self) -> None:
        if 0 in self._addresses:
            lost = self._pieces[self._addresses.index(0)][0]
            raise SnapshotMismatch(
                f"shared tensor {list(lost.shape)}: its memory was given back (storage().resize_(0)), it is still in use"
            )


@dataclass
class Lot:
    """Tensors whose bytes lie side by side in the payload; more than one travel on the tray."""

    offset: int
    num_bytes: int  # up to the last tensor's end
    tensors: list[torch.Tensor]
    offsets: list[int]  # in the lot
    raws: list[torch.Tensor] = field(default_factory=list)  # the same memory as bytes; none where the strides are others
    _places: list[torch.Tensor] = field(default_factory=list)  # on the tray

    def launch(self, flat: torch.Tensor) -> None:
        """On the current stream."""
        tray = _tray(self.tensors[0].device) if len(self.tensors) > 1 else None
        if tray is None:
            for tensor, offset in zip(self.tensors, self.offsets, strict=True):
                _place(flat, tensor, self.offset + offset).copy_(tensor, non_blocking=True)
            return
        if not self._places:
            self._places = [tray[offset : offset + raw.numel()] for offset, raw in zip(self.offsets, self.raws, strict=True)]
        tray[: self.num_bytes].zero_()  # what another lot has left between these tensors is not theirs
        torch._foreach_copy_(self._places, self.raws)  # public in all but name: FSDP2 copies with it
        flat[self.offset : self.offset + self.num_bytes].copy_(tray[: self.num_bytes], non_blocking=True)


def lots(pieces: Sequence[Piece], pack: int = PACK, tray: int = TRAY) -> list[Lot]:
    """The pieces, in the order of their offsets, as few copies."""
    found: list[Lot] = []
    for tensor, offset in pieces:
        count = tensor.numel() * tensor.element_size()
        last = found[-1] if found else None
        tensor = tensor.detach()  # noqa: PLW2901  holds the memory even if the program puts another one under its tensor
        if count > pack or not _plain(tensor):
            found.append(Lot(offset, count, [tensor], [0]))
            continue
        raw = tensor.reshape(-1).view(torch.uint8)
        if last is None or not last.raws or offset != last.offset + padded(last.num_bytes) or offset + count - last.offset > tray:
            found.append(Lot(offset, count, [tensor], [0], [raw]))
        else:
            last.num_bytes = offset + count - last.offset
            last.tensors.append(tensor)
            last.offsets.append(offset - last.offset)
            last.raws.append(raw)
    return found


class Registered:
    """Host memory that the CUDA driver may copy from and to by itself: page-locked as long as this is open.

    Where the driver refuses (a limit on locked memory), copies go through its own buffers: slower, and as right.
    """

    def __init__(self, memory: memoryview) -> None:
        """`memory` begins at a page and stays mapped until `close`."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            self._address = torch.frombuffer(memory, dtype=torch.uint8).data_ptr()
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
    known = type(tensor) in (torch.Tensor, torch.nn.Parameter) and tensor.layout == torch.strided
    return known and tensor.is_contiguous() and not tensor.is_conj() and not tensor.is_neg()


def _place(flat: torch.Tensor, tensor: torch.Tensor, offset: int) -> torch.Tensor:
    return flat[offset : offset + tensor.numel() * tensor.element_size()].view(tensor.dtype).view(tensor.shape)


@functools.cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    """One per device: what is launched on it is done in order, so one tray is enough."""
    return torch.cuda.Stream(device)


@functools.cache
def _tray(device: torch.device) -> torch.Tensor | None:
    """Memory for small things on their way; None if there is none. Made on the stream that alone uses it."""
    with torch.cuda.stream(_stream(device)), contextlib.suppress(torch.OutOfMemoryError):
        return torch.zeros(TRAY, dtype=torch.uint8, device=device)
    return None
