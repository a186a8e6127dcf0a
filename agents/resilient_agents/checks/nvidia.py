"""Nvidia: whether driver, device files and torch see the same GPUs, and whether these are alike.

Think of a roll-call from three lists that should be one.

Contract: absent without the driver. The kernel module's list (/proc/driver/nvidia) against the device files, and against what CUDA
gives to torch, unless CUDA_VISIBLE_DEVICES hides some on purpose. GPUs of one node are expected to be of one kind and memory size.
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
        listed = len(os.listdir(self._patient.path("/proc/driver/nvidia/gpus")))
        files = [name for name in os.listdir(self._patient.path("/dev")) if re.fullmatch(r"nvidia\d+", name)]
        found = self._patient.exercise("resilient_agents.exercises.devices:run", LIMIT_S)
        hidden = "CUDA_VISIBLE_DEVICES" in os.environ or "NVIDIA_VISIBLE_DEVICES" in os.environ
        return [
            Reading(what="driver", layer="driver", value=self._version),
            *counted(listed, len(files), found, hidden=hidden),
            *alike(found["devices"]),
        ]


def version(text: str) -> str:
    """Of the kernel module, as /proc tells it."""
    match = _VERSION.search(text)
    return match[1] if match else text.strip().partition("\n")[0][:80]


def counted(listed: int, files: int, found: dict[str, Any], *, hidden: bool) -> list[Reading]:
    """listed: by the kernel module. hidden: the user wants torch to see fewer."""
    seen = len(found["devices"])
    text = found["error"] or "lost GPU, or libraries of another version than the kernel module: look for Xid 79, or nvidia-smi's message"
    few = seen < (1 if hidden and listed else listed)
    return [
        Reading(
            what="device files",
            layer="driver",
            state=grade(warn=files < listed),
            value=str(files),
            expected=f"{listed} as listed by the driver",
        ),
        Reading(
            what="seen by torch",
            layer="driver",
            state=grade(fail=few),
            number=float(seen),
            unit="GPUs",
            better="more",
            expected=f"{'some of ' if hidden else ''}{listed} as listed by the driver",
            class_="gpu-reset",
            text=text if few else "",
        ),
    ]


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
