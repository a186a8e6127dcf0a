"""Transfer: the ways between host and GPUs, and from GPU to GPU: whether all arrives, and how fast.

Think of walking every corridor of the building once with a full tray.

Contract: absent without CUDA. Host to GPU and back from pinned memory, one GPU after the other (they share switches). GPU to GPU: the next
one in the ring when seconds count, else every pair. What arrives otherwise than it was sent is a failure; so is a way with less than half
of the median of its kind. Azure expects 48 GB/s over PCIe gen 5 and 335 between two GPUs of an H100 node: --compare with a node you trust.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final

from resilient_agents.check import Answer, Reading
from resilient_agents.checks.bandwidth import judged
from resilient_agents.checks.matmul import gpus
from resilient_agents.probe import Absent

if TYPE_CHECKING:
    from resilient_agents.check import Patient

DRIVERS: Final = ("/proc/driver/nvidia/version", "/dev/kfd")  # NVIDIA's, AMD's
_CALL: Final = "resilient_agents.exercises.bandwidth:tour"
_NUM_BYTES: Final = 1 << 28
_LIMIT_S: Final = 50.0  # CUDA's start with eight devices, and 72 ways


class Transfer:
    """Every way that tensors take inside of a node."""

    timeout_s = 75.0
    alone = True
    torch = True

    def __init__(self, patient: Patient) -> None:
        """Raises Absent without a GPU's driver."""
        self._patient = patient
        if not any(os.path.exists(patient.path(path)) for path in DRIVERS):
            raise Absent(f"no GPU's kernel module ({', '.join(DRIVERS)})")

    def run(self) -> list[Reading]:
        """One way after the other, by one process: it says which one it was on, if it does not come back."""
        names = gpus(self._patient)
        if not names:
            raise Absent("torch sees no CUDA device")
        ring = list(zip(names, [*list(names)[1:], *list(names)[:1]], strict=True)) if len(names) > 1 else []
        pairs = ring if self._patient.quick else [(a, b) for a in names for b in names if a != b]
        up = [("cpu", f"cuda:{number}") for number in names]
        down = [(f"cuda:{number}", "cpu") for number in names]
        across = [(f"cuda:{a}", f"cuda:{b}") for a, b in pairs]
        told = self._patient.exercise(_CALL, _LIMIT_S, ways=[*up, *down, *across], num_bytes=_NUM_BYTES, repeats=5)
        answers = [Answer(value=it) for it in told]
        count = len(names)
        return [
            *judged("pcie", names, answers[:count], "host to device"),
            *judged("pcie", names, answers[count : 2 * count], "device to host"),
            *judged("nvlink", {(a, b): f"gpu:{a},gpu:{b}" for a, b in pairs}, answers[2 * count :], "device to device"),
        ]
