"""EDAC: what the memory controllers count.

Contract: reads <root>/sys/devices/system/edac/mc. The first reading is the zero: an uncorrected error of last month is not news, the next
one is, and stays the matter until the node starts again. A storm of corrected errors is one, too (limits.py); a few are counted.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from resilient.core.messages import Finding
from resilient_agents.probe import Absent
from resilient_agents.probes import limits, reading

if TYPE_CHECKING:
    from resilient_agents.probe import Surroundings

TREE: Final = "/sys/devices/system/edac/mc"


class Edac:
    """All memory controllers of a node."""

    name = "edac"
    period_s = 30.0
    lasting = True

    def __init__(self, surroundings: Surroundings) -> None:
        """Raises Absent without a controller."""
        self._tree = surroundings.path(TREE)
        self._first = self._read()
        if not self._first:
            raise Absent(f"{self._tree}: no memory controller")

    def check(self, now: float) -> list[Finding]:
        """What they have counted since the start."""
        del now
        findings = []
        for (name, code), value in self._read().items():
            first = self._first.setdefault((name, code), value)
            if value < first:
                first = self._first[name, code] = value
            grown = value - first
            if grown and (code == "UE" or grown > limits.EDAC_CE.value):
                text = f"memory controller {name}: {grown} {'un' if code == 'UE' else ''}corrected error(s) since the probe's start"
                findings.append(Finding(seq=0, kind="edac", layer="host-mem", code=code, device=f"dev:{name}", class_="cordon", text=text))
        return findings

    def _read(self) -> dict[tuple[str, str], int]:
        found = {}
        for name in reading.names(self._tree):
            for code, file in (("UE", "ue_count"), ("CE", "ce_count")):
                value = reading.number(f"{self._tree}/{name}/{file}")
                if name.startswith("mc") and value is not None:
                    found[name, code] = value
        return found
