"""Clock: jumps of the time of day.

Contract: compares CLOCK_REALTIME with CLOCK_MONOTONIC, which does not jump. A jump is counted and told in its text; it is nobody's fault,
and explains tokens that are refused, leases that are over and lines in the wrong order. A machine that was suspended jumps, too.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from resilient.core.messages import Finding
from resilient_agents.probes import limits

if TYPE_CHECKING:
    from resilient_agents.probe import Surroundings


def jumped(before: float, after: float) -> Finding | None:
    """What it means that the two clocks differed by `before` and now differ by `after` seconds."""
    step = after - before
    if abs(step) < limits.CLOCK_JUMP_S.value:
        return None
    text = f"the time of day went {'forward' if step > 0 else 'back'} by {abs(step):.1f} s"
    return Finding(seq=0, kind="clock", layer="host-cpu", code="jump", class_="ignore", role="context", text=text)


class Clock:
    """This node's."""

    name = "clock"
    period_s = 5.0

    def __init__(self, surroundings: Surroundings) -> None:
        """Nothing of the host is read."""
        del surroundings
        self._before = time.time() - time.monotonic()

    def check(self, now: float) -> list[Finding]:
        """Whether it jumped since the last call."""
        del now
        before, self._before = self._before, time.time() - time.monotonic()
        found = jumped(before, self._before)
        return [found] if found is not None else []
