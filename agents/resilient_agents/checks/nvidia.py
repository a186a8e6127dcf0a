"""Nvidia: whether driver, device files and torch see the same GPUs, and whether these are alike.

Think of a roll-call from three lists that should be one.

Contract: absent without the driver. The kernel module's list (/proc/driver/nvidia) against the device files, and against what CUDA
gives to torch, as far as CUDA_VISIBLE_DEVICES and a container let it. GPUs of one node are expected to be of one kind and memory size.
What their counters say (ECC, NVLink, clocks) is the probes' to tell.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from typing import TYPE_CHECKING, Any, Final

from resilient_agents.check import Reading, grade
from resilient_agents.probe import Absent

if TYPE_CHECKING:
    from collections.abc import Sequence

    from resilient_agents.check import Patient

LIMIT_S: Final = 20.0  # CUDA's start with eight devices takes several
_VERSION: Final = re.compile(r"Kernel Module(?: for \S+)?\s+(\d+\.\d+(?:\.\d+)?)")


class Nvidia:
    """The GPUs of this node, counted three times."""

    timeout_s = 30.0
    torch = True

    def __init__(self, patient: Patient) -> None:
        """Raises Absent without the kernel module."""
        self._patient = patient
        try:
            with open(patient.path("/proc/driver/nvidia/version"), encoding="utf-8", errors="replace") as file:
                self._version = version(file.read())
        except OSError:
            raise Absent("no NVIDIA kernel module (/proc/driver/nvidia)") from None

    def run(self) -> list[Reading]:
        """Count."""
        listed = len(self._names("/proc/driver/nvidia/gpus"))
        files = len([name for name in self._names("/dev") if re.fullmatch(r"nvidia\d+", name)])
        capabilities = "/proc/driver/nvidia/capabilities"
        partitioned = any("mig" in self._names(f"{capabilities}/{gpu}") for gpu in self._names(capabilities))
        found = self._patient.exercise("resilient_agents.exercises.devices:run", LIMIT_S)
        wanted = expected(listed, files, os.environ.get("CUDA_VISIBLE_DEVICES"), partitioned=partitioned)
        return [
            Reading(what="driver", layer="driver", value=self._version),
            Reading(what="device files", layer="driver", value=f"{files}, {listed} listed by the driver"),
            seen(len(found["devices"]), wanted, found["error"]),
            *alike(found["devices"]),
        ]

    def _names(self, path: str) -> list[str]:
        try:
            return os.listdir(self._patient.path(path))
        except OSError:
            return []  # a container may be shown less


def version(text: str) -> str:
    """Of the kernel module, as /proc tells it."""
    match = _VERSION.search(text)
    return match[1] if match else text.strip().partition("\n")[0][:80]


def expected(listed: int, files: int, visible: str | None, *, partitioned: bool) -> int:
    """How many torch should see. A container is given some of the device files; MIG's parts are seen one at a time."""
    there = min(listed or files, files or listed)
    if visible is not None:
        names = [name.strip() for name in visible.split(",")]
        there = min(there, next((at for at, name in enumerate(names) if name in {"", "-1"}), len(names)))  # CUDA stops reading there
    return min(there, 1) if partitioned else there


def seen(count: int, wanted: int, error: str) -> Reading:
    """By torch."""
    few = count < wanted
    text = error or "a GPU is lost (Xid 79?), or the libraries are of another version than the kernel module: what does nvidia-smi say?"
    return Reading(
        what="seen by torch",
        layer="driver",
        state=grade(fail=few),
        number=float(count),
        unit="GPUs",
        better="more",
        expected=f">= {wanted}",
        class_="gpu-reset",
        text=text if few else "",
    )


def alike(devices: Sequence[dict[str, Any]]) -> list[Reading]:
    """Whoever differs from most."""
    kinds = Counter((device["name"], device["memory"]) for device in devices)
    if not kinds:
        return []
    usual = kinds.most_common(1)[0][0]
    return [
        Reading(
            what="kind",
            layer="gpu",
            device=device["device"],
            state="pass" if (device["name"], device["memory"]) == usual else "warn",
            value=f"{device['name']}, {device['memory'] / 1e9:.0f} GB",
            expected=f"{usual[0]}, {usual[1] / 1e9:.0f} GB",
        )
        for device in devices
    ]
