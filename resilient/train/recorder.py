"""The recorder: true values for a standby's set-up.

Think of an understudy who was not at the first rehearsals and reads their minutes: what was agreed there (seeds, names, sizes) must be
what was really agreed, not a guess. So the result of every small collective before the first step is sent to the agent, and a worker
that later runs the script as the same rank gets these results in the same order.

Contract: `record` while a seated rank sets up, `recall` while a standby does, `off` from the first step on. Only what is at most 1 MiB
(pickled objects: 8 MiB) is kept; a larger result (parameters broadcast by DDP) is worthless loopback for a standby, which gets its
state later anyway (`made_up`). Recall waits for what does not exist yet and never invents; an operation other than the recorded one is a
clear error. Where the rank that is shadowed died in its set-up, recall says where its minutes end, and the newcomer goes on as that rank.
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Final, Literal

import torch

from resilient.core.messages import Recall, Recorded, Unrecorded
from resilient.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable

    from resilient.core.messages import WorkerUp
    from resilient.train.group import Operation

SMALL_BYTES: Final = 1 << 20
OBJECTS_BYTES: Final = 8 << 20  # pickled, made up they could not be read
Known = Literal["settled", "last", "nothing", "unreadable"]  # to every rank; to this one, perhaps to others; not to this one; to nobody
_LARGE: Final = "large: "  # prefix of the key of a result that was not kept


class Recorder:
    """One per process. `put` may be called by the waiter thread, `deliver` by the line's thread, the rest by the training thread."""

    def __init__(
        self, rank: int, send: Callable[[WorkerUp], None], mode: Literal["record", "recall", "off"], timeout_s: float = 1800.0
    ) -> None:
        """timeout_s: how long a recall may wait for the rank that is shadowed."""
        self.mode = mode
        self.made_up: set[int] = set()  # operations whose result was too large to be kept: here is loopback's
        self._rank, self._send, self._timeout_s = rank, send, timeout_s
        self._count = 0
        self._arrived: dict[int, Recorded | Unrecorded] = {}
        self._news = threading.Condition()

    def close(self) -> None:
        """The first step begins."""
        self.mode = "off"

    def number(self, op: Operation) -> None:
        """The next operation of the set-up."""
        op.index = self._count
        self._count += 1

    def put(self, op: Operation) -> None:
        """A numbered operation ended well, here and with the others."""
        self.made_up.discard(op.index)
        small = sum(t.numel() * t.element_size() for t in op.outputs) <= (OBJECTS_BYTES if _objects(op) else SMALL_BYTES)
        payload = b"".join(_bytes_of(t) for t in op.outputs) if small else b""
        self._send(Recorded(rank=self._rank, index=op.index, key=op.key if small else _LARGE + op.key, payload=payload))

    def recall(self, op: Operation) -> Known:
        """Fill the outputs of a numbered operation with the recorded result, with loopback where that was too large.

        Raises UsageError if the rank that is shadowed did something else at this place, TimeoutError if it did nothing in time.
        """
        self._send(Recall(rank=self._rank, index=op.index))
        record = self._await(op.index)
        if isinstance(record, Unrecorded):
            return "nothing"
        if record.key.removeprefix(_LARGE) != op.key:
            msg = f"set-up collective {op.index} of rank {self._rank}: {record.key!r} was recorded, this process asks for {op.key!r}"
            raise UsageError(msg)
        if record.key.startswith(_LARGE):
            if _objects(op):
                return "unreadable"
            op.fill()
            self.made_up.add(op.index)
            return "last" if record.last else "settled"
        offset = 0
        for tensor in op.outputs:
            count = tensor.numel() * tensor.element_size()
            if count:
                raw = torch.frombuffer(bytearray(record.payload[offset : offset + count]), dtype=torch.uint8)
                tensor.copy_(raw.view(tensor.dtype).view(tensor.shape))
            offset += count
        return "last" if record.last else "settled"

    def deliver(self, record: Recorded | Unrecorded) -> None:
        """An answer of the agent."""
        with self._news:
            self._arrived[record.index] = record
            self._news.notify_all()

    def _await(self, index: int) -> Recorded | Unrecorded:
        until = time.monotonic() + self._timeout_s
        with self._news:
            while index not in self._arrived:
                if not self._news.wait(max(0.0, until - time.monotonic())):
                    msg = f"set-up collective {index} of rank {self._rank} was not seen in {self._timeout_s:.0f} s"
                    raise TimeoutError(msg)
            return self._arrived.pop(index)


def _objects(op: Operation) -> bool:
    """Whether what is exchanged is bytes: torch pickles objects into such tensors."""
    return all(tensor.dtype == torch.uint8 for tensor in op.outputs)


def _bytes_of(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy().tobytes()
