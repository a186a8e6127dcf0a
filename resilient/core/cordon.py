"""Cordon: which nodes take no newcomers, which ranks have to leave their device, and how fast that may be decided.

Think of a harbour master who closes quays. One leaking quay is closed at once; but if half the harbour reports leaks within a minute it is
the tide, or his instruments, and he closes nothing more until he knows.

Contract: a wish is what a verdict asks for (`cordon` or `evict`); `act` carries out those whose time has come, at the pace of Kubernetes'
node controller: so many a second per failure domain; slowly (in a small fleet not at all) where most of a domain is unhealthy; not at all
when all domains are. A node that is closed already is closed for another reason without waiting. An eviction outweighs a cordon for the
same device, whichever is asked for first. `lift` takes back what one finding had asked for; words never take back what a device had said.
An eviction is kept after it was carried out: `leaving` names whoever sits on the device, whenever that is asked.
Pure bookkeeping: who has room is for seating.py.
Rejected: one eviction at a time (a rack without power would take minutes a node); no limit (others' controllers emptied whole clusters
on the word of one broken probe).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from resilient.core.cause import Seen
from resilient.core.messages import Finding, VerdictName
from resilient.core.placement import Place
from resilient.core.rules import Limits

NEVER: Final = float("inf")
WISHES_MAX: Final = 4096
NODE_MAX: Final = 64  # of one node: more than it has devices

Key = tuple[str, str, str, str]  # node, kind, device, local ranks


@dataclass(slots=True)
class Wish:
    """What one finding asks for."""

    node: str
    verdict: VerdictName  # "cordon" | "evict"
    seen: Seen  # why
    since: float
    not_before: float
    local_ranks: frozenset[int] | None = None  # that sit on the device; None = the whole node

    @property
    def finding(self) -> Finding:
        """What was seen."""
        return self.seen.finding

    @property
    def key(self) -> Key:
        """What it is about."""
        return (self.node, self.finding.kind, self.finding.device, ",".join(map(str, sorted(self.local_ranks or ()))))

    def concerns(self, place: Place) -> bool:
        """Whether who sits there has to leave."""
        here = self.verdict == "evict" and place.node == self.node
        return here and (self.local_ranks is None or place.local_rank in self.local_ranks)


@dataclass(slots=True)
class Closed:
    """A node that is closed now and was not before, or the other way round."""

    node: str
    wish: Wish
    opened: bool = False


class Cordons:
    """See the head of this file."""

    def __init__(self, limits: Limits) -> None:
        """All nodes are open."""
        self._limits = limits
        self.wishes: dict[Key, Wish] = {}
        self.done: dict[Key, Wish] = {}
        self.nodes: frozenset[str] = frozenset()  # closed to newcomers
        self._next: dict[str, float] = {}  # failure domain -> when the next node of it may be closed
        self._due = NEVER

    def wish(self, wish: Wish) -> bool:
        """Ask for it; False if that, or more, was asked for before."""
        key = wish.key
        before = self.wishes.get(key) or self.done.get(key)
        if before is not None and (before.verdict == "evict" or wish.verdict == "cordon"):
            return False
        if len(self.wishes) >= WISHES_MAX or sum(other[0] == wish.node for other in (*self.wishes, *self.done)) >= NODE_MAX:
            return False
        self.wishes[key] = wish
        self._due = min(self._due, wish.not_before)
        return True

    def act(self, now: float, domains: Mapping[str, str]) -> list[Closed]:
        """Carry out what may be. domains: node that lives -> its failure domain."""
        if now < self._due:
            return []
        closed: list[Closed] = []
        sizes = Counter(domains.values())
        sick = Counter(domains[n] for n in (self.nodes | {w.node for w in self.wishes.values()}) & domains.keys())
        rates = {domain: self._rate(domain, sizes, sick) for domain in sizes}
        for wish in sorted(self.wishes.values(), key=lambda w: (w.verdict != "evict", w.not_before, w.key)):
            if now < wish.not_before or wish.node not in domains:
                continue
            if wish.node not in self.nodes:
                domain = domains[wish.node]
                if now < self._may(domain, rates[domain]):
                    continue
                self._next[domain] = now + 1.0 / rates[domain]
                closed.append(Closed(wish.node, wish))
                self.nodes |= {wish.node}
            del self.wishes[wish.key]
            self.done[wish.key] = wish
        here = [(w, domains[w.node]) for w in self.wishes.values() if w.node in domains]
        times = [max(w.not_before, self._may(domain, rates[domain])) for w, domain in here]
        self._due = min(times, default=NEVER)
        return closed

    def _rate(self, domain: str, sizes: Mapping[str, int], sick: Mapping[str, int]) -> float:
        """How many nodes of this domain may be closed in a second. sick: those that are closed, or should be."""
        s, size, here = self._limits, sizes[domain], sick[domain]
        if sum(sick.values()) == sum(sizes.values()):
            return 0.0
        if here < size and here >= s.unhealthy_nodes and here >= s.unhealthy_share * size:
            return s.reduced_per_s if size > s.large_nodes else 0.0
        return s.cordons_per_s

    def _may(self, domain: str, rate: float) -> float:
        """When the next node of this domain may be closed."""
        return self._next.get(domain, -NEVER) if rate > 0 else NEVER

    def changed(self) -> None:
        """The fleet has: what could not be done may be possible now."""
        if self.wishes:
            self._due = -NEVER

    def due(self) -> float:
        """When to `act` next."""
        return self._due

    def lift(self, node: str, kind: str, device: str, *, proof: bool = True) -> list[Closed]:
        """That is over: nodes that are open again. proof: who says so is believed by its word alone."""
        mine = set(device.split(","))
        every = [*self.wishes.items(), *self.done.items()]
        believed = [key for key, wish in every if key[:2] == (node, kind) and (proof or not wish.seen.proof)]
        return self._drop(key for key in believed if not device or not key[2] or mine & set(key[2].split(",")))

    def pardon(self, kind: str, code: str) -> list[Closed]:
        """It is shared infrastructure, no node's fault."""
        every = [*self.wishes.items(), *self.done.items()]
        return self._drop(key for key, wish in every if (wish.finding.kind, wish.finding.code) == (kind, code))

    def _drop(self, keys: Iterable[Key]) -> list[Closed]:
        dropped = [wish for key in list(keys) if (wish := self.wishes.pop(key, None) or self.done.pop(key, None)) is not None]
        before, self.nodes = self.nodes, frozenset(w.node for w in self.done.values())
        self.changed()
        return [Closed(w.node, w, opened=True) for w in {w.node: w for w in dropped}.values() if w.node in before - self.nodes]

    def broken(self) -> frozenset[str]:
        """Nodes with a device that somebody had to leave."""
        return frozenset(w.node for w in self.done.values() if w.verdict == "evict")

    def moving(self, place: Place) -> Wish:
        """Because of what somebody leaves this place."""
        return next(w for w in self.done.values() if w.concerns(place))

    def leaving(self, places: Mapping[int, Place]) -> dict[int, str]:
        """Ranks that sit on a device from which they should go, and why."""
        evictions: dict[str, list[Wish]] = {}
        for wish in self.done.values():
            if wish.verdict == "evict":
                evictions.setdefault(wish.node, []).append(wish)
        if not evictions:
            return {}
        found: dict[int, str] = {}
        for rank, place in places.items():
            for wish in evictions.get(place.node, ()):
                if wish.concerns(place):
                    found.setdefault(rank, f"{place.node} has {wish.seen.name}")
        return found
