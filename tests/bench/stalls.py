"""What a save cost, from the times of the bodies of all steps.

A stall is the time between two bodies, and what the second one had to wait before it could change the weights; of several ranks, until the
last one moves again. The slow-down is what bodies and the gaps between them cost from a save until it is safe, above undisturbed ones.
"""

from __future__ import annotations

import itertools
import statistics

Body = tuple[float, float, float]  # began, ended, waited: seconds


def together(ranks: list[list[Body]]) -> list[Body]:
    """A step of all ranks: from the last one's begin to the last one's end."""
    return [tuple(max(one[i] for one in step) for i in range(3)) for step in zip(*ranks, strict=True)]  # type: ignore[misc]


def gaps(bodies: list[Body]) -> list[float]:
    """Behind each body, until the next one begins."""
    return [after[0] - before[1] for before, after in itertools.pairwise(bodies)]


def sealed(snapshots: list[tuple[float, float]]) -> dict[int, float]:
    """Step -> seconds of the snapshot behind it; not every step needs one."""
    return {step: after[1] for step, (before, after) in enumerate(itertools.pairwise(snapshots), 1) if after[0] != before[0]}


def measured(engine: str, where: str, bodies: list[Body], safe: dict[int, float]) -> dict[str, object]:
    """One line of the table; `safe`: step (the first is 1) -> when."""
    blocked = gaps(bodies)
    lasting = [end - begin - waited for begin, end, waited in bodies[:-1]]
    windows = {step: (bodies[step - 1][1], at) for step, at in safe.items()}
    disturbed = [any(begin < to and end > from_ for from_, to in windows.values()) for begin, end, _ in bodies[:-1]]
    calm = [i for i in range(2, len(lasting)) if not disturbed[i]]
    body = statistics.median(lasting[i] for i in calm)
    gap = statistics.median(blocked[i] for i in calm if i + 1 not in safe)
    slow = sum(one - body for one, hit in zip(lasting, disturbed, strict=True) if hit)
    slow += sum(blocked[i] - gap for i in range(len(lasting)) if disturbed[i] and i + 1 not in safe)
    stalls = [blocked[step - 1] + bodies[step][2] for step in sorted(safe)]
    stall = statistics.median(stalls[1:] or stalls)
    return {
        "engine": engine,
        "where": where,
        "saves": len(safe),
        "first_stall_s": round(stalls[0], 3),
        "stall_s": round(stall, 3),
        "stall_max_s": round(max(stalls), 3),
        "slow_down_s": round(slow / len(safe), 3),
        "cost_s": round(stall + slow / len(safe), 3),
        "safe_s": round(statistics.median(to - from_ for from_, to in windows.values()), 3),
        "step_s": round(body, 3),
    }
