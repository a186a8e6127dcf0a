"""Strikes: what a node remembers of users' faults on its devices, from job to job.

Think of the workshop book of a car rental: "stalled", the date, the plate, the driver. One driver who stalls it every day says nothing
of the car; three who have never met do.

Contract: a fault that the policy calls the user's and gives a number of `jobs` (policy.toml, rule xid-user) is a strike. What the same user
starts of the same program within `SAME_S` of its last strike is one job, whatever it is called: somebody who looks for a bug starts it
again and again, and a bug in one rank's part strikes the same device each time. So is everything of which nobody knows whose it is. The
rest is core/repeats.py's: a device that so many jobs struck, none of which struck another, is a finding of class cordon while it lasts.
The book is a file of one JSON object a line, replaced as a whole; `STRIKES_MAX` lines at most. One that cannot be read is put aside and
begun anew, one that cannot be written is kept in memory: both are a warning and nothing else. Whoever repairs a device deletes its lines.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec

from resilient.core.messages import Finding
from resilient.core.repeats import STRIKES_MAX, Strike, whose
from resilient.core.rules import Book

if TYPE_CHECKING:
    from resilient.core.rules import Rules

NAME: Final = "repeats"  # as the policy's list of proof has it
SAME_S: Final = 86400.0  # a night's sleep ends nobody's search for a bug
BYTES_MAX: Final = 4 << 20  # 1024 strikes are less than half of it
OWNER_MAX: Final = 100
UNKNOWN: Final = "somebody"


class Strikes:
    """One node's book."""

    def __init__(self, path: str, rules: Rules) -> None:
        """path: "" = in memory alone."""
        self._path = path
        self._book = Book(rules)
        counting = [rule for rule in rules.rules if rule.jobs]  # of several rules the most patient counts for all
        self._needed = max((rule.jobs for rule in counting), default=0)
        self._within_s = min((rule.jobs_s for rule in counting), default=0.0)
        self._strikes: list[Strike] = []

    def open(self) -> str:
        """Read what is there; gives a warning, or "" if all is well."""
        if not self._path:
            return ""
        try:
            with open(self._path, "rb") as file:
                data = file.read(BYTES_MAX + 1)
        except FileNotFoundError:
            return ""
        except OSError as error:
            return f"{self._path}: cannot be read ({error.strerror}); nothing is known of earlier jobs"
        try:
            if len(data) > BYTES_MAX:
                raise ValueError(f"at most {BYTES_MAX} bytes expected")
            self._strikes = msgspec.json.Decoder(Strike).decode_lines(data)[-STRIKES_MAX:]
        except (msgspec.MsgspecError, ValueError) as error:
            aside = f"{self._path}.damaged"
            with contextlib.suppress(OSError):
                os.replace(self._path, aside)
            return f"{self._path}: strikes, one JSON object a line, expected ({error}); it is now {aside}, and a new one is begun"
        return ""

    def take(self, finding: Finding, owner: str, now: float) -> str | None:
        """A finding of this node while `owner` ("train.py of user 1000") ran there. None: it is no strike; else a warning, or "".

        now: CLOCK_REALTIME, which goes on while the machine is off.
        """
        ruling = self._book.ruling(finding)
        if ruling.class_ != "user" or not ruling.rule.jobs or not ruling.proof or finding.role != "cause" or finding.clears:
            return None
        if not finding.device:
            return None
        owner = owner[:OWNER_MAX] or UNKNOWN
        last = max((s for s in self._strikes if s.worker == owner and abs(now - s.at_s) <= SAME_S), key=lambda s: s.at_s, default=None)
        job = last.job if last is not None else f"{owner}, {now:.0f}"
        self._strikes = [s for s in self._strikes if (s.device, s.job) != (finding.device, job)][1 - STRIKES_MAX :]
        self._strikes.append(Strike(device=finding.device, job=job, worker=owner, at_s=now))
        return self._save()

    def standing(self, now: float) -> list[Finding]:
        """The devices whose fault it is by now."""
        past = [s for s in self._strikes if s.at_s <= now + SAME_S]  # a clock that was far ahead once is not believed for ever
        return [self._told(device, past, now) for device in sorted({s.device for s in past}) if self._guilty(device, past, now)]

    def _guilty(self, device: str, strikes: list[Strike], now: float) -> bool:
        return whose(strikes, device, now, needed=self._needed, within_s=self._within_s) == "device"

    def _told(self, device: str, strikes: list[Strike], now: float) -> Finding:
        owners = sorted({s.worker for s in strikes if s.device == device and now - s.at_s <= self._within_s})
        shown = ", ".join(owners[:4]) + (" ..." if len(owners) > 4 else "")
        text = f"{self._needed} jobs within {self._within_s / 86400:g} days met a program's fault on this device and on no other ({shown})"
        return Finding(seq=0, kind="device-repeats", probe=NAME, layer="gpu", device=device, class_="cordon", text=text)

    def _save(self) -> str:
        if not self._path:
            return ""
        data = b"".join(msgspec.json.encode(strike) + b"\n" for strike in self._strikes)
        path = Path(self._path)
        draft = path.with_name(f"{path.name}.new")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(draft, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(draft, path)
        except OSError as error:
            return f"{self._path}: cannot be written ({error.strerror}); strikes are remembered only until this process ends"
        return ""
