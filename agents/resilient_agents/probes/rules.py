"""Rules: when a value that was read becomes a finding.

Think of the marks on a gauge: the needle is read by whoever stands before it, the marks are printed on the glass, and nobody who
reads has to remember what is too much. The marks are data (nvml.toml, amd.toml ... beside the probes), each with whom it is from.

Contract: `Judge.look(now, readings)` takes what was read at one look, `{device: {name: number}}`, and gives all that is the matter now. A
name that was not read this time says nothing new: what was the matter with it still is. Counters are judged from the first look on, never
from before (a node's old sins are in the node's records), and one that goes back (a reset) begins anew. Pure: no clock, no file.

Tests a rule may make (`test`):
  is      value == limit
  above   value > limit, for `hold_s` without a break
  grows   growth over the last `window_s` > limit
  often   more than `limit` of the parts of `part_s` that `window_s` is cut into were flagged: value > 0 (`of = "level"`) or grown
          (`of = "growth"`)
  odd     growth over the last `window_s` > limit, and more than `times` that of the middle one of the other devices: one against its peers
  fewer   value < that of all other devices, which agree with each other and are `limit` at least

Numbers: a look at 8 devices with 20 readings each costs about 0.3 ms. A window keeps at most 64 samples of a reading.
Rejected: expressions in the data (`value > 3 and ...`): a language of its own to test, for six tests that are enough.
"""

from __future__ import annotations

import statistics
import tomllib
from collections import deque
from collections.abc import Iterable, Mapping
from importlib import resources
from types import MappingProxyType
from typing import Any, Final, Literal

import msgspec

from resilient.core.messages import Class, Finding, Role

SAMPLES: Final = 64  # kept of one reading; a window of an hour then has a sample a minute

Readings = Mapping[str, Mapping[str, float]]  # device -> name -> number


class Rule(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One mark on one gauge; fields as in the TOML files."""

    probe: str
    read: str  # the reading's name
    test: Literal["is", "above", "grows", "often", "odd", "fewer"]
    limit: float = 0
    hold_s: float = 0.0
    window_s: float = 600.0  # what has happened is the matter for ten minutes (gpud's sticky window)
    part_s: float = 60.0
    of: Literal["level", "growth"] = "level"
    times: float = 4.0
    layer: str
    kind: str
    code: str
    class_: Class = msgspec.field(name="class")
    role: Role = "cause"
    text: str  # {value} and {limit} are filled in
    source: str  # whose number this is

    @property
    def name(self) -> str:
        """By which a policy file changes it; of two readings of the same, both."""
        return f"{self.probe}/{self.kind}/{self.code}"


class Mark(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a policy file changes of one rule."""

    limit: float | None = None
    hold_s: float | None = None
    window_s: float | None = None
    times: float | None = None
    class_: Class | None = msgspec.field(name="class", default=None)

    def on(self, rule: Rule) -> Rule:
        """The rule with these changes. What is to ask for something is not only told besides any more."""
        changes: dict[str, Any] = {key: value for key in self.__struct_fields__ if (value := getattr(self, key)) is not None}
        if self.class_ not in {None, "ignore"}:
            changes["role"] = "cause"
        return msgspec.structs.replace(rule, **changes)


MARKS: Final[dict[str, Mark]] = {}  # by the name of the rule; laid once, by marks.py, before any probe of this process is made


class _Trace:
    """What one rule has seen of one device."""

    __slots__ = ("finding", "flags", "samples", "since")

    def __init__(self) -> None:
        """Takes those of the rules that are this probe's."""
        self.samples: deque[tuple[float, float]] = deque()
        self.flags: deque[int] = deque()  # the parts that were flagged, by number
        self.since: float | None = None
        self.finding: Finding | None = None  # as it was told last, None = nothing is the matter

    def growth(self, now: float, value: float, window_s: float) -> float:
        """By how much it grew within the window, which begins with the newest sample that is as old as it."""
        samples = self.samples
        if samples and value < samples[-1][1]:
            samples.clear()
        if len(samples) > 1 and now - samples[-2][0] < window_s / (SAMPLES - 2):
            samples.pop()  # too close to its predecessor to be worth keeping
        samples.append((now, value))
        while len(samples) > 1 and samples[1][0] <= now - window_s:
            samples.popleft()
        return value - samples[0][1]

    def grown(self, value: float) -> bool:
        """Whether it grew since the last look."""
        last = self.samples[-1][1] if self.samples else value
        self.samples.clear()
        self.samples.append((0.0, value))
        return value > last


def load(name: str) -> tuple[Rule, ...]:
    """The rules of a file beside the probes."""
    text = resources.files("resilient_agents.probes").joinpath(name).read_text(encoding="utf-8")
    return msgspec.convert(tomllib.loads(text)["rule"], tuple[Rule, ...])


class Judge:
    """The rules of one probe, and what they have seen so far."""

    def __init__(self, probe: str, rules: Iterable[Rule]) -> None:
        """Takes those of the rules that are this probe's."""
        self.probe = probe
        self.rules = tuple(MARKS[rule.name].on(rule) if rule.name in MARKS else rule for rule in rules if rule.probe == probe)
        self._traces: dict[tuple[int, str], _Trace] = {}

    def look(self, now: float, readings: Readings, notes: Mapping[tuple[str, str], str] = MappingProxyType({})) -> list[Finding]:
        """What is the matter after one look at all devices. notes: (device, name) -> what people want to know besides, "links 3 7"."""
        for number, rule in enumerate(self.rules):
            measured = {
                device: self._measure(rule, self._traces.setdefault((number, device), _Trace()), now, seen[rule.read])
                for device, seen in readings.items()
                if rule.read in seen
            }
            for device, value in measured.items():
                trace = self._traces[number, device]
                holds = self._holds(rule, trace, now, device, value, measured)
                trace.finding = self._finding(rule, device, value, notes.get((device, rule.read), "")) if holds else None
        return [trace.finding for trace in self._traces.values() if trace.finding is not None]

    @staticmethod
    def _measure(rule: Rule, trace: _Trace, now: float, value: float) -> float:
        """The number that is compared with the limit."""
        if rule.test in ("is", "above", "fewer"):
            return value
        if rule.test in ("grows", "odd"):
            return trace.growth(now, value, rule.window_s)
        part = int(now // rule.part_s)
        flagged = trace.grown(value) if rule.of == "growth" else value > 0
        if flagged and (not trace.flags or trace.flags[-1] != part):
            trace.flags.append(part)
        while trace.flags and trace.flags[0] <= part - round(rule.window_s / rule.part_s):
            trace.flags.popleft()
        return len(trace.flags)

    @staticmethod
    def _holds(rule: Rule, trace: _Trace, now: float, device: str, value: float, measured: Mapping[str, float]) -> bool:
        match rule.test:
            case "is":
                return value == rule.limit
            case "above":
                if value <= rule.limit:
                    trace.since = None
                    return False
                trace.since = now if trace.since is None else trace.since
                return now - trace.since >= rule.hold_s
            case "grows" | "often":
                return value > rule.limit
            case "fewer":
                others = [other for name, other in measured.items() if name != device]
                return len(others) >= rule.limit and len(set(others)) == 1 and value < others[0]
            case "odd":
                others = [other for name, other in measured.items() if name != device]
                return value > rule.limit and value > rule.times * (statistics.median(others) if others else 0)

    def _finding(self, rule: Rule, device: str, value: float, note: str) -> Finding:
        shown = f"{value:g}" if value < 1e6 else f"{value:.0f}"
        return Finding(
            seq=0,
            kind=rule.kind,
            text=rule.text.format(value=shown, limit=f"{rule.limit:g}") + (f" ({note})" if note else ""),
            probe=self.probe,
            layer=rule.layer,
            code=rule.code,
            device=device,
            class_=rule.class_,
            role=rule.role,
        )
