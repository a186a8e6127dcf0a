"""Matmul: whether every device multiplies right, the same each time, and as fast as its neighbours.

Think of weighing the same known weight on every scale of the shop, twice.

Contract: exercises/matmul.py says what "right" is: to the last bit. Speed is told, and beside the median of the node's devices it is a
failure below half (dlrover's rule for a straggler) and a warning below nine tenths. GPUs work at the same time, as in training: one that is
slow only when all draw power is slow. A GPU that does not answer is named; the others are still judged.
"""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, Any, Final

from resilient_agents.check import Answer, Exercise, ExerciseFailed, Reading, grade

if TYPE_CHECKING:
    from collections.abc import Sequence

    from resilient_agents.check import Patient

SLOW: Final = 0.9
STRAGGLING: Final = 0.5
_CPU: Final = {"float32": 512, "bfloat16": 512, "float16": 192}  # many processors have no half precision: torch is slow there
_GPU: Final = dict.fromkeys(_CPU, 4096)  # nine tenths of the speed of larger ones, and their integers still have room on the host
_LIMIT_S: Final = 25.0
_DEVICES_S: Final = 20.0


class Matmul:
    """All devices, all formats."""

    timeout_s = 75.0
    alone = True
    torch = True
    exercise = "resilient_agents.exercises.matmul:run"  # who has another way to multiply names his own

    def __init__(self, patient: Patient) -> None:
        """The same for all."""
        self._patient = patient

    def run(self) -> list[Reading]:
        """The processor first, then all GPUs at once."""
        names = gpus(self._patient)
        readings = []
        if self._patient.cpu:
            readings += judged(["cpu"], self._patient.exercise_all([self._job("cpu", _CPU)], _LIMIT_S))
        jobs = [self._job(f"cuda:{number}", _GPU) for number in names]
        return [*readings, *judged(list(names.values()), self._patient.exercise_all(jobs, _LIMIT_S))]

    def _job(self, device: str, sizes: dict[str, int]) -> Exercise:
        quick = self._patient.quick
        return Exercise(self.exercise, {"device": device, "sizes": sizes, "repeats": 3 if quick else 20, "seconds": 0.05 if quick else 0.5})


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


def judged(devices: Sequence[str], answers: Sequence[Answer]) -> list[Reading]:
    """For each device that it answered, and for each format two readings: right, and fast."""
    silent = [
        Reading(
            what="result",
            device=device,
            layer=_layer(device),
            state="fail",
            value="none",
            expected="a product",
            class_="cordon" if device == "cpu" else "gpu-reset",
            text=answer.failure,
        )
        for device, answer in zip(devices, answers, strict=True)
        if answer.failure
    ]
    told = {device: answer.value for device, answer in zip(devices, answers, strict=True) if not answer.failure}
    formats = list(next(iter(told.values()), {}))
    return silent + [it for format_ in formats for it in _judged(format_, {device: value[format_] for device, value in told.items()})]


def _judged(format_: str, told: dict[str, dict[str, Any]]) -> list[Reading]:
    median = statistics.median([value["tflops"] for value in told.values() if not value["wrong"]] or [0.0])
    readings = []
    for device, value in told.items():
        readings.append(_result(format_, device, value))
        if readings[-1].state == "pass":
            readings.append(_speed(format_, device, value["tflops"], median))
    return readings


def _result(format_: str, device: str, value: dict[str, Any]) -> Reading:
    wrong = value["wrong"]
    return Reading(
        what=f"{format_} result",
        device=device,
        layer=_layer(device),
        state=grade(fail=bool(wrong)),
        value="WRONG" if wrong else f"exact, {value['products']} times",
        expected="exact, the same each time",
        text=f"silent corruption: {wrong}" if wrong else "",
    )


def _layer(device: str) -> str:
    return "cpu" if device == "cpu" else "gpu"


def _speed(format_: str, device: str, tflops: float, median: float) -> Reading:
    state = grade(fail=tflops < STRAGGLING * median, warn=tflops < SLOW * median)
    text = "" if state == "pass" else "slower than its neighbours: heat, power, clocks?"
    return Reading(
        what=f"{format_} speed",
        device=device,
        layer=_layer(device),
        state=state,
        number=tflops,
        unit="TFLOP/s",
        better="more",
        expected="" if device == "cpu" else f">= {SLOW * median:.3g}",
        class_="replace",
        text=text,
    )
