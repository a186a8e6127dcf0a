"""Repeats: when a program's fault is the device's after all.

Think of a driving school: a learner who stalls the engine has stalled the engine; but when the third learner in a row stalls on the same
car, and nobody on any other, the car goes to the workshop.

Contract: pure. `Strike` is one worker that met a fault which is the program's by its kind (Xid 13, 31, 43, 69 ...) on one device. `whose`
says "device" when `needed` workers have met it on this device within the time, and none of their jobs met it on another device: a job that
does is a program with a bug, and none of its strikes counts. A job that runs on one device alone counts once, whatever it starts: nobody
can tell what it would have met elsewhere. It serves within one run (all strikes are of one job: any other device that was struck clears
this one) and on a node over many (whoever keeps the strikes says which job each was of).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, Literal

from resilient.core.messages import Msg

STRIKES_MAX: Final = 1024  # the newest; a program with a bug strikes every device at once


class Strike(Msg):
    """One worker, one device, one fault. The form in which a node keeps it from job to job."""

    device: str  # with its node, where several nodes are looked at together
    job: str
    worker: str  # another incarnation is another worker
    at_s: float  # by the clock of whoever keeps it
    others: bool = False  # the same program ran on other devices too


def whose(strikes: Iterable[Strike], device: str, now: float, *, needed: int, within_s: float) -> Literal["user", "device"]:
    """Whose fault it is by now."""
    recent = [s for s in strikes if now - s.at_s <= within_s]
    struck: dict[str, set[str]] = {}
    for strike in recent:
        struck.setdefault(strike.job, set()).add(strike.device)
    here = {(s.job, s.worker if s.others else "") for s in recent if s.device == device and len(struck[s.job]) == 1}
    return "device" if needed and len(here) >= needed else "user"
