"""All-reduce: a real process group among processes of this node: right to the last bit, and how fast.

Think of a choir of one's own family before the concert with all the others.

Contract: gloo over the loopback interface with two ranks; nccl with one rank for each GPU where there are several. Values are integers, so
the sum is known exactly. Azure expects 460 GB/s of nccl on an H100 node: --compare with a node you trust.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from resilient_agents.check import Exercise, Reading
from resilient_agents.checks.matmul import gpus

if TYPE_CHECKING:
    from resilient_agents.check import Patient

_CALL: Final = "resilient_agents.exercises.allreduce:run"
_LIMIT_S: Final = 40.0  # NCCL of eight GPUs takes ten seconds or more to start


class AllReduce:
    """gloo, and nccl where there are GPUs for it."""

    timeout_s = 100.0
    alone = True
    torch = True

    def __init__(self, patient: Patient) -> None:
        """The same for all."""
        self._patient = patient

    def run(self) -> list[Reading]:
        """One backend after the other."""
        readings = []
        if self._patient.cpu:
            readings.append(self._reading("gloo", [], 2, (4 if self._patient.quick else 32) << 20, "net"))
        devices = list(gpus(self._patient))
        if len(devices) > 1:
            readings.append(self._reading("nccl", devices, len(devices), 1 << 28, "nccl"))
        return readings

    def _reading(self, backend: str, devices: list[int], world: int, num_bytes: int, layer: str) -> Reading:
        arguments = {
            "backend": backend,
            "devices": devices,
            "world": world,
            "num_bytes": num_bytes,
            "repeats": 3,
            "limit_s": _LIMIT_S - 2.0,
        }
        (answer,) = self._patient.exercise_all([Exercise(_CALL, arguments)], _LIMIT_S)
        what = f"{backend}, {world} ranks"
        if answer.failure or answer.value["wrong"]:
            text = answer.failure or answer.value["wrong"]
            return Reading(
                what=what, layer=layer, state="fail", value="none" if answer.failure else "WRONG", expected="the exact sum", text=text
            )
        return Reading(what=what, layer=layer, number=answer.value["gb_s"], unit="GB/s", better="more", expected="the exact sum")
