"""NVML GPUs: whether the driver answers, and whether all GPUs are still there.

Think of a roll call: the names are taken down once, in the morning, and after that each is called again; who does not answer is missing,
whoever else has come meanwhile. If the teacher himself does not come, that is told instead, once.

Contract: the only probe that tells of a driver that cannot be reached (kind "driver-mismatch", "driver") and of a GPU that is lost,
missing or waits for a reset (kind "gpu-lost", "gpu-reset-required"); it says so while it lasts. Expected at the start are the GPUs that
the kernel module has and that this name space may use (devices.py, `present`), which in a container are the container's; later those that
were there first.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from resilient.core.messages import Class, Finding
from resilient_agents.devices import present
from resilient_agents.probe import Surroundings
from resilient_agents.probes.nvml import GONE, NOT_FOR_US, TIMEOUT_S, Busy, Card, hanging, session

NO_DRIVER: Final[dict[int, tuple[str, str]]] = {  # nvml.h nvmlReturn_t -> kind, text; class cordon: no work can be done here
    1: ("driver", "the NVIDIA library has lost its driver"),
    9: ("driver", "the NVIDIA driver is not loaded"),
    12: ("driver", "the NVIDIA library is gone"),
    18: ("driver-mismatch", "the NVIDIA driver and its library are of different versions"),
}
LOST: Final[dict[int, tuple[str, Class, str]]] = {
    15: ("gpu-lost", "replace", "the GPU has fallen off the bus"),
    16: ("gpu-reset-required", "gpu-reset", "the GPU needs a reset before it can be used again"),
    28: ("gpu-lost", "replace", "the driver does not find the GPU any more"),
    6: ("gpu-lost", "replace", "the driver does not find the GPU any more"),
    999: ("gpu-lost", "replace", "the driver cannot say what is the matter with the GPU"),
}


class Gpus:
    """See the head of this file."""

    name = "nvml-gpus"
    period_s = 5.0
    scope = "node"
    lasting = True
    timeout_s = TIMEOUT_S

    def __init__(self, surroundings: Surroundings) -> None:
        """Raises Absent where there is no GPU."""
        self.session = session(surroundings)
        self.nvml = self.session.nvml
        self.device = ""  # whom it is asking now: where a check hangs
        self._found: list[Finding] = []

    def check(self, now: float) -> list[Finding]:  # noqa: ARG002 - what is missing now is missing, whatever the time
        """See probe.py."""
        try:
            cards = self.session.open()
            found = [finding for card in cards if (finding := self._called(card)) is not None]
        except Busy:
            return self._found
        except self.nvml.NVMLError as error:
            self.session.close()  # it may be another driver that comes back
            self._found = [self._no_driver(error)]
            return self._found
        finally:
            self.device = ""
        here = {card.gpu.pci for card in cards}
        absent = [gpu.pci for gpu in present(self.session.root) if gpu.pci not in here] if all(here) else []
        self._found = found + [self._missing(f"pci:{address}") for address in absent]
        return self._found

    def hangs(self, seconds: float) -> Finding:
        """What it means that a check does not return."""
        return hanging(self.name, self.device, seconds)

    def _called(self, card: Card) -> Finding | None:
        """One name of the roll. Raises NVMLError if it is the driver that does not answer."""
        self.device = card.gpu.device
        try:
            if card.address:
                card.handle = self.nvml.nvmlDeviceGetHandleByPciBusId(card.address)
            elif card.handle is None:
                card.handle = self.nvml.nvmlDeviceGetHandleByIndex(card.gpu.index)
        except self.nvml.NVMLError as error:
            return self._told(card, error, LOST)
        try:
            self.nvml.nvmlDeviceGetTemperature(card.handle, 0)  # goes to the GPU, and every one of them has it
        except self.nvml.NVMLError as error:
            return None if error.value in NOT_FOR_US else self._told(card, error, {code: LOST[code] for code in GONE})
        return None

    def _told(self, card: Card, error: Any, lost: Mapping[int, tuple[str, Class, str]]) -> Finding:
        code = error.value
        if code in NO_DRIVER:
            raise error
        if code in GONE:
            card.handle = None  # the others need not ask it
        kind, class_, text = lost.get(code, ("nvml-error", "ignore", f"NVML error {code} ({error})"))
        return self._finding(kind, str(code), self.device, class_, text)

    def _missing(self, device: str) -> Finding:
        return self._finding("gpu-lost", "absent", device, "replace", "the kernel module has this GPU, and NVML does not")

    def _no_driver(self, error: Any) -> Finding:
        code = error.value
        kind, text = NO_DRIVER.get(code, ("driver", "NVML cannot be initialised"))
        return self._finding(kind, str(code), "", "cordon", f"{text} (NVML error {code}, {error})", layer="driver")

    def _finding(self, kind: str, code: str, device: str, class_: Class, text: str, layer: str = "gpu") -> Finding:
        return Finding(seq=0, kind=kind, text=text, probe=self.name, layer=layer, code=code, device=device, class_=class_)
