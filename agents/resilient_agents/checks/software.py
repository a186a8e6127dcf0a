"""Software: which versions a run would meet here. Told, so that two nodes can be laid beside each other.

Contract: torch must load; that is the one thing here that can fail. Everything else is only told.
"""

from __future__ import annotations

import os
import platform
from typing import TYPE_CHECKING, Final

import resilient
from resilient_agents.check import Reading

if TYPE_CHECKING:
    from resilient_agents.check import Patient

LIMIT_S: Final = 10.0


class Software:
    """Versions."""

    torch = True

    def __init__(self, patient: Patient) -> None:
        """The same for all."""
        self._patient = patient

    def run(self) -> list[Reading]:
        """Ask ourselves, then torch."""
        told = {"python": platform.python_version(), "kernel": os.uname().release, "resilient-run": resilient.__version__}
        told |= self._patient.exercise("resilient_agents.exercises.versions:run", LIMIT_S)
        return [Reading(what=what, layer="os", value=value) for what, value in told.items() if value]
