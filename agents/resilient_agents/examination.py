"""Examination: all probes once and all checks, each isolated and with a deadline; gives the rows of a chart.

Think of a medical station: several queues at once, one quiet room for the hearing test, and a clock on every door.

Contract: `examine` comes to its end within `timeout_s`, a second or two for killing not counted, whatever the subjects do. Each of them is
loaded, made and run in a process of its own; a hang, a crash or an exception is a failed row of that subject alone. All begin at once,
except those that measure (`alone`): they wait for each other, and those that need torch (`torch`) until it has been loaded. What has
not come to its end when the time is over has failed, for nobody knows what it would have found.
"""

from __future__ import annotations

import dataclasses
import selectors
import time
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple

import msgspec

from resilient.core.messages import Finding
from resilient_agents import probe as probes
from resilient_agents.chart import Row
from resilient_agents.check import TIMEOUT_S, ExerciseFailed, Reading
from resilient_agents.gym import Gym
from resilient_agents.isolation import MESSAGE_BYTES, Isolated
from resilient_agents.probe import Absent, Roster, Surroundings
from resilient_agents.probes import limits

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Sequence

    from resilient_agents.check import Patient

LOAD_S: Final = 20.0  # to be imported and made; a cold network file system is slow
TORCH_S: Final = 45.0  # to be imported, likewise
ROWS_MAX: Final = 100  # of one subject
TEXT_MAX: Final = 300  # of one finding: all of them must go into one message
_GO: Final = b"go"
_FAILS: Final = frozenset({"gpu-reset", "replace", "cordon"})  # findings of a probe with which no work should be begun


class Subject(NamedTuple):
    """One probe or check, not loaded yet."""

    source: Literal["probe", "check"]
    name: str
    load: Callable[[], Any]  # gives its class


class Hello(msgspec.Struct, frozen=True, tag=True):
    """subject -> doctor: made, and waits for its turn."""

    timeout_s: float
    alone: bool
    torch: bool


class Told(msgspec.Struct, frozen=True, tag=True):
    """subject -> doctor: what it has found; its last word."""

    readings: list[Reading] = []
    findings: list[Finding] = []
    absent: str = ""
    failure: str = ""


class _Seat:
    """One subject on its way through."""

    def __init__(self, subject: Subject, isolated: Isolated, now: float) -> None:
        self.subject = subject
        self.isolated = isolated
        self.hello: Hello | None = None
        self.running = False
        self.since = now
        self.until: float | None = now + LOAD_S
        self.rows: list[Row] | None = None  # it is done

    def row(self, **facts: Any) -> Row:
        return Row(source=self.subject.source, name=self.subject.name, seconds=round(time.monotonic() - self.since, 3), **facts)


def examine(subjects: Sequence[Subject], patient: Patient, timeout_s: float) -> list[Row]:
    """The rows of all subjects, in the order of these. Forks: this process must have one thread."""
    gym = Gym()
    station = _Station(dataclasses.replace(patient, exercise_all=gym.exercise_all), gym, timeout_s)
    try:
        return station.run(subjects)
    finally:
        station.close()
        gym.close()


class _Station:
    def __init__(self, patient: Patient, gym: Gym, timeout_s: float) -> None:
        self._patient = patient
        self._gym = gym
        self._timeout_s = timeout_s
        self._until = time.monotonic() + timeout_s
        self._seats: list[_Seat] = []
        self._selector = selectors.DefaultSelector()
        self._torch_until = 0.0
        self._told = False  # that there is no torch

    def run(self, subjects: Sequence[Subject]) -> list[Row]:
        for subject in subjects:
            isolated = Isolated(_Visit(subject, self._patient))
            seat = _Seat(subject, isolated, time.monotonic())
            self._seats.append(seat)
            self._selector.register(isolated, selectors.EVENT_READ, seat)
        while self._let_in():
            for key, _ in self._selector.select(max(0.0, self._deadline() - time.monotonic())):
                if key.data is None:
                    self._gym_changed()
                elif key.data.rows is None:
                    self._hear(key.data)
            self._expire(time.monotonic())
        return [row for seat in self._seats for row in seat.rows or ()]

    def close(self) -> None:
        """End whoever is still there: an exception, or Ctrl-C."""
        for seat in self._seats:
            if seat.rows is None:
                self._done(seat, [], kill=True)
        self._selector.close()

    # ------------------------------------------------------------------ turns

    def _let_in(self) -> bool:
        """Whoever can, begins. False: there is nobody left."""
        waiting = [seat for seat in self._seats if seat.rows is None and seat.hello is not None and not seat.running]
        if self._gym.state == "shut" and any(seat.hello is not None and seat.hello.torch for seat in waiting):
            self._gym.open()
            self._torch_until = time.monotonic() + TORCH_S
            self._selector.register(self._gym, selectors.EVENT_READ, None)
        if self._gym.state == "gone":
            self._without_torch(waiting)
        busy = any(seat.rows is None and seat.running and seat.hello is not None and seat.hello.alone for seat in self._seats)
        for seat in sorted(waiting, key=lambda seat: seat.hello is not None and seat.hello.torch):  # others need not wait for torch
            assert seat.hello is not None
            if seat.rows is not None or (seat.hello.torch and self._gym.state != "open") or (seat.hello.alone and busy):
                continue
            busy = busy or seat.hello.alone
            seat.running, seat.since = True, time.monotonic()
            seat.until = seat.since + seat.hello.timeout_s
            seat.isolated.tell(_GO)
        return any(seat.rows is None for seat in self._seats)

    def _without_torch(self, waiting: Sequence[_Seat]) -> None:
        """The first one tells why; the others are not judged."""
        for seat in waiting:
            if seat.hello is not None and seat.hello.torch:
                told = (
                    {"state": "skipped", "text": "without torch"}
                    if self._told
                    else {"state": "fail", "layer": "torch", "text": self._gym.why}
                )
                self._told = True
                self._done(seat, [seat.row(**told)], kill=True)

    def _gym_changed(self) -> None:
        self._gym.changed()
        if self._gym.state == "gone":
            self._selector.unregister(self._gym)

    # ------------------------------------------------------------------ answers

    def _hear(self, seat: _Seat) -> None:
        data = seat.isolated.hear()
        if not data:
            self._done(seat, None, kill=False)
            return
        message = msgspec.msgpack.decode(data, type=Hello | Told)
        if isinstance(message, Hello):
            seat.hello, seat.until = message, None
        else:
            self._done(seat, _rows(seat, message), kill=True)

    def _expire(self, now: float) -> None:
        if self._gym.state == "opening" and now >= self._torch_until:
            self._selector.unregister(self._gym)
            self._gym.give_up(f"not there after {TORCH_S:g} s")
        for seat in self._seats:
            if seat.rows is not None:
                continue
            if seat.until is not None and now >= seat.until:
                doing = f"no answer within {seat.until - seat.since:g} s" if seat.running else f"not made within {LOAD_S:g} s"
                self._done(seat, [seat.row(state="fail", value="hangs", class_="cordon", text=doing)], kill=True)
            elif now >= self._until:
                why = "" if seat.running else "its turn did not come; "
                text = f"{why}the time limit of {self._timeout_s:g} s for all was reached (--timeout-s)"
                self._done(seat, [seat.row(state="fail", value="not done", class_="cordon", text=text)], kill=True)

    def _deadline(self) -> float:
        deadlines = [seat.until for seat in self._seats if seat.rows is None and seat.until is not None]
        if self._gym.state == "opening":
            deadlines.append(self._torch_until)
        return min([self._until, *deadlines])

    def _done(self, seat: _Seat, rows: list[Row] | None, *, kill: bool) -> None:
        self._selector.unregister(seat.isolated)
        how = seat.isolated.end(kill=kill)
        if rows is None:
            rows = [seat.row(state="fail", value="crashed", class_="cordon", text=how or "it ended without an answer")]
        elif kill and "cannot be killed" in how:
            rows.append(seat.row(state="warn", value="left behind", text=how))
        seat.rows = rows


def _rows(seat: _Seat, told: Told) -> list[Row]:
    if told.absent:
        return [seat.row(state="absent", text=told.absent)]
    if told.failure:
        return [seat.row(state="fail", value="failed", text=told.failure)]
    if seat.subject.source == "probe":
        return [_of_finding(seat, finding) for finding in told.findings] or [seat.row(value="nothing found")]
    if not told.readings:
        return [seat.row(state="absent", text="nothing here that it could look at")]
    return [seat.row(**{name: getattr(reading, name) for name in Reading.__struct_fields__}) for reading in told.readings]


def _of_finding(seat: _Seat, finding: Finding) -> Row:
    bad = finding.class_ in _FAILS and finding.role == "cause" and not finding.clears
    notable = finding.class_ not in {"", "ignore", "user"} and not finding.clears
    return seat.row(
        what=" ".join(filter(None, [finding.kind, finding.code])),
        device=finding.device,
        state="fail" if bad else "warn" if notable else "pass",
        value=finding.class_ or "told",
        layer=finding.layer,
        class_=finding.class_,
        text=finding.text,
        finding=finding,
    )


class _Visit:
    """What a subject's process does."""

    def __init__(self, subject: Subject, patient: Patient) -> None:
        self._subject = subject
        self._patient = patient

    def __call__(self, line: socket.socket) -> None:
        try:
            told = self._visit(line)
        except Absent as absent:
            told = Told(absent=str(absent) or "nothing to look at")
        except ExerciseFailed as failure:
            told = Told(failure=str(failure))
        data = msgspec.msgpack.encode(told)
        assert len(data) <= MESSAGE_BYTES, f"{len(data)} bytes of findings"
        line.send(data)

    def _visit(self, line: socket.socket) -> Told:
        made = self._subject.load()(self._given())
        is_probe = self._subject.source == "probe"
        timeout_s = float(getattr(made, "timeout_s", probes.TIMEOUT_S if is_probe else TIMEOUT_S))
        hello = Hello(timeout_s=timeout_s, alone=getattr(made, "alone", False), torch=getattr(made, "torch", False))
        line.send(msgspec.msgpack.encode(hello))
        assert line.recv(len(_GO)) == _GO
        if is_probe:
            found = made.check(time.monotonic())[:ROWS_MAX]
            return Told(findings=[msgspec.structs.replace(it, text=it.text[:TEXT_MAX]) for it in found])
        return Told(readings=list(made.run())[:ROWS_MAX])

    def _given(self) -> Patient | Surroundings:
        if self._subject.source == "check":
            return self._patient
        places = dict(self._patient.places)
        roster = Roster(run_dir=places.get("run", ""), checkpoint=places.get("checkpoint", ""), memory_dir=self._patient.memory_dir)
        return Surroundings(root=self._patient.root, roster=lambda: roster, lookback_s=limits.LOOKBACK_S.value)
