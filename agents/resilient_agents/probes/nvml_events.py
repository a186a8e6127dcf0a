"""NVML events: what the driver itself calls out, Xids above all, without root.

Think of the house intercom: the kernel log is the caretaker's book, which not everybody may read; the intercom says the same at the same
moment, but only to those who listen, and nothing of what was before.

Contract: Xids are told only where the kernel log cannot be read (its probe says more, and earlier ones too); they mean what the text
classifier says of the same Xid in a kernel line. A GPU that becomes unavailable and a change of the recovery action wake nobody here:
nvml_gpus.py and nvml-recovery look at the state itself within seconds.
Numbers: a check waits for at most a second, asleep in the driver; an event is told within milliseconds of its being called out.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from typing import Any, Final

import msgspec

from resilient.core.messages import Finding
from resilient_agents.diagnosis.text import classify
from resilient_agents.probe import Absent, Surroundings
from resilient_agents.probes.nvml import GONE, NOT_FOR_US, TIMEOUT_S, Card, session

TIMEOUT: Final = 10  # NVML_ERROR_TIMEOUT: nothing happened
XID: Final = 0x8  # nvmlEventTypeXidCriticalError
DOUBLE_BIT: Final = 0x2  # nvmlEventTypeDoubleBitEccError
EVENTS_MAX: Final = 64  # at one check; the rest at the next


class Events:
    """See the head of this file."""

    name = "nvml-events"
    period_s = 1.0
    scope = "node"
    timeout_s = TIMEOUT_S
    wait_ms = 1000

    def __init__(self, surroundings: Surroundings) -> None:
        """Raises Absent where there is no GPU, or the kernel log can be read."""
        if _readable(surroundings.path("/dev/kmsg")):
            raise Absent("the kernel log can be read, and tells more of Xids")
        self.session = session(surroundings)
        self.nvml = self.session.nvml
        self._set: Any = None
        self._cards: dict[int, Card] = {}  # by handle

    def check(self, now: float) -> list[Finding]:  # noqa: ARG002 - an event is now
        """See probe.py."""
        if self._set is None and not self._listen():
            return []
        found: list[Finding] = []
        wait_ms = self.wait_ms
        for _ in range(EVENTS_MAX):
            try:
                event = self.nvml.nvmlEventSetWait(self._set, wait_ms)
            except self.nvml.NVMLError as error:
                if error.value == TIMEOUT:
                    break
                self._close()
                if error.value in GONE:  # a GPU of the set; the others can be listened to again
                    break
                raise
            wait_ms = 0
            found.append(self._told(event))
        return found

    def _close(self) -> None:
        events, self._set = self._set, None
        with contextlib.suppress(self.nvml.NVMLError):
            self.nvml.nvmlEventSetFree(events)

    def _listen(self) -> bool:
        cards = self.session.cards()
        if not cards:
            return False
        events = self.nvml.nvmlEventSetCreate()
        for card in cards:
            try:
                known = self.nvml.nvmlDeviceGetSupportedEventTypes(card.handle)
                self.nvml.nvmlDeviceRegisterEvents(card.handle, known & (XID | DOUBLE_BIT), events)
            except self.nvml.NVMLError as error:
                if error.value not in NOT_FOR_US | GONE:
                    raise
                continue
            self._cards[_pointer(card.handle)] = card
        self._set = events
        return True

    def _told(self, event: Any) -> Finding:
        """The event as a finding."""
        card = self._cards.get(_pointer(event.device))  # a GPU that is lost could not be asked who it is
        device = card.gpu.device if card is not None else ""
        if event.eventType == DOUBLE_BIT:
            text = "an uncorrectable memory error was called out by the driver"
            return Finding(
                seq=0, kind="ecc", text=text, probe=self.name, layer="gpu", code="uncorrectable", device=device, class_="gpu-reset"
            )
        finding = classify(line(card.gpu.pci if card is not None else "", int(event.eventData)), "kmsg")
        return msgspec.structs.replace(finding, probe=self.name, device=device or finding.device)


def line(address: str, xid: int) -> str:
    """The kernel line of an Xid of which only the number is known."""
    return f"NVRM: Xid (PCI:{address or '0000:00:00'}): {xid}, pid='<unknown>', name=<unknown>, told by NVML"


def _pointer(handle: Any) -> int:
    return ctypes.cast(handle, ctypes.c_void_p).value or 0


def _readable(path: str) -> bool:
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC))
    except OSError:
        return False
    return True
