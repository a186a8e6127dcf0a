"""Sieve: what is told of all that the probes see.

Think of a good secretary: the same call twice is one note with "2x" on it, a caller who rings all day is put through ever more rarely, the
fire brigade always is, and at the end of a mad minute there is a line "812 others rang".

Contract: pure. Two findings are the same if kind, device, code and rank are. `take` gives those to be told now; each carries in `count`
how many like it have been seen since it was told last. Of class "ignore" none is told: they are counted.
- What happens (the usual case): told at once, then after 5, 10, 20 ... 600 s, if it goes on; at once where it has become worse.
- What lasts (a probe with `lasting = True`): told once, again each 600 s, and with `clears=True` when its probe no longer gives it.
- A clearing finding always is told, and closes what the same kind and device have open.
A kind may be told 20 times at once and once a second for long, so that a flood of consequences leaves room for their cause, whose
kind is another; what is held back is told as one number.

Numbers: 1000 open findings of 1 KiB are 1 MiB, the most that is ever held.
Rejected: one limit for all kinds (the flood comes first, the cause is lost); grouping here by time (the court of the run does it, with the
whole fleet before its eyes).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NamedTuple

from msgspec.structs import replace

from resilient.core.messages import Finding

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

AGAIN_S: Final = 5.0  # the first silence after a finding; each is twice the one before
REMIND_S: Final = 600.0  # the longest; a finding that recovers stays told for 10 min (gpud, sticky window)
FORGET_S: Final = 7200.0  # an event of a node counts as the matter now for two hours (Azure looks back as far at a job's start)
OPEN_MAX: Final = 1000
KIND_BURST: Final = 20  # a node has 8 to 16 devices of a kind
KIND_PER_S: Final = 1.0
TEXT_MAX: Final = 4096
LAYER: Final = "probe"  # of what is said about the probes themselves: told whatever its class
WORSE: Final = ("", "ignore", "user", "app-restart", "gpu-reset", "replace", "cordon")
NODE: Final = frozenset({"gpu-reset", "replace", "cordon"})  # what the next user of a node should know, too


class Key(NamedTuple):
    """What makes two findings the same."""

    kind: str
    device: str
    code: str
    rank: int


@dataclass(slots=True)
class _Open:
    finding: Finding  # the newest
    probe: str
    lasting: bool
    seen: float
    told: float | None = None  # None: held back
    gap_s: float = AGAIN_S
    pending: int = 0  # seen and not told


class Sieve:
    """One per prober. Not thread-safe."""

    def __init__(self) -> None:
        """Nothing is open."""
        self._open: dict[Key, _Open] = {}
        self._tokens: dict[str, tuple[float, float]] = {}  # kind -> (left, when)
        self._held: Counter[str] = Counter()
        self.counts: Counter[tuple[str, str, str]] = Counter()  # (probe, kind, class) -> seen

    def take(self, probe: str, findings: Sequence[Finding], now: float, *, lasting: bool = False) -> list[Finding]:
        """Take what one check gave; give what is to be told of it. lasting: it is all that is the matter now."""
        told: list[Finding] = []
        for found in findings:
            finding = replace(found, probe=found.probe or probe, seq=0, t=found.t or now, text=found.text[:TEXT_MAX])
            self.counts[finding.probe, finding.kind, finding.class_] += finding.count
            if finding.clears:
                told += self._clear(finding, now)
            elif finding.class_ != "ignore" or finding.layer == LAYER:
                told += self._see(probe, finding, now, lasting=lasting)
        if lasting:
            told += self._over(probe, {_key(found) for found in findings}, now)
        return told

    def held(self, now: float) -> list[Finding]:
        """What was held back since the last call, as at most one finding."""
        if not self._held:
            return []
        kinds = ", ".join(f"{kind} ({count})" for kind, count in self._held.most_common(8))
        count = self._held.total()
        self._held.clear()
        text = f"{count} further findings were not told one by one: {kinds}"
        return [Finding(seq=0, kind="findings-held", layer=LAYER, class_="ignore", role="context", t=now, count=count, text=text)]

    def matters(self, now: float) -> list[Finding]:
        """What a newcomer should know: what lasts, and what has happened to the node and was not cleared."""
        return [
            entry.finding
            for entry in self._open.values()
            if entry.told is not None and (entry.lasting or (entry.finding.class_ in NODE and now - entry.seen < FORGET_S))
        ]

    # ------------------------------------------------------------------

    def _see(self, probe: str, finding: Finding, now: float, *, lasting: bool) -> list[Finding]:
        key = _key(finding)
        entry = self._open.get(key)
        if entry is None:
            self._make_room(now)
            entry = self._open[key] = _Open(finding=finding, probe=probe, lasting=lasting, seen=now)
        worse = WORSE.index(finding.class_) > WORSE.index(entry.finding.class_)
        long_ago = entry.told is None or now - entry.told >= (REMIND_S if lasting else entry.gap_s)
        entry.finding, entry.seen = finding, now
        entry.pending = finding.count if lasting else entry.pending + finding.count
        if not (worse or long_ago) or not self._room(finding.kind, now):
            return []
        entry.gap_s = AGAIN_S if entry.told is None or worse else min(2 * entry.gap_s, REMIND_S)
        count, entry.told, entry.pending = max(1, entry.pending), now, 0
        return [replace(finding, count=count)]

    def _clear(self, finding: Finding, now: float) -> list[Finding]:
        closed = [key for key in self._open if key.kind == finding.kind and key.device == finding.device]
        for key in closed:
            del self._open[key]
        return [finding] if closed or self._room(finding.kind, now) else []

    def _over(self, probe: str, still: set[Key], now: float) -> list[Finding]:
        """What this probe's last check did not give any more."""
        over = [key for key, entry in self._open.items() if entry.probe == probe and entry.lasting and key not in still]
        told = []
        for key in over:
            entry = self._open.pop(key)
            if entry.told is not None:
                was = entry.finding
                told.append(replace(was, class_="ignore", role="context", clears=True, t=now, count=1, text=f"over: {was.text}"))
        return told

    def _room(self, kind: str, now: float) -> bool:
        """Whether one more of this kind may be told; counts it where not."""
        left, when = self._tokens.get(kind, (float(KIND_BURST), now))
        left = min(float(KIND_BURST), left + (now - when) * KIND_PER_S)
        if left < 1.0 or (kind not in self._tokens and len(self._tokens) >= OPEN_MAX):
            self._held[kind if kind in self._tokens else "other"] += 1
            if kind in self._tokens:
                self._tokens[kind] = (left, now)
            return False
        self._tokens[kind] = (left - 1.0, now)
        return True

    def _make_room(self, now: float) -> None:
        if len(self._open) < OPEN_MAX:
            return
        for key in [k for k, e in self._open.items() if not e.lasting and now - e.seen > FORGET_S]:
            del self._open[key]
        while len(self._open) >= OPEN_MAX:
            del self._open[next(iter(self._open))]  # the oldest


def folded(findings: Iterable[Finding]) -> list[Finding]:
    """Those that are the same as one, with their number, so that thousands of one kind leave room for what stands behind them."""
    out: list[Finding] = []
    places: dict[tuple[Key, str], int] = {}
    for finding in findings:
        place = places.setdefault((_key(finding), finding.class_), len(out))
        if finding.clears:
            places.clear()  # what comes again after it is new
            out.append(finding)
        elif place < len(out):
            out[place] = replace(out[place], count=out[place].count + finding.count)
        else:
            out.append(finding)
    return out


def _key(finding: Finding) -> Key:
    return Key(finding.kind, finding.device, finding.code, finding.rank)
