"""Check: what an active check is, and what it is given.

Think of a medical before a long flight: a probe takes the pulse of somebody who goes about his day; a check asks him to climb stairs, and
looks whether he arrives, how fast, and whether he can still count to ten.

Contract: a check has `run`, which does something and gives readings. It may block, raise, hang or crash: it runs in a process of its own
(isolation.py), with a deadline, and what becomes of it is a reading, never the end of `resilient doctor`. A class is registered in the
entry-point group `resilient.checks`, the built-in ones too; it is called with a `Patient` and raises `Absent` (probe.py) where there is
nothing to check. What needs torch is an exercise: a function "module:function" that `Patient.exercise` has called in another process, one
that has torch loaded; a check itself never imports it.
Rejected: threads with a deadline (one in the driver's uninterruptible sleep would keep the whole doctor from ending, and a crash in a
vendor's library would take it along); one process started for each check (loading torch ten times is half a minute).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, Protocol

import msgspec

from resilient.core.messages import Class
from resilient.errors import ResilientError

GROUP: Final = "resilient.checks"
TIMEOUT_S: Final = 15.0  # for one check, where it names no `timeout_s` of its own

State = Literal["pass", "warn", "fail", "absent", "skipped"]


class ExerciseFailed(ResilientError):
    """An exercise raised, crashed, hung, or could not be begun; the message says which."""


class Reading(msgspec.Struct, frozen=True, kw_only=True):
    """One line of what a check has found."""

    what: str = ""  # which of its questions; "" where it has only one
    device: str = ""  # as in Finding; "" = the node
    state: State = "pass"
    value: str = ""  # for people; where there is a number, it is told from that
    expected: str = ""  # for people; "" = nothing in particular, it is only told
    number: float | None = None
    unit: str = ""
    better: Literal["", "more", "less"] = ""  # what --compare may make of the number; "" = nothing
    layer: str = ""
    class_: Class = msgspec.field(default="cordon", name="class")  # what a failure asks for
    text: str = ""  # one line: what is wrong, and what may be done about it


def grade(*, fail: bool = False, warn: bool = False) -> State:
    """The state of a reading."""
    return "fail" if fail else "warn" if warn else "pass"


class Exercise(msgspec.Struct, frozen=True):
    """What is to be done by a process with torch."""

    call: str  # "module:function"
    arguments: dict[str, Any] = {}
    limit_s: float = 0.0  # the caller's; filled in on the way


class Answer(msgspec.Struct, frozen=True):
    """What came of an exercise."""

    value: Any = None
    failure: str = ""  # why there is no value

    def get(self) -> Any:
        """The value; raises ExerciseFailed."""
        if self.failure:
            raise ExerciseFailed(self.failure)
        return self.value


def _no_torch(exercises: Sequence[Exercise], limit_s: float) -> list[Answer]:
    del limit_s
    return [Answer(failure="nobody here has torch")] * len(exercises)


@dataclass(frozen=True, slots=True)
class Patient:
    """The node, and where to look."""

    quick: bool = False  # seconds count: small sizes, few repeats
    root: str = "/"  # what is only read of the host (/proc, /sys) is read below it
    places: tuple[tuple[str, str], ...] = (("tmp", "/tmp"),)  # noqa: S108 - (name, directory) of what a run writes to
    memory_dir: str = "/dev/shm"  # noqa: S108 - shared memory is the point
    devices: tuple[int, ...] | None = None  # CUDA devices; None = all, () = none
    cpu: bool = True  # the processor and its memory too
    exercise_all: Callable[[Sequence[Exercise], float], list[Answer]] = _no_torch  # all at the same time, each for so many seconds at most

    def path(self, absolute: str) -> str:
        """Where `absolute` ("/proc/mounts") lies below the root."""
        return self.root.rstrip("/") + absolute

    def exercise(self, call: str, limit_s: float, **arguments: Any) -> Any:
        """Have one exercise done. Raises ExerciseFailed."""
        (answer,) = self.exercise_all([Exercise(call, arguments)], limit_s)
        return answer.get()


class Check(Protocol):
    """See the head of this file. Optional: `timeout_s` (TIMEOUT_S if not given), `alone` and `torch` (False if not given)."""

    # alone: it measures something, and no other check runs meanwhile
    # torch: it has exercises to be done; it is begun when torch has been loaded

    def run(self) -> list[Reading]:
        """Do it."""
        ...
