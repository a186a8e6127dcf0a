"""AMD: what the kernel's own driver shows of an AMD GPU, without any tool.

Think of the meters in a cellar: nobody has to be asked, one goes down and reads them.

Contract: reads /sys/class/drm/card*/device of AMD's GPUs; what a file does not say is left out. What a reading means is data (amd.toml).
A card that has left is lost. `counts` and `bad_pages` take any text and never raise.
Numbers: some 25 small files for each GPU; the driver asks the GPU for the error counts.
"""

from __future__ import annotations

import os
import re
from typing import ClassVar, Final

from resilient.core.messages import Finding
from resilient_agents.devices import pci
from resilient_agents.probe import Absent, Surroundings
from resilient_agents.probes.rules import Judge, load

VENDOR: Final = "0x1002"
_CARD = re.compile(r"card\d{1,4}\Z")
_COUNT = re.compile(r"\s*(ue|ce|de)\s*:\s*(\d{1,18})\s*\Z")


def counts(text: str) -> dict[str, float]:
    """`ue: 0`, `ce: 3` of one block's error counts."""
    return {match[1]: float(match[2]) for line in text.splitlines()[:16] if (match := _COUNT.match(line[:64]))}


def bad_pages(text: str) -> dict[str, float]:
    """How many pages of gpu_vram_bad_pages are reserved (R), wait for it (P), or cannot be (F)."""
    flags = [line[-8:].rpartition(":")[2].strip() for line in text.splitlines()]
    return {flag: float(flags.count(flag)) for flag in "RPF"}


class Amd:
    """See the head of this file."""

    name: ClassVar = "amd-gpus"
    period_s: ClassVar = 30.0
    scope: ClassVar = "node"
    lasting: ClassVar = True
    timeout_s: ClassVar = 30.0

    def __init__(self, surroundings: Surroundings) -> None:
        """Raises Absent where there is no such GPU."""
        self.root = surroundings.path("/sys/class/drm")
        self._first = self._cards()
        if not self._first:
            raise Absent(f"no GPU of amdgpu below {self.root}")
        self._lanes: dict[str, float] = {}
        self.judge = Judge(self.name, load("amd.toml"))

    def check(self, now: float) -> list[Finding]:
        """See probe.py."""
        here = self._cards()
        lost = [
            Finding(
                seq=0,
                kind="gpu-lost",
                text="the GPU's driver has let go of it",
                probe=self.name,
                layer="gpu",
                device=device,
                class_="replace",
            )
            for device in sorted(self._first.keys() - here.keys())
        ]
        return lost + self.judge.look(now, {device: self._reading(device, path) for device, path in here.items() if device in self._first})

    def _reading(self, device: str, path: str) -> dict[str, float]:
        found: dict[str, float] = {}
        for name in _names(f"{path}/ras"):
            if name.endswith("_err_count"):
                for kind, count in counts(_read(f"{path}/ras/{name}")).items():
                    found[kind] = found.get(kind, 0) + count
        if pages := _read(f"{path}/ras/gpu_vram_bad_pages"):
            found |= {f"pages_{flag}": count for flag, count in bad_pages(pages).items()}
        if (replays := _read(f"{path}/pcie_replay_count")).isdecimal():
            found["replays"] = float(replays)
        if (width := _read(f"{path}/current_link_width")).isdecimal():
            found["lanes_missing"] = self._lanes.setdefault(device, float(width)) - float(width)
        return found

    def _cards(self) -> dict[str, str]:
        """Device -> its directory."""
        found = {}
        for name in filter(_CARD.match, _names(self.root)):
            path = f"{self.root}/{name}/device"
            address = next(
                (line.partition("=")[2] for line in _read(f"{path}/uevent").splitlines() if line.startswith("PCI_SLOT_NAME=")), ""
            )
            if _read(f"{path}/vendor") == VENDOR and pci(address):
                found[f"pci:{pci(address)}"] = path
        return found


def _names(directory: str) -> list[str]:
    try:
        return sorted(os.listdir(directory))
    except OSError:
        return []


def _read(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read(1 << 18).strip()
    except OSError:
        return ""
