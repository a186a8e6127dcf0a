"""Tempo: how fast the run goes, and what its time goes into.

Think of a coach with a stop watch at the edge of the lane: he does not run, he notes the laps, and says so when three laps in a row were
slow, or when one of the team stands at the water bottle for half of each lap.

Contract: `take` is given every report and costs O(chairs of its node). When all ranks have done `WINDOW_STEPS` steps and `WINDOW_S` have
passed it closes a **window**: only then are all ranks looked at. It answers with findings, each told once while it lasts and once when it
is over: straggler (straggler.py); throughput-drop: three windows in a row at less than two thirds of the median speed so far; data-stall:
a rank spends half of its steps before the first forward, three windows in a row. A window in which somebody opened a section says
nothing, nor does the first one of a round. All figures are of one rank's own clock, or of the coordinator's.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from typing import Final, NamedTuple

from resilient.core.messages import Chair, Finding
from resilient.core.straggler import Stragglers, Window, median

WINDOW_STEPS: Final = 10
WINDOW_S: Final = 3.0  # three reports, so that it does not matter when in its second each came
WINDOWS: Final = 3  # in a row, before anything is told
LEARN: Final = 5  # windows, before a speed is called the usual one
KEPT: Final = 60
SLOW: Final = 1.5  # times the usual time of a step
SLOW_OVER: Final = 1.2
STARVED: Final = 0.5  # of a step, before the first forward
STARVED_OVER: Final = 0.35


class _Mark(NamedTuple):
    step: int
    waited_s: float
    loaded_s: float
    at: float  # coordinator's clock


class Tempo:
    """One per run."""

    def __init__(self) -> None:
        """Nothing was seen yet."""
        self.stragglers = Stragglers()
        self._usual: deque[float] = deque(maxlen=KEPT)  # seconds of a step, window by window
        self._slow = self._starved = 0  # windows in a row
        self._told: dict[str, Finding] = {}
        self._homes: Mapping[int, str] = {}
        self._begin: dict[int, _Mark] = {}
        self._newest: dict[int, _Mark] = {}
        self._ready: set[int] = set()
        self._sections: dict[int, int] = {}
        self._disturbed = self._first = True

    def seated(self, homes: Mapping[int, str]) -> None:
        """A round begins. homes: rank -> node."""
        self._homes = homes
        self.stragglers.forget()
        self._slow = self._starved = 0
        self._begin, self._newest, self._ready = {}, {}, set()
        self._disturbed = self._first = True

    def take(self, chairs: Iterable[Chair], now: float) -> list[Finding]:
        """Chairs of one node, in the round in force."""
        for chair in chairs:
            record = chair.record
            if record is None or chair.rank not in self._homes or record.committed_s <= 0 or record.phase == "done":
                continue
            self._disturbed |= record.section or self._sections.get(chair.rank, record.sections) != record.sections
            self._sections[chair.rank] = record.sections
            mark = _Mark(record.step, record.waited_s, record.loaded_s, now)
            begin = self._begin.setdefault(chair.rank, mark)
            self._newest[chair.rank] = mark
            if mark.step - begin.step >= WINDOW_STEPS and now - begin.at >= WINDOW_S:
                self._ready.add(chair.rank)
        if not self._homes or len(self._ready) < len(self._homes):
            return []
        window = self._close()
        if window.disturbed:
            return []
        return [*self.stragglers.take(window, self._homes), *self._speed(window), *self._data(window)]

    def _close(self) -> Window:
        rates: dict[int, tuple[float, float, float]] = {}
        for rank, mark in self._newest.items():
            begin = self._begin[rank]
            steps = mark.step - begin.step
            spent = (mark.at - begin.at, mark.waited_s - begin.waited_s, mark.loaded_s - begin.loaded_s)
            rates[rank] = (spent[0] / steps, spent[1] / steps, spent[2] / steps)
        window = Window(
            steps=min(mark.step - self._begin[rank].step for rank, mark in self._newest.items()),
            step_s=median(rate[0] for rate in rates.values()),
            waits={rank: rate[1] for rank, rate in rates.items()},
            loads={rank: rate[2] for rank, rate in rates.items()},
            disturbed=self._disturbed or self._first,
        )
        self._begin, self._ready, self._disturbed, self._first = self._newest, set(), False, False
        self._newest = {}
        return window

    def _speed(self, window: Window) -> list[Finding]:
        usual = median(self._usual) if len(self._usual) >= LEARN else 0.0
        self._slow = self._slow + 1 if usual and window.step_s > SLOW * usual else 0
        if not self._slow:
            self._usual.append(window.step_s)
        text = f"a step takes {window.step_s:.3f} s, {usual:.3f} s before"
        over = window.step_s <= SLOW_OVER * usual
        return self._episode("throughput-drop", self._slow >= WINDOWS, over=over, rank=-1, text=text)

    def _data(self, window: Window) -> list[Finding]:
        rank = max(window.loads, key=lambda r: (window.loads[r], -r))
        share = window.loads[rank] / window.step_s if window.step_s > 0 else 0.0
        self._starved = self._starved + 1 if share >= STARVED else 0
        text = f"rank {rank} spends {share * 100:.0f} % of a step of {window.step_s:.3f} s before its first forward, mostly for data"
        return self._episode("data-stall", self._starved >= WINDOWS, over=share < STARVED_OVER, rank=rank, text=text)

    def _episode(self, kind: str, found: bool, *, over: bool, rank: int, text: str) -> list[Finding]:  # noqa: FBT001  the fact itself
        told = self._told.get(kind)
        if found and told is None:
            self._told[kind] = Finding(seq=0, kind=kind, rank=rank, layer="training", class_="ignore", text=text)
            return [self._told[kind]]
        if told is not None and over:
            del self._told[kind]
            return [Finding(seq=0, kind=kind, rank=told.rank, layer="training", class_="ignore", text=f"over: {text}", clears=True)]
        return []
