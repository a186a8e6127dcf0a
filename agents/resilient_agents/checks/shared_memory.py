"""Shared memory: whether the segments of a run would find room, for real.

Think of trying the bed in the shop: the label says two metres, and one lies down all the same.

Contract: in the directory of the segments a file is allocated (every page, `posix_fallocate`), written, read back and compared; what it is
made of counts against the file system, the machine and every cgroup above us (checkpoint/room.py), and the least of these is told.
Gone afterwards. Docker gives 64 MiB where nothing else is said: a warning, for NCCL and data loaders need it too.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from typing import TYPE_CHECKING, Final

from resilient.checkpoint import room
from resilient_agents.check import Reading, State, grade

if TYPE_CHECKING:
    from resilient_agents.check import Patient

LEFT_MIN: Final = 1 << 30  # NCCL, data loaders' queues and pages; what the state needs is the run's to say
_SMALL, _LARGE = 32 << 20, 256 << 20
_PIECE: Final = 4 << 20


class SharedMemory:
    """The memory directory of runs."""

    alone = True

    def __init__(self, patient: Patient) -> None:
        """The same for all."""
        self._directory = patient.memory_dir
        self._wanted = _SMALL if patient.quick else _LARGE

    def run(self) -> list[Reading]:
        """Ask for the size, then for the memory."""
        try:
            left = room.left(self._directory)
        except OSError as error:
            return [_reading("size", "fail", error.strerror or "none", "a directory", f"{self._directory}: see --memory-dir")]
        enough = left.num_bytes >= LEFT_MIN
        size = _reading("size", grade(warn=not enough), f"{left.num_bytes / 1e9:.2f} GB", f">= {LEFT_MIN / 1e9:.2f} GB")
        if not enough:
            size = _reading("size", "warn", size.value, size.expected, f"{left.where}; {left.cure}")
        return [size, self._allocated(min(self._wanted, left.num_bytes // 2 // _PIECE * _PIECE))]

    def _allocated(self, num_bytes: int) -> Reading:
        if not num_bytes:
            return _reading("allocation", "fail", "no room", f">= {_PIECE >> 20} MiB", self._directory)
        try:
            with tempfile.TemporaryFile(dir=self._directory, prefix=".resilient-doctor.") as file:
                os.posix_fallocate(file.fileno(), 0, num_bytes)
                with mmap.mmap(file.fileno(), num_bytes) as memory:
                    pattern = os.urandom(_PIECE)
                    for at in range(0, num_bytes, _PIECE):
                        memory[at : at + _PIECE] = pattern
                    wrong = [at for at in range(0, num_bytes, _PIECE) if memory[at : at + _PIECE] != pattern]
        except OSError as error:
            return _reading("allocation", "fail", error.strerror or str(error), f"{num_bytes >> 20} MiB", self._directory)
        if wrong:
            return _reading(
                "allocation", "fail", "differs", "equal bytes", f"{self._directory}: first in the {_PIECE >> 20} MiB at {wrong[0]}"
            )
        return _reading("allocation", "pass", f"{num_bytes >> 20} MiB, equal bytes", "equal bytes")


def _reading(what: str, state: State, value: str, expected: str, text: str = "") -> Reading:
    return Reading(what=what, layer="host-mem", state=state, value=value, expected=expected, text=text)
