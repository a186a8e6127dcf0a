"""Vitals: whether the numbers that a script logs look healthy.

Think of the curve at the foot of a hospital bed: nobody calls the doctor for one high reading, but for a value that no living patient has,
or for two that this patient never had before.

Contract: `take` is given what one rank logged at one step and answers with findings of layer "training", one for each episode:
- nan-loss: a loss is not a number, or infinite. At once. (A gradient norm is infinite whenever a loss scale was too high: not counted.)
- loss-spike: twice in a row above the median of the last `KEPT` values by more than eight standard deviations and a quarter of it, and
  not less than a hundredth of what it was at first: a loss that has come down to rounding errors jumps by powers of ten;
- grad-spike: a gradient norm above ten times the median and ten standard deviations.
An episode is over after `CALM` healthy values; values that are none are not learned, unless they go on: then they are the new usual.
Robust: median and median absolute deviation, so that one outlier moves nothing. A rank whose step goes back (a rollback) forgets what
it had logged from there on. Of a node's ranks only the lowest that logs is heard.
Names that count: a loss ends in "loss" and is not one of validation; a norm has "grad" and "norm" in its name (`gnorm` too).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, Literal

from resilient.core.messages import Finding
from resilient.core.straggler import median

KEPT: Final = 128
LEARN: Final = 32  # values, before any of them is called unusual
CALM: Final = 16
SPIKE_DEVIATIONS, SPIKE_SHARE, SPIKE_LEVEL = 8.0, 0.25, 0.01
GRAD_DEVIATIONS, GRAD_TIMES = 10.0, 10.0
DEVIATION: Final = 1.4826
NEW_USUAL: Final = 64  # unusual values in a row
SERIES_MAX: Final = 64
_ELSEWHERE: Final = frozenset({"val", "valid", "validation", "eval", "evaluation", "test", "dev"})

Meaning = Literal["loss", "norm", ""]


def meaning(name: str) -> Meaning:
    """What a logged number is, by its name."""
    words = re.split(r"[^a-z0-9]+", name.lower())
    if words[-1].endswith("loss") or words[0] == "loss":
        return "" if _ELSEWHERE & set(words) else "loss"
    text = "".join(words)
    return "norm" if "norm" in text and ("grad" in text or text == "gnorm") else ""


@dataclass(slots=True)
class _Series:
    values: list[tuple[int, float]] = field(default_factory=list)  # (step, value), healthy ones
    odd: int = 0  # unusual values in a row
    calm: int = 0  # healthy values in a row
    told: set[str] = field(default_factory=set)  # of the episode under way
    level: float = 0.0  # the median when enough values were known for the first time

    def back_to(self, step: int) -> None:
        """The run went back."""
        while self.values and self.values[-1][0] >= step:
            self.values.pop()

    def limit(self, deviations: float, times: float, level: float = 0.0) -> float:
        """Above it a value is unusual; infinite before enough are known. level: and above this part of what was usual at first."""
        if len(self.values) < LEARN:
            return math.inf
        usual = median(value for _, value in self.values)
        spread = DEVIATION * median(abs(value - usual) for _, value in self.values)
        self.level = self.level or abs(usual)
        return max(usual + max(deviations * spread, times * abs(usual)), level * self.level)

    def healthy(self, step: int, value: float) -> None:
        """Learn it."""
        self.odd, self.calm = 0, self.calm + 1
        if self.calm >= CALM:
            self.told.clear()
        self.values.append((step, value))
        del self.values[:-KEPT]

    def unusual(self, step: int, value: float) -> None:
        """Do not learn it, unless it has become the rule."""
        self.odd, self.calm = self.odd + 1, 0
        if self.odd >= NEW_USUAL:
            self.values = [(step, value)]
            self.odd = 0

    def first(self, kind: str) -> bool:
        """Whether this is the first of its kind in the episode."""
        before = kind in self.told
        self.told.add(kind)
        return not before


class Vitals:
    """One per node."""

    def __init__(self) -> None:
        """Nothing was logged yet."""
        self._rank: int | None = None
        self._series: dict[str, _Series] = {}

    def take(self, rank: int, step: int, scalars: Mapping[str, float]) -> list[Finding]:
        """What `rank` logged when it had completed `step`."""
        known = {name: kind for name in sorted(scalars) if (kind := meaning(name))}
        if not known or (self._rank is not None and rank > self._rank):
            return []
        if rank != self._rank:
            self._rank, self._series = rank, {}
        found = []
        for name, kind in known.items():
            series = self._series.get(name)
            if series is None:
                if len(self._series) >= SERIES_MAX:
                    continue
                series = self._series[name] = _Series()
            series.back_to(step)
            look = _look_at_loss if kind == "loss" else _look_at_norm
            if (seen := look(series, step, scalars[name])) is not None:
                text = f"{name} {seen[1]} at step {step}"
                class_: Literal["app-restart", "ignore"] = "app-restart" if seen[0] == "nan-loss" else "ignore"
                found.append(Finding(seq=0, kind=seen[0], rank=rank, step=step, layer="training", class_=class_, text=text))
        return found


def _look_at_loss(series: _Series, step: int, value: float) -> tuple[str, str] | None:
    if not math.isfinite(value):
        series.unusual(step, 0.0)
        series.odd = min(series.odd, NEW_USUAL - 2)  # it never becomes the rule
        return ("nan-loss", f"is {value}") if series.first("nan-loss") else None
    limit = series.limit(SPIKE_DEVIATIONS, SPIKE_SHARE, SPIKE_LEVEL)
    if value <= limit:
        series.healthy(step, value)
        return None
    series.unusual(step, value)
    return ("loss-spike", f"is {value:.4g}, above {limit:.4g}") if series.odd > 1 and series.first("loss-spike") else None


def _look_at_norm(series: _Series, step: int, value: float) -> tuple[str, str] | None:
    if not math.isfinite(value):
        return None
    limit = series.limit(GRAD_DEVIATIONS, GRAD_TIMES - 1)
    if value <= limit:
        series.healthy(step, value)
        return None
    series.unusual(step, value)
    return ("grad-spike", f"is {value:.4g}, above {limit:.4g}") if series.first("grad-spike") else None
