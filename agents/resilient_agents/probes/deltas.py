"""Deltas: how much a counter has grown, within a window of time.

Contract: pure. The first reading of a counter is its zero: what happened before is not news. One that falls (a driver was loaded again, a
cable was moved) begins anew and has grown by nothing. A window is kept as at most `POINTS` readings.
"""

from __future__ import annotations

from collections import deque
from typing import Final

POINTS: Final = 64


class Deltas:
    """Of any number of counters, by name."""

    def __init__(self, window_s: float) -> None:
        """Growth is told over the last `window_s` seconds."""
        self._window_s = window_s
        self._seen: dict[str, deque[tuple[float, int]]] = {}

    def grown(self, name: str, value: int, now: float, window_s: float | None = None) -> int:
        """Take a reading; give by how much the counter has grown within the window."""
        seen = self._seen.setdefault(name, deque(maxlen=POINTS))
        if seen and value < seen[-1][1]:
            seen.clear()
        window = self._window_s if window_s is None else window_s
        while len(seen) > 1 and now - seen[1][0] >= window:
            seen.popleft()
        if seen and seen[-1][1] == value and len(seen) > 1 and seen[-2][1] == value:
            seen[-1] = (now, value)  # a flat stretch is its two ends
        else:
            seen.append((now, value))
        return value - seen[0][1]

    def step(self, name: str, value: int, now: float) -> int:
        """Take a reading; give by how much it has grown since the last one."""
        seen = self._seen.get(name)
        last = seen[-1][1] if seen else value
        self.grown(name, value, now)
        return max(0, value - last)
