"""Moore Threads: what can be said of these GPUs from public facts: whether they are there, and whether their driver answers.

Think of a house whose language one does not speak: one cannot ask how the people are, but counts who comes to the door, and notices when
nobody does.

Contract: `parse` takes the output of `mthreads-gmi -q -j` (or, where that option is unknown, of `mthreads-gmi -q`), gives one entry for
each GPU and never raises. Counted against the first look are PCI functions of the vendor (1ed5) and the tool's list. No key for health,
ECC or link errors is publicly documented: none is guessed (docs/probes/vendors.md).
"""

from __future__ import annotations

import json
import os
from typing import Any, ClassVar, Final

from resilient.core.messages import Class, Finding
from resilient_agents.devices import pci
from resilient_agents.probe import Absent, Surroundings
from resilient_agents.probes.ascend import hanging
from resilient_agents.probes.tool import Fails, Hangs, Tool

VENDOR: Final = "0x1ed5"
DISPLAY: Final = ("0x03", "0x12")  # PCI classes: display controller, processing accelerator
ASK_S: Final = 20.0
GPUS_MAX: Final = 64


def parse(text: str) -> list[dict[str, str]]:
    """The GPUs of the list, each as the tool's own words for it."""
    try:
        data = json.loads(text)
    except (ValueError, RecursionError):
        return _blocks(text)
    gpus = data.get("gpus") if isinstance(data, dict) else None
    return (
        [{str(key): str(value)[:200] for key, value in gpu.items()} for gpu in gpus[:GPUS_MAX] if isinstance(gpu, dict)]
        if isinstance(gpus, list)
        else []
    )


def _blocks(text: str) -> list[dict[str, str]]:
    """`Key : value` lines; a "Product Name" begins the next GPU."""
    gpus: list[dict[str, str]] = []
    for line in text[: 1 << 20].splitlines():
        name, colon, value = line[:400].partition(":")
        if not colon:
            continue
        if name.strip() == "Product Name" and len(gpus) < GPUS_MAX:
            gpus.append({})
        if gpus:
            gpus[-1].setdefault(name.strip(), value.strip())
    return gpus


class MooreThreads:
    """Whether all of them are there."""

    name: ClassVar = "mthreads-gpus"
    period_s: ClassVar = 60.0
    scope: ClassVar = "node"
    lasting: ClassVar = True
    timeout_s: ClassVar = 3 * ASK_S

    def __init__(self, surroundings: Surroundings) -> None:
        """Raises Absent where there is no such GPU."""
        self.root = surroundings.path("/sys/bus/pci/devices")
        self._there = self._on_pci()
        if not self._there:
            raise Absent(f"no GPU of Moore Threads below {self.root}")
        self.tool = Tool("mthreads-gmi")
        self._listed = 0
        self._hung = 0

    def check(self, now: float) -> list[Finding]:  # noqa: ARG002 - what is missing now is missing
        """See probe.py."""
        here = self._on_pci()
        found = [
            self._finding("gpu-lost", f"pci:{pci(name)}", "replace", "the GPU has left the PCI bus") for name in sorted(self._there - here)
        ]
        try:
            gpus = parse(self._ask())
        except Hangs as error:
            self._hung += 1
            return [*found, hanging(self.name, "mthreads-gmi", self._hung, str(error))]
        except Fails as error:
            return [*found, self._finding("mthreads-gmi", "", "ignore", str(error), role="context")]
        self._hung = 0
        self._listed = max(self._listed, len(gpus))
        if gpus and len(gpus) < self._listed and not found:
            text = f"mthreads-gmi lists {len(gpus)} GPUs of {self._listed}"
            found.append(self._finding("gpu-lost", "", "replace", text))
        return found

    def _ask(self) -> str:
        try:
            return self.tool.ask("-q", "-j", timeout_s=ASK_S)
        except Fails:
            return self.tool.ask("-q", timeout_s=ASK_S)

    def _on_pci(self) -> set[str]:
        try:
            names = os.listdir(self.root)
        except OSError:
            return set()
        return {
            name
            for name in names
            if _read(f"{self.root}/{name}/vendor") == VENDOR and _read(f"{self.root}/{name}/class").startswith(DISPLAY)
        }

    def _finding(self, kind: str, device: str, class_: Class, text: str, role: Any = "cause") -> Finding:
        return Finding(seq=0, kind=kind, text=text, probe=self.name, layer="gpu", device=device, class_=class_, role=role)


def _read(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read(64).strip()
    except OSError:
        return ""
