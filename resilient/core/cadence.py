"""Cadence: how often a checkpoint is worth what it costs, and which step is the next.

Think of somebody who writes a long letter and copies it out now and then: too often and the copying takes the day, too seldom and a
spilled cup takes a week. How often depends on what one copy costs and on how often cups are spilled, and both are learned on the way.

Contract: `interval_s` is pure: the seconds between two checkpoints for which what they cost, and the work that a failure is expected to
undo, are least together (Young, "A first order approximation to the optimum checkpoint interval", CACM 17(9), 1974: sqrt(2 cost MTBF);
Daly, "A higher order estimate of the optimum checkpoint interval for restart dumps", FGCS 22(3), 2006: two terms more), held within a
budget. It is monotone in each argument and finite for all.
`Cadence` is the coordinator's: it is given what rank 0's node says of its pace (all ranks keep step), what is committed and what failed,
and names the step that is to be sealed next. A checkpoint is committed, or given up, before the next one is named. The name is a wish:
the workers' vote makes it one step on all ranks (train/loop.py), be it that one or, where nobody heard of it in time, the first after it.
Cost of one = what its seal stalled rank 0, plus what the steps until its commit took above undisturbed ones. Medians: an evaluation in
the middle of one is not the price of all.
What counts as a failure: a node lost, or a return to the persistent tier. A killed process does not: its state outlives it in memory.
Rejected: the mean of all step times (one evaluation would be spread over all); a cost measured by the worker alone (it does not know when
storage is done); counting every incident (a flaky process would make checkpoints frequent that nobody would ever read).
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from typing import Final

from resilient.core.lines import CheckpointStatus
from resilient.core.messages import NONE, Pace

DAY_S: Final = 86400.0
# 419 unexpected interruptions of 2,048 nodes in 54 days (Llama 3 405B, arXiv:2407.21783). Others: 2.3e-3 (arXiv:2602.00277, 32K GPUs),
# 6.5e-3 and 2.34e-3 (RSC-1 and RSC-2, arXiv:2410.21680). It weighs as much as one failure seen in this run.
FAILURES_PER_NODE_DAY: Final = 0.0038
LONGEST_S: Final = 3600.0  # an hour is as much as anybody likes to lose; one checkpoint in it costs next to nothing
COST_STEPS_MIN: Final = 0.01  # of a step: what seems to cost less cannot be told from noise
FIRST_STEPS, FIRST_S = 20, 5.0  # of undisturbed steps before the first checkpoint: it shows early what one costs, and that storage works
WINDOWS: Final = 31  # of undisturbed steps, one per report: their median is the step time
COSTS: Final = 9  # newest checkpoints, whose median is the cost
HEARD_S: Final = 1.0  # until every agent has heard of a named step: one interval between reports, should the first word be lost
GIVE_UP_S: Final = 600.0  # a checkpoint that is not committed after this long, or twice the longest so far, is not waited for
GIVE_UP_BROKEN_S: Final = 10.0  # the same for one that a fault fell into: it may lack a rank


def interval_s(cost_s: float, mtbf_s: float, budget: float) -> float:
    """Seconds from one checkpoint to the next. budget: the share of the time that they may cost.

    Daly's form holds for a cost below twice the mean time between failures; a greater one counts as that.
    """
    half = min(cost_s, 2.0 * mtbf_s) / (2.0 * mtbf_s)
    best = 2.0 * mtbf_s * (math.sqrt(half) * (1.0 + math.sqrt(half) / 3.0 + half / 9.0) - half)
    return max(min(best, LONGEST_S), cost_s / budget)


def mtbf_s(nodes: int, failures: int, seconds: float) -> float:
    """Mean time between failures of `nodes` nodes that have run for `seconds` and seen `failures`."""
    prior = DAY_S / (FAILURES_PER_NODE_DAY * max(nodes, 1))
    return (prior + max(seconds, 0.0)) / (1 + failures)


@dataclass(slots=True)
class _Flight:
    """A checkpoint that is sealed and not yet committed."""

    step: int
    at_s: float  # when it was sealed, by the clock of rank 0's node
    stall_s: float
    since: float  # coordinator's clock
    done: bool = False
    whole: bool = True  # no fault fell into it


class Cadence:
    """See the module's text."""

    def __init__(self, *, every: int, auto: bool, budget: float) -> None:
        """every: the fixed interval in steps, 0 = none; auto: it is chosen here instead."""
        self.named = NONE  # what the assignments say
        self.committed = NONE
        self._fixed, self._auto, self._budget = every, auto, budget
        self._failures = 0
        self._asked = False  # and not named yet
        self._asked_for = NONE  # named because somebody asked, and not committed yet
        self._pace: Pace | None = None  # newest, of the round in force
        self._heard = 0.0  # when; coordinator's clock, as all that follows
        self._began: float | None = None
        self._windows: deque[float] = deque(maxlen=WINDOWS)
        self._quiet_steps, self._quiet_s = 0, 0.0
        self._costs: deque[tuple[float, float]] = deque(maxlen=COSTS)  # (stall, slow-down) of each
        self._flight: _Flight | None = None
        self._longest_s = 0.0  # from a seal to its commit

    # ------------------------------------------------------------------ what is seen

    def take(self, pace: Pace, nodes: int, now: float) -> None:
        """Rank 0's node said how far it is."""
        self._began = now if self._began is None else self._began
        last = self._pace
        if last is not None and pace.step < last.step:
            self.disturbed()
            last = None
        if last is None:
            self._pace, self._heard = pace, now
            self._begin_again(pace, now)
        elif pace.step > last.step:
            self._pace, self._heard = pace, now
            self._measure(last, pace, now)
        flight = self._flight
        if flight is not None:
            patience_s = max(GIVE_UP_S if flight.whole else GIVE_UP_BROKEN_S, 2 * self._longest_s)
            if (flight.done and not flight.whole) or now - flight.since > patience_s:
                self._flight = None
                self._asked = self._asked or self._asked_for != NONE
        self._name(nodes, now)

    def _begin_again(self, pace: Pace, now: float) -> None:
        """The first word after a fault. What was named and is passed was sealed, or is lost; who came in new does not know of it."""
        if self._flight is not None:
            self._flight.since, self._flight.whole = now, False
        elif self.committed < self.named <= pace.step:
            self._flight = _Flight(self.named, pace.at_s, 0.0, now, whole=False)
        if self.named <= pace.step:
            self.named = NONE

    def _measure(self, last: Pace, pace: Pace, now: float) -> None:
        """What came between two reports: undisturbed steps, a seal, steps beside a write."""
        if pace.sealed not in (NONE, last.sealed):
            self._quiet(pace.sealed - last.step, pace.sealed_s - last.at_s - pace.stall_s)
            self._flight = _Flight(pace.sealed, pace.sealed_s, pace.stall_s, now, done=self.committed >= pace.sealed)
        elif self._flight is None:
            self._quiet(pace.step - last.step, pace.at_s - last.at_s)
        flight = self._flight
        if flight is not None and flight.whole and flight.done and pace.step > flight.step:
            slow_s = pace.at_s - flight.at_s - (pace.step - flight.step) * self._step_s()
            self._costs.append((flight.stall_s, slow_s))
            self._flight = None

    def _quiet(self, steps: int, seconds: float) -> None:
        if self._flight is None and steps > 0 and seconds > 0.0:
            self._windows.append(seconds / steps)
            self._quiet_steps += steps
            self._quiet_s += seconds

    def marked(self, step: int, now: float) -> None:
        """`step` was committed."""
        self.committed = max(self.committed, step)
        self._asked_for = NONE if step >= self._asked_for else self._asked_for
        if self._flight is not None and step >= self._flight.step:
            self._flight.done = True
            self._longest_s = max(self._longest_s, now - self._flight.since)

    def disturbed(self) -> None:
        """The round broke: what was being measured is worth nothing, and what was being written may lack a rank."""
        self._pace = None

    def failed(self) -> None:
        """Something was lost that memory does not survive."""
        self._failures += 1
        if self._auto:
            self.named, self._asked = NONE, self._asked or self._asked_for != NONE  # so long an interval is not called for any more

    def ask(self, nodes: int, now: float) -> None:
        """Somebody sees trouble coming, or wants one now."""
        self._asked = True
        self._name(nodes, now)

    # ------------------------------------------------------------------ what follows

    def _name(self, nodes: int, now: float) -> None:
        pace = self._pace
        step_s = self._step_s()
        if pace is None or pace.step <= 0 or step_s <= 0.0:
            return
        soon = pace.step + 1 + math.ceil((HEARD_S + now - self._heard) / step_s)
        waiting = self.named > pace.sealed
        if self._asked:
            self._asked = False
            self.named = self._asked_for = min(self.named, soon) if waiting else soon
        elif self._auto and not waiting and self._flight is None:
            if self._costs:
                self.named = max(max(self.committed, pace.sealed) + self._every(nodes, now), soon)
            elif self._quiet_steps >= FIRST_STEPS and self._quiet_s >= FIRST_S:
                self.named = soon

    def _every(self, nodes: int, now: float) -> int:
        """Steps between two checkpoints, as it is best now."""
        step_s = self._step_s()
        cost_s = max(self._cost_s(), COST_STEPS_MIN * step_s)
        return max(1, math.ceil(interval_s(cost_s, self._mtbf_s(nodes, now), self._budget) / step_s))

    def _mtbf_s(self, nodes: int, now: float) -> float:
        return mtbf_s(nodes, self._failures, now - (now if self._began is None else self._began))

    def _step_s(self) -> float:
        """Of an undisturbed step; 0 = not known."""
        return _median(self._windows)

    def _cost_s(self) -> float:
        return max(0.0, _median([stall_s + slow_s for stall_s, slow_s in self._costs]))

    def status(self, nodes: int, now: float) -> CheckpointStatus:
        """What status.json says."""
        every = self._fixed
        if self._auto:
            every = self._every(nodes, now) if self._costs else 0
        return CheckpointStatus(
            every=every,
            auto=self._auto,
            next=self.named,
            committed=self.committed,
            cost_s=round(self._cost_s(), 4) if self._costs else None,
            stall_s=round(_median([stall_s for stall_s, _ in self._costs]), 4) if self._costs else None,
            step_s=round(self._step_s(), 4),
            failures=self._failures,
            failures_per_day=round(DAY_S / self._mtbf_s(nodes, now), 6),
        )


def _median(values: deque[float] | list[float]) -> float:
    """0 of nothing."""
    return sorted(values)[len(values) // 2] if values else 0.0
