"""Bandwidth: how fast the memory of the host and of each GPU is copied, and whether copies are equal.

Think of moving house inside one house: nothing may break on the stairs, and every floor should take about as long.

Contract: told in payload; a copy that differs is a failure, a GPU far slower than its neighbours is one too (as in matmul.py).
"""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, Any, Final

from resilient_agents.check import Answer, Exercise, Reading, grade
from resilient_agents.checks.matmul import SLOW, STRAGGLING, gpus

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from resilient.core.messages import Class
    from resilient_agents.check import Patient

_CALL: Final = "resilient_agents.exercises.bandwidth:run"


class Bandwidth:
    """Memory of the host and of each GPU."""

    timeout_s = 40.0
    alone = True
    torch = True

    def __init__(self, patient: Patient) -> None:
        """The same for all."""
        self._patient = patient

    def run(self) -> list[Reading]:
        """The host first, then all GPUs at once: each has a memory of its own."""
        quick = self._patient.quick
        names = gpus(self._patient)
        readings = []
        if self._patient.cpu:
            job = Exercise(_CALL, {"device": "cpu", "num_bytes": (32 if quick else 256) << 20, "repeats": 3 if quick else 8})
            readings += judged("host-mem", {"cpu": "cpu"}, self._patient.exercise_all([job], 15.0))
        jobs = [Exercise(_CALL, {"device": f"cuda:{number}", "num_bytes": 1 << 28, "repeats": 10}) for number in names]
        return [*readings, *judged("gpu", names, self._patient.exercise_all(jobs, 20.0))]


def judged(layer: str, devices: Mapping[Any, str], answers: Sequence[Answer], what: str = "") -> list[Reading]:
    """One reading for each copy. devices: in the order of the answers."""
    fast = [answer.value["gb_s"] for answer in answers if not answer.failure]
    median = statistics.median(fast) if fast else 0.0
    return [_judged(layer, device, answer, median, what) for device, answer in zip(devices.values(), answers, strict=True)]


def _judged(layer: str, device: str, answer: Answer, median: float, what: str) -> Reading:
    if answer.failure or answer.value["wrong"]:
        class_: Class = "gpu-reset" if answer.failure and device != "cpu" else "cordon"
        text = answer.failure or f"silent corruption: {answer.value['wrong']}"
        value = "none" if answer.failure else "WRONG"
        return Reading(what=what, device=device, layer=layer, state="fail", value=value, expected="an equal copy", class_=class_, text=text)
    speed = answer.value["gb_s"]
    state = grade(fail=speed < STRAGGLING * median, warn=speed < SLOW * median)
    return Reading(
        what=what,
        device=device,
        layer=layer,
        state=state,
        number=speed,
        unit="GB/s",
        better="more",
        expected="an equal copy" if device == "cpu" else f"equal, >= {SLOW * median:.3g}",
        class_="replace",
    )
