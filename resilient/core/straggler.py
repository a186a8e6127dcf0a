"""Straggler: who makes the others wait, step after step.

Think of a walking party that waits for its last member at every bench: nobody needs a watch to know who is slow, it is the one who never
sits. In a collective the fast wait for the slow. So whoever waits least is slow, and by how much it waits less than the others is how
much each step takes longer because of it. Only lengths of time are compared, each taken by one clock: no clocks are synchronised.

Contract: pure and deterministic. `scores` compares one window of steps. `Stragglers.take` is given one window after the other and answers
with findings of kind "straggler", once while it lasts, and with one that clears it. It names a rank when, in the median of three
windows in a row, the others wait longer than it by more than a fifth of a step, and by more than they differ among each other; where
that is so for all ranks of a node, it names the node. Never more than half of the ranks: then it is not they who are slow.
What counts is the time inside all collectives together. In its own tensor parallel group a slow rank keeps its neighbours waiting, and
with them everybody else: all wait for the same length, in one group or another, but the slow one.
Limits: a pipeline whose stages are unevenly cut has a slowest stage, and it is named. On nccl, the host hardly waits in collectives; what
it waits for is seen at the vote of each step only, that is after the last kernel, where all come late together.
Rejected: the time between two steps (equal on all ranks, for each waits for the slowest); time stamps of entering (need one clock for all).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterable, Mapping
from typing import Final

from resilient.core.messages import Finding, Msg

SHARE: Final = 0.2  # of a step, from which on it is worth telling
OVER: Final = 0.1  # and below which it is over
ALWAYS: Final = 0.15  # ... in each of the windows
SPREADS: Final = 5.0  # standard deviations of those who wait
DEVIATION: Final = 2.5  # of a normal distribution, in median absolute deviations of its upper half
WINDOWS: Final = 3  # in a row


class Window(Msg):
    """What happened in some steps, in seconds per step."""

    steps: int
    step_s: float
    waits: dict[int, float]  # rank -> inside collectives
    loads: dict[int, float]  # rank -> before its first forward
    disturbed: bool = False  # a section was open: nothing can be said


def median(values: Iterable[float]) -> float:
    """The middle one, or between the two; of at least one. Python's own drags in decimals and fractions."""
    ordered = sorted(values)
    half = len(ordered) // 2
    return ordered[half] if len(ordered) % 2 else (ordered[half - 1] + ordered[half]) / 2


def scores(waits: Mapping[int, float], step_s: float) -> dict[int, float]:
    """By what share of a step the others wait longer than each rank; 0 where that is within what they differ by."""
    if len(waits) < 2 or step_s <= 0:
        return dict.fromkeys(waits, 0.0)
    upper = sorted(waits.values())[len(waits) // 2 :]
    usual = median(upper)
    spread = DEVIATION * median(abs(value - usual) for value in upper)
    return {rank: (usual - value) / step_s if usual - value > SPREADS * spread else 0.0 for rank, value in waits.items()}


class Stragglers:
    """The last windows, and who was named."""

    def __init__(self) -> None:
        """Nothing was seen yet."""
        self.shares: dict[int, float] = {}  # rank -> share of a step that it waits, in the newest window
        self.scores: dict[int, float] = {}  # rank -> median of the last windows
        self._windows: deque[dict[int, float]] = deque(maxlen=WINDOWS)
        self._named: dict[tuple[int, ...], Finding] = {}

    def forget(self) -> None:
        """Another round: other people."""
        self._windows.clear()
        self.shares, self.scores, self._named = {}, {}, {}

    def take(self, window: Window, homes: Mapping[int, str]) -> list[Finding]:
        """One more window. homes: rank -> node."""
        if window.disturbed or window.step_s <= 0:
            return []
        self.shares = {rank: min(1.0, wait / window.step_s) for rank, wait in window.waits.items()}
        self._windows.append(scores(window.waits, window.step_s))
        if len(self._windows) < WINDOWS:
            return []
        self.scores = {rank: median(w.get(rank, 0.0) for w in self._windows) for rank in window.waits}
        told = [finding for ranks, finding in self._named.items() if max(self.scores.get(rank, 0.0) for rank in ranks) < OVER]
        self._named = {ranks: finding for ranks, finding in self._named.items() if finding not in told}
        found = [_cleared(finding) for finding in told]
        slow = {rank for rank, score in self.scores.items() if score >= SHARE and min(w.get(rank, 0.0) for w in self._windows) >= ALWAYS}
        if not slow or len(slow) > len(self.scores) // 2:
            return found
        for ranks, where in _together(slow, homes):
            if not any(set(ranks) <= set(named) for named in self._named):
                self._named[ranks] = finding = self._finding(ranks, where, window)
                found.append(finding)
        return found

    def _finding(self, ranks: tuple[int, ...], where: str, window: Window) -> Finding:
        score = median(self.scores[rank] for rank in ranks)
        who = f"node {where} (ranks {', '.join(map(str, ranks))})" if len(ranks) > 1 else f"rank {ranks[0]}"
        text = (
            f"{who}: the others wait {score * 100:.0f} % of a step of {window.step_s:.3f} s longer in collectives: it is slower than they"
        )
        device = ",".join(f"rank:{rank}" for rank in ranks)
        return Finding(seq=0, kind="straggler", rank=ranks[0], layer="training", class_="ignore", device=device, text=text)


def _cleared(finding: Finding) -> Finding:
    return Finding(
        seq=0,
        kind=finding.kind,
        rank=finding.rank,
        layer=finding.layer,
        class_="ignore",
        device=finding.device,
        text="waits as long as the others again",
        clears=True,
    )


def _together(slow: Collection[int], homes: Mapping[int, str]) -> list[tuple[tuple[int, ...], str]]:
    """Ranks one by one, or all of a node at once where there are several nodes and it has several ranks."""
    nodes: dict[str, list[int]] = {}
    for rank in sorted(homes):
        nodes.setdefault(homes[rank], []).append(rank)
    found: list[tuple[tuple[int, ...], str]] = []
    for node, ranks in sorted(nodes.items()):
        here = [rank for rank in ranks if rank in slow]
        if len(nodes) > 1 and len(ranks) > 1 and here == ranks:
            found.append((tuple(ranks), node))
        else:
            found += [((rank,), node) for rank in here]
    return found
