"""Matmul: whether every device multiplies right, the same each time, and as fast as its neighbours.

Think of weighing the same known weight on every scale of the shop, twice.

Contract: exercises/matmul.py says what "right" is: to the last bit. Speed is told, and beside the median of the node's devices it is a
failure below half (dlrover's rule for a straggler) and a warning below nine tenths. GPUs work at the same time, as in training: one that is
slow only when all draw power is slow. A GPU that does not answer is named; the others are still judged.
"""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, Final

from resilient_agents.check import Answer, Exercise, ExerciseFailed, Reading, grade

if TYPE_CHECKING:
    from collections.abc import Sequence

    from resilient.core.messages import Class
    from resilient_agents.check import Patient

SLOW: Final = 0.9
STRAGGLING: Final = 0.5
FORMATS: Final = ("float32", "bfloat16", "float16")
_CPU: Final = {"float32": 512, "bfloat16": 512, "float16": 192}  # many processors have no half precision: torch is slow there
_GPU: Final = 4096  # nine tenths of the speed of larger ones, and their integers still have room on the host
_DEVICES_S: Final = 20.0


class Matmul:
    """All devices, all formats."""

    timeout_s = 60.0
    alone = True
    torch = True
    exercise = "resilient_agents.exercises.matmul:run"  # who has another way to multiply names his own

    def __init__(self, patient: Patient) -> None:
        """The same for all."""
        self._patient = patient

    def run(self) -> list[Reading]:
        """The processor first, then the GPUs, one format after the other."""
        names = gpus(self._patient)
        limit_s = (5.0 if self._patient.quick else 10.0) if not names else 15.0
        readings = []
        for format_ in FORMATS:
            if self._patient.cpu:
                (answer,) = self._patient.exercise_all([self._job("cpu", format_, _CPU[format_])], limit_s)
                readings += judged(format_, ["cpu"], [answer])
            if names:
                jobs = [self._job(f"cuda:{number}", format_, _GPU) for number in names]
                readings += judged(format_, list(names.values()), self._patient.exercise_all(jobs, limit_s))
        return readings

    def _job(self, device: str, format_: str, size: int) -> Exercise:
        quick = self._patient.quick
        return Exercise(
            self.exercise,
            {"device": device, "dtype": format_, "size": size, "repeats": 3 if quick else 20, "seconds": 0.05 if quick else 0.5},
        )


def gpus(patient: Patient) -> dict[int, str]:
    """The CUDA devices that are to be looked at: number -> as in Finding. Raises ExerciseFailed if one that is named is not there."""
    if patient.devices == ():
        return {}
    found = patient.exercise("resilient_agents.exercises.devices:run", _DEVICES_S)
    there = {it["number"]: it["device"] for it in found["devices"]}
    if patient.devices is None:
        return there
    for number in patient.devices:
        if number not in there:
            raise ExerciseFailed(f"gpu:{number} expected, {len(there)} CUDA devices found: {found['error'] or 'it is lost'}")
    return {number: there[number] for number in patient.devices}


def judged(format_: str, devices: Sequence[str], answers: Sequence[Answer]) -> list[Reading]:
    """Two readings for each device: right, and fast."""
    fast = [answer.value["tflops"] for answer in answers if not answer.failure and not answer.value["wrong"]]
    median = statistics.median(fast) if fast else 0.0
    readings = []
    for device, answer in zip(devices, answers, strict=True):
        layer = "cpu" if device == "cpu" else "gpu"
        readings.append(_result(format_, device, layer, answer))
        if readings[-1].state == "pass":
            readings.append(_speed(format_, device, layer, answer.value["tflops"], median))
    return readings


def _result(format_: str, device: str, layer: str, answer: Answer) -> Reading:
    what, expected = f"{format_} result", "exact, the same each time"
    if answer.failure:
        class_: Class = "cordon" if layer == "cpu" else "gpu-reset"
        text, value = answer.failure, "none"
    elif answer.value["wrong"]:
        class_, text, value = "cordon", f"silent corruption: {answer.value['wrong']}", "WRONG"
    else:
        return Reading(what=what, device=device, layer=layer, value=f"exact, {answer.value['products']} times", expected=expected)
    return Reading(what=what, device=device, layer=layer, state="fail", value=value, expected=expected, class_=class_, text=text)


def _speed(format_: str, device: str, layer: str, tflops: float, median: float) -> Reading:
    state = grade(fail=tflops < STRAGGLING * median, warn=tflops < SLOW * median)
    text = "" if state == "pass" else "slower than its neighbours: heat, power, clocks?"
    return Reading(
        what=f"{format_} speed",
        device=device,
        layer=layer,
        state=state,
        number=tflops,
        unit="TFLOP/s",
        better="more",
        expected="" if device == "cpu" else f">= {SLOW * median:.3g}",
        class_="replace",
        text=text,
    )
