"""Clock: whether time goes forward, evenly, and is that of the rest of the world.

Think of setting your watch by the station clock before a journey.

Contract: CLOCK_MONOTONIC never goes back; CLOCK_REALTIME keeps step with it while we look (a jump would be somebody setting it); the
kernel says whether it is kept in step by NTP or PTP, and how wrong it may be. Deadlines here use the monotonic clock only, so a wrong
date is a warning: certificates, logs of several nodes and checkpoints' dates suffer from it.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import time
from typing import TYPE_CHECKING, Final

from resilient_agents.check import Reading, grade

if TYPE_CHECKING:
    from resilient_agents.check import Patient

LOOK_S: Final = 0.2
JUMP_S: Final = 0.02  # slewing changes a fifth of a second by 0.0001 s at most
SKEW_S: Final = 1.0  # logs of several nodes cannot be read together beyond that
CHRONYC_S: Final = 3.0
_UNSYNC: Final = 0x40  # STA_UNSYNC
_NANO: Final = 0x2000  # STA_NANO: offset in nanoseconds
_SLOW_SOURCES: Final = frozenset({"hpet", "acpi_pm", "jiffies", "refined-jiffies"})


class _Timex(ctypes.Structure):
    _fields_ = (
        ("modes", ctypes.c_uint),
        ("offset", ctypes.c_long),
        ("freq", ctypes.c_long),
        ("maxerror", ctypes.c_long),
        ("esterror", ctypes.c_long),
        ("status", ctypes.c_int),
        ("rest", ctypes.c_char * 256),
    )


class Clock:
    """Time on this node."""

    def __init__(self, patient: Patient) -> None:
        """Nothing is asked of it."""
        self._patient = patient

    def run(self) -> list[Reading]:
        """Look for a fifth of a second, and ask the kernel."""
        return [*self._forward(), self._kept(), *self._chrony(), *self._source()]

    @staticmethod
    def _forward() -> list[Reading]:
        difference = _difference()
        began = before = time.monotonic()
        back = 0
        while before < began + LOOK_S:
            now = time.monotonic()
            back += now < before
            before = max(now, before)
        jump = abs(_difference() - difference)
        return [
            Reading(what="monotonic", layer="clock", value=f"{back} steps back", expected="0", state=grade(fail=back > 0)),
            Reading(
                what="realtime",
                layer="clock",
                number=jump,
                unit="s off",
                expected=f"< {JUMP_S} s",
                state=grade(warn=jump > JUMP_S),
            ),
        ]

    @staticmethod
    def _kept() -> Reading:
        timex = _Timex()
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.adjtimex(ctypes.byref(timex)) < 0:
            return Reading(what="kept in step", layer="clock", state="absent", text=f"adjtimex: {os.strerror(ctypes.get_errno())}")
        return kept(timex.status, timex.offset, timex.maxerror)

    @staticmethod
    def _chrony() -> list[Reading]:
        program = shutil.which("chronyc")
        if program is None:
            return []
        try:
            done = subprocess.run([program, "-n", "tracking"], capture_output=True, text=True, timeout=CHRONYC_S, check=False)  # noqa: S603
        except subprocess.TimeoutExpired:
            return [Reading(what="chrony", layer="clock", state="warn", value="no answer", expected=f"within {CHRONYC_S:g} s")]
        return [tracked(done.stdout)] if done.returncode == 0 else []

    def _source(self) -> list[Reading]:
        try:
            with open(self._patient.path("/sys/devices/system/clocksource/clocksource0/current_clocksource"), encoding="ascii") as file:
                source = file.read().strip()
        except OSError:
            return []
        slow = source in _SLOW_SOURCES
        text = "each look at the clock is a slow system call: the kernel found the processor's own counter unstable" if slow else ""
        return [Reading(what="source", layer="clock", value=source, expected="tsc or a hypervisor's", state=grade(warn=slow), text=text)]


def _difference() -> float:
    """Between both clocks, seconds; of some looks the one that was interrupted least."""
    looks = [(time.monotonic(), time.time(), time.monotonic()) for _ in range(9)]
    _, difference = min((after - before, real - (before + after) / 2) for before, real, after in looks)
    return difference


def kept(status: int, offset: int, maxerror_us: int) -> Reading:
    """What adjtimex says."""
    if status & _UNSYNC:
        text = "no NTP or PTP service keeps this clock in step (chronyd, systemd-timesyncd, ptp4l)"
        return Reading(what="kept in step", layer="clock", state="warn", value="no", expected="yes", text=text)
    off_s = abs(offset) / (1e9 if status & _NANO else 1e6)
    state = grade(warn=off_s > SKEW_S)
    return Reading(what="kept in step", layer="clock", state=state, value=f"yes, {off_s:.6f} s off, {maxerror_us / 1e6:.3f} s at most")


def tracked(text: str) -> Reading:
    """What `chronyc tracking` says."""
    match = re.search(r"^System time\s*:\s*([0-9]{1,15}(?:\.[0-9]{1,15})?) seconds (fast|slow)", text, re.MULTILINE)
    leap = re.search(r"^Leap status\s*:\s*(.+)$", text, re.MULTILINE)
    if match is None:
        return Reading(what="chrony", layer="clock", state="warn", value="not understood", expected="a line 'System time'")
    off_s = float(match[1])
    lost = leap is not None and "not synchronised" in leap[1].lower()
    state = grade(warn=lost or off_s > SKEW_S)
    return Reading(
        what="chrony",
        layer="clock",
        state=state,
        number=off_s,
        unit=f"s {match[2]}",
        expected=f"< {SKEW_S:g} s",
        text=leap[1] if lost and leap else "",
    )
