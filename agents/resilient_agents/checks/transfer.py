"""Transfer: the ways between host and GPUs, and from GPU to GPU: whether all arrives, and how fast.

Think of walking every corridor of the building once with a full tray.

Contract: absent without CUDA. Host to GPU and back from pinned memory, one GPU after the other (they share switches). GPU to GPU: the next
one in the ring when seconds count, else every pair. What arrives otherwise than it was sent is a failure; so is a way with less than half
of the median of its kind. Azure expects 48 GB/s over PCIe gen 5 and 335 between two GPUs of an H100 node: --compare with a node you trust.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from resilient_agents.check import Answer, Exercise, Reading
from resilient_agents.checks.bandwidth import judged
from resilient_agents.checks.matmul import gpus
from resilient_agents.probe import Absent

if TYPE_CHECKING:
    from resilient_agents.check import Patient

_CALL: Final = "resilient_agents.exercises.bandwidth:transfer"
_NUM_BYTES: Final = 1 << 28
_LIMIT_S: Final = 15.0  # each; CUDA's start is most of it


class Transfer:
    """Every way that tensors take inside of a node."""

    timeout_s = 50.0
    alone = True
    torch = True

    def __init__(self, patient: Patient) -> None:
        """Raises Absent without a GPU's driver."""
        self._patient = patient
        try:
            with open(patient.path("/proc/driver/nvidia/version"), "rb"):
                pass
        except OSError:
            raise Absent("no NVIDIA kernel module (/proc/driver/nvidia)") from None

    def run(self) -> list[Reading]:
        """One way after the other; pairs that have no GPU in common at the same time."""
        names = gpus(self._patient)
        if not names:
            raise Absent("torch sees no CUDA device")
        up = [self._go("cpu", f"cuda:{number}") for number in names]
        down = [self._go(f"cuda:{number}", "cpu") for number in names]
        ring = list(zip(names, [*list(names)[1:], *list(names)[:1]], strict=True)) if len(names) > 1 else []
        pairs = ring if self._patient.quick else [(a, b) for a in names for b in names if a != b]
        across = [self._go(f"cuda:{a}", f"cuda:{b}") for a, b in pairs]
        return [
            *judged("pcie", names, up, "host to device"),
            *judged("pcie", names, down, "device to host"),
            *judged("nvlink", {pair: f"gpu:{pair[0]},gpu:{pair[1]}" for pair in pairs}, across, "device to device"),
        ]

    def _go(self, source: str, target: str) -> Answer:
        (answer,) = self._patient.exercise_all(
            [Exercise(_CALL, {"source": source, "target": target, "num_bytes": _NUM_BYTES, "repeats": 5})], _LIMIT_S
        )
        return answer
