"""Grouping: one cause and its hundreds of consequences are one incident.

Think of a motorway pile-up: the police count forty damaged cars and write one report, about the lorry that lost its load; who braked, who
swerved and who merely stopped stands in the appendix.

Contract: `incidents(sightings)` is pure and gives incidents in order of time. Sightings of one clock less than `window_s` apart belong
together; those without a time go by their order. What cleared itself is not an incident. The cause is a finding of role "cause"; of
several, the one nearest to the hardware (NEAREST), the graver, the first. Another on another device stays in the incident as `also`. The
same cause on SHARED nodes or more is shared infrastructure: nobody's node is to blame.
Rejected: a dependency graph of kinds (nobody could say where its edges come from; time and layer do as well on what there is to test).
"""

from __future__ import annotations

import calendar
import datetime as dt
from collections import Counter
from collections.abc import Iterable
from typing import Final

import msgspec

from resilient.core.messages import Finding, Msg
from resilient_agents.diagnosis.text import is_fault

WINDOW_S: Final = 120.0  # a watchdog may tell of a hang half a minute late; a new incident rarely comes sooner
SHARED: Final = 3
NEAREST: Final = (  # what lies below breaks what lies above
    ("gpu", "npu", "driver", "host-mem", "host-cpu", "node"),
    ("pcie", "nvlink", "nvswitch"),  # a road complains of what has fallen off its end
    ("nic", "storage", "fs", "nfs"),
    ("cuda", "process", "training"),
    ("nccl", "torch"),
)
DEPTH: Final = {layer: depth for depth, layers in enumerate(NEAREST) for layer in layers}
GRAVITY: Final = ("replace", "gpu-reset", "cordon", "app-restart")  # a port that is down tells more than its cable that was pulled
YEAR_S: Final = 366 * 86400.0
EVIDENCE: Final = 8


class Sighting(Msg):
    """A finding, and where it was seen."""

    finding: Finding
    node: str = ""
    t: float | None = None  # seconds, of the clock named
    clock: str = ""  # "wall", "boot" (of its node), "" = none
    place: int = 0  # order in which it was read
    source: str = ""  # file:line


class Incident(Msg):
    """What happened once."""

    cause: Sighting
    verdict: str  # one of the classes
    culprit: str  # device, and node where known
    shared: tuple[str, ...] = ()  # nodes that all have this cause
    also: tuple[Sighting, ...] = ()  # further causes, elsewhere
    consequences: tuple[tuple[str, int], ...] = ()  # kind, and how many of it
    evidence: tuple[Sighting, ...] = ()
    begin: float | None = None
    end: float | None = None
    clock: str = ""
    count: int = 0


def incidents(sightings: Iterable[Sighting], window_s: float = WINDOW_S) -> list[Incident]:
    """Everything that was seen, as incidents."""
    told = [it for it in _uncleared(_dated(list(sightings))) if is_fault(it.finding) or it.finding.class_ == "user" or _echo(it)]
    clusters: list[list[Sighting]] = []
    for clock in sorted({_clock(it) for it in told}):
        clusters += _clusters([it for it in told if _clock(it) == clock], window_s)
    found = [incident for cluster in _joined(clusters) if (incident := _incident(cluster)) is not None]
    return sorted(found, key=lambda it: (it.clock, it.begin or 0.0, it.cause.place))


def _dated(sightings: list[Sighting]) -> list[Sighting]:
    """Syslog does not say the year (peel.py: 1970): it is the one that is nearest to the dates that others say in full."""
    full = sorted(it.t for it in sightings if it.clock == "wall" and it.t is not None and it.t >= YEAR_S)
    if not full:
        return sightings
    usual, out = full[len(full) // 2], []
    for it in sightings:
        if it.clock == "wall" and it.t is not None and it.t < YEAR_S:
            clock = dt.datetime.fromtimestamp(it.t, dt.UTC)
            year = dt.datetime.fromtimestamp(usual, dt.UTC).year
            when = [
                clock.replace(year=y).timestamp()
                for y in (year - 1, year, year + 1)
                if (clock.month, clock.day) != (2, 29) or calendar.isleap(y)
            ]
            it = msgspec.structs.replace(it, t=min(when, key=lambda t: abs(t - usual), default=it.t))  # noqa: PLW2901
        out.append(it)
    return out


def _echo(it: Sighting) -> bool:
    return it.finding.role == "cascade" and bool(it.finding.kind)


def _clock(it: Sighting) -> str:
    return f"boot of {it.node}" if it.clock == "boot" else it.clock


def _uncleared(sightings: list[Sighting]) -> list[Sighting]:
    """Without what was said to be over later on, and without the saying."""
    out: dict[int, Sighting] = {}
    faults: dict[tuple[str, str], dict[str, list[int]]] = {}  # (kind, node) -> device -> places in `out`
    for place, it in enumerate(sightings):
        of_devices = faults.setdefault((it.finding.kind, it.node), {})
        if not it.finding.clears:
            out[place] = it
            if is_fault(it.finding):
                of_devices.setdefault(it.finding.device, []).append(place)
            continue
        for device in [it.finding.device] if it.finding.device else list(of_devices):
            for old in of_devices.pop(device, ()):
                del out[old]
    return list(out.values())


def _clusters(sightings: list[Sighting], window_s: float) -> list[list[Sighting]]:
    ordered = sorted(sightings, key=lambda it: (it.t if it.t is not None else 0.0, it.place))
    clusters: list[list[Sighting]] = []
    for it in ordered:
        last = clusters[-1][-1] if clusters else None
        if last is None or (it.t is not None and last.t is not None and it.t - last.t > window_s):
            clusters.append([])
        clusters[-1].append(it)
    return clusters


def _joined(clusters: list[list[Sighting]]) -> list[list[Sighting]]:
    """Clocks that cannot be compared: where each tells of one cluster alone, it is the same one."""
    by_clock: dict[str, list[list[Sighting]]] = {}
    for cluster in clusters:
        by_clock.setdefault(_clock(cluster[0]), []).append(cluster)
    if len(by_clock) > 1 and all(len(of_one) == 1 for of_one in by_clock.values()):
        return [[it for of_one in by_clock.values() for it in of_one[0]]]
    return clusters


def _incident(cluster: list[Sighting]) -> Incident | None:
    speaking = [it for it in cluster if it.finding.class_ != "ignore"]
    if not speaking:
        return None
    cause = min(speaking, key=_rank)
    fault = is_fault(cause.finding)
    others = [it for it in speaking if it is not cause and it.finding.role == "cause" and is_fault(it.finding) and fault]
    shared = sorted({it.node for it in [cause, *others] if it.node and _kind(it) == _kind(cause)})
    also: dict[tuple[str, str, str], Sighting] = {}
    for it in others:
        key = (_kind(it), it.finding.device, it.node)
        if key != (_kind(cause), cause.finding.device, cause.node):
            also.setdefault(key, it)
    rest = Counter(it.finding.kind for it in cluster if it is not cause)
    evidence: dict[tuple[str, str, str], Sighting] = {}
    for it in sorted(speaking, key=_rank):
        evidence.setdefault((it.finding.kind, it.finding.code, it.node), it)
    times = [it.t for it in cluster if it.t is not None and _clock(it) == _clock(cause)]
    common = len(shared) >= SHARED
    return Incident(
        cause=cause,
        verdict=cause.finding.class_,
        culprit="" if common else _culprit(cause),
        shared=tuple(shared) if common else (),
        also=tuple(also.values())[:EVIDENCE],
        consequences=tuple(rest.most_common()),
        evidence=tuple(evidence.values())[:EVIDENCE],
        begin=min(times, default=None),
        end=max(times, default=None),
        clock=cause.clock,
        count=len(cluster),
    )


def _kind(it: Sighting) -> str:
    return f"{it.finding.kind} {it.finding.code}".strip()


def _rank(it: Sighting) -> tuple[int, int, int, float, int]:
    """The smallest is the cause: machines before users before echoes, low layers before high ones, the graver, then the first."""
    finding = it.finding
    if is_fault(finding) and finding.role == "cause":
        kind = 0
    elif finding.class_ == "user":
        kind = 1
    else:
        kind = {"symptom": 2, "context": 3, "cascade": 4}.get(finding.role, 2)
    depth = DEPTH.get(finding.layer, len(NEAREST)) if kind == 0 else 0
    grave = GRAVITY.index(finding.class_) if kind == 0 and finding.class_ in GRAVITY else len(GRAVITY)
    return kind, depth, grave, it.t if it.t is not None else 0.0, it.place


def _culprit(cause: Sighting) -> str:
    device = cause.finding.device
    if device and cause.node:
        return f"{device} on {cause.node}"
    return device or cause.node
