"""Triage: what is made of one finding of a probe, before anybody is moved for it.

Think of the nurse at the door with three books: the orders (rules.py), the day's log of who came in with what (cause.py), and the list of
wards that are closed (cordon.py). She never operates: the coordinator does, when somebody has to move and there is a bed elsewhere.

Contract: `take` gives the verdict on a finding; `failed` is told of every worker that fails and says what explains it. What each class
comes to:
- only role "cause" can move anybody; a symptom, a detail or a cascade is at most watched;
- "user" and "ignore" never touch a node, whatever a rule says;
- `evict` and `cordon` are wishes (cordon.py): at once where the probe's word is proof; where it only repeats what a worker wrote of its own
  node, together with a failure of that worker that a machine may have caused; never where so many nodes have the same at once
  that it is shared;
- a recovery lifts what the same kind and device had asked for.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

import msgspec

from resilient.core.cause import SEEN_MAX, Casebook, Failure, Seen
from resilient.core.cordon import Closed, Cordons, Wish
from resilient.core.fleet import Node
from resilient.core.messages import NONE, Finding, VerdictName
from resilient.core.placement import Place
from resilient.core.policy import OPEN, Verdict
from resilient.core.repeats import STRIKES_MAX, Strike, whose
from resilient.core.rules import Book, Rule, Rules, Ruling

MOVES: Final = ("evict", "cordon")
TALLY_MAX: Final = 4096  # devices that are counted
ADDRESSES_S: Final = 1.0  # in a storm thousands name a peer, and the fleet is not gone through for each
PARTS_MAX: Final = 16  # of a device's name that are looked up among all nodes
DIGITS_MAX: Final = 10


@dataclass(slots=True)
class Taken:
    """One finding, judged."""

    finding: Finding
    verdict: Verdict
    node: str  # that it is about
    told: bool  # it is new: told to the world; else only counted
    seen: Seen | None = None  # it may be a cause, and was not known to be
    shared: Finding | None = None  # and this is to be told besides
    opened: list[Closed] = field(default_factory=list)  # nodes that take newcomers again


class Triage:
    """See the head of this file."""

    def __init__(self, rules: Rules, run: str) -> None:
        """Nothing was seen yet."""
        self.book, self.casebook, self.cordons = Book(rules), Casebook(rules.limits), Cordons(rules.limits)
        self._run = run
        self._addresses: dict[str, str] = {}
        self._looked_up, self._known = -math.inf, 0
        self._tally: dict[tuple[str, str, str, str], deque[tuple[float, int]]] = {}  # (rule, node, kind, device) -> (when, how many)
        self._strikes: deque[Strike] = deque(maxlen=STRIKES_MAX)
        self._witnesses: deque[tuple[float, Failure, str]] = deque(maxlen=SEEN_MAX)  # failures that may bear out what a worker wrote
        self._heard: deque[tuple[Seen, frozenset[int] | None]] = deque(maxlen=64)  # hearsay that waits for a failure

    def take(self, finding: Finding, node: str, now: float, nodes: Mapping[str, Node], places: Mapping[int, Place], alive: int) -> Taken:
        """What a probe of `node` saw. alive: how many nodes live."""
        seer = node
        if "peer:" in finding.device and (now - self._looked_up >= ADDRESSES_S or len(nodes) != self._known):
            self._addresses, self._looked_up, self._known = addresses(nodes), now, len(nodes)
        node, finding = about(finding, node, self._addresses, places)
        told = self.casebook.news(finding, node, now)
        ruling = self.book.ruling(finding)
        if finding.clears:
            self._heard = deque((h for h in self._heard if not _clears(finding, node, h[0])), maxlen=self._heard.maxlen)
            opened = self.cordons.lift(node, finding.kind, finding.device, proof=ruling.proof)
            why = f"it is over{': the node takes newcomers again' if opened else ''}"
            return Taken(finding, Verdict(verdict="ignore", why=why), node, told or bool(opened), opened=opened)
        verdict = self._judge(finding, ruling, node, now, len(places))
        taken = Taken(finding, verdict, node, told)
        if finding.role == "cause" and ruling.class_ != "ignore":
            at = now - max(0.0, finding.age_s)
            taken.seen = seen = Seen(at, node, finding, ruling.class_, verdict.verdict, verdict.why, ruling.proof)
            if verdict.verdict in MOVES:
                self._wish(taken, ruling, now, alive, places, seer)
            taken.seen = seen if self.casebook.note(seen) else None
        return taken

    def _judge(self, finding: Finding, ruling: Ruling, node: str, now: float, world: int) -> Verdict:
        rule, class_, verdict = ruling.rule, ruling.class_, ruling.verdict
        word = f"class {class_ or 'unknown'}" + (f", rule {rule.name}" if rule.name else "")
        if finding.role != "cause":
            return Verdict(verdict="ignore" if class_ == "ignore" else "watch", why=f"{word}: a {finding.role}, not the cause")
        if rule.repeats and self._repeated(finding, ruling, node, now, world):
            repeated = self.book.verdict_of(rule.repeated)
            return Verdict(verdict=repeated, why=f"{word}: {rule.repeats} workers met it on this device, and none on another")
        if rule.threshold > 1 and (times := self._count(finding, rule, node, now)) < rule.threshold:
            within = f" within {rule.window_s:.0f} s" if rule.window_s else ""
            return Verdict(verdict="ignore" if verdict == "ignore" else "watch", why=f"{word}: {times} of {rule.threshold}{within}")
        return Verdict(verdict=verdict, why=word)

    def _repeated(self, finding: Finding, ruling: Ruling, node: str, now: float, world: int) -> bool:
        if not ruling.proof or not finding.device:
            return False
        device = f"{node} {finding.device}"
        self._strikes.append(Strike(device=device, job=self._run, worker=finding.worker, at_s=now, others=world > 1))
        return whose(self._strikes, device, now, needed=ruling.rule.repeats, within_s=ruling.rule.repeats_s) == "device"

    def _count(self, finding: Finding, rule: Rule, node: str, now: float) -> int:
        counts = self._tally.setdefault((rule.name, node, finding.kind, finding.device), deque(maxlen=rule.threshold))
        if len(self._tally) > TALLY_MAX:
            del self._tally[next(iter(self._tally))]
        counts.append((now, max(1, finding.count)))
        while rule.window_s and now - counts[0][0] > rule.window_s:
            counts.popleft()
        return sum(n for _, n in counts)

    def _wish(self, taken: Taken, ruling: Ruling, now: float, alive: int, places: Mapping[int, Place], seer: str) -> None:
        """Ask for the node to be closed, unless that has to wait or it is not the node's fault. seer: the node whose probe it was."""
        finding, node, seen = taken.finding, taken.node, taken.seen
        assert seen is not None
        if ruling.proof and (many := self.casebook.shared(finding, node, now, alive)):
            seen.shared, seen.verdict = True, "watch"
            text = f"{seen.name.split(' on ')[0]} on {many} of {alive} nodes within {self.book.limits.shared_window_s:.0f} s"
            taken.verdict = Verdict(verdict="watch", why=f"{taken.verdict.why}; {text}: shared, no node is to blame")
            taken.opened = self.cordons.pardon(finding.kind, finding.code)
            shared = Finding(
                seq=0, kind="shared", layer=finding.layer, code=finding.code, class_="ignore", text=text, probe="policy", count=many
            )
            if self.casebook.news(msgspec.structs.replace(shared, device=finding.kind), "", now):
                taken.shared = shared
            return
        if not ruling.proof and node != seer:
            why = f"{taken.verdict.why}; {seer} says so of {node}: a worker's word moves nobody else"
            seen.verdict, taken.verdict = "watch", Verdict(verdict="watch", why=why)
            return
        local = None
        if finding.ranks is not None:
            local = frozenset(places[r].local_rank for r in finding.ranks if r in places and places[r].node == node)
        if not ruling.proof and not any(
            _bears_out(seen, failure, worker) for at, failure, worker in self._witnesses if now - at <= self.book.limits.after_s
        ):
            self._heard.append((seen, local))
            why = f"{taken.verdict.why}; {finding.probe or 'it'} repeats what a worker wrote: that counts if the worker fails"
            seen.verdict, taken.verdict = "watch", Verdict(verdict="watch", why=why)
            return
        if self.cordons.wish(Wish(node, taken.verdict.verdict, seen, now, now + ruling.rule.hold_s, local)):
            taken.told = True
            if hold := ruling.rule.hold_s:
                taken.verdict = msgspec.structs.replace(taken.verdict, why=f"{taken.verdict.why}, if it lasts for {hold:g} s")

    def heed(self, finding: Finding, verdict: Verdict) -> Verdict:
        """What a rule says of something that the runtime itself saw, where it may."""
        if finding.kind not in OPEN:
            return verdict
        rule = self.book.ruling(finding).rule
        return verdict if rule.verdict is None else Verdict(verdict=rule.verdict, why=f"{verdict.why}; rule {rule.name}")

    def explain(self, failure: Failure, worker: str, now: float) -> Seen | None:
        """What explains that this worker fails now."""
        return self.casebook.explain(failure, worker, now)

    def failed(self, failure: Failure, now: float, *, worker: str = "", unrelated: bool = False) -> list[tuple[Seen, Verdict]]:
        """A worker failed: what it had written before counts now. unrelated: not of what a machine does, and its words are void."""
        self.casebook.failed(failure, now)
        if unrelated:
            self._heard = deque((h for h in self._heard if not _bears_out(h[0], failure, worker)), maxlen=self._heard.maxlen)
            return []
        self._witnesses.append((now, failure, worker))
        due: list[tuple[Seen, Verdict]] = []
        for item in list(self._heard):
            seen, local = item
            if now - seen.at > self.book.limits.before_s:
                self._heard.remove(item)
            elif _bears_out(seen, failure, worker):
                self._heard.remove(item)
                wanted: VerdictName = self.book.ruling(seen.finding).verdict
                seen.verdict = wanted
                if self.cordons.wish(Wish(seen.node, wanted, seen, now, now, local)):
                    due.append((seen, Verdict(verdict=wanted, why=f"rank {failure[1]} wrote of it, and has failed")))
        return due


def _bears_out(seen: Seen, failure: Failure, worker: str) -> bool:
    """Whether who wrote this is the one that failed; its successor is another one."""
    return seen.near((failure,)) > 0 and (not worker or seen.finding.worker in ("", worker))


def _clears(finding: Finding, node: str, seen: Seen) -> bool:
    return (seen.node, seen.finding.kind, seen.finding.device) == (node, finding.kind, finding.device)


def addresses(nodes: Mapping[str, Node]) -> dict[str, str]:
    """All that a node may be called -> its name; "" where several are called so."""
    found: dict[str, str] = {}
    for node in nodes.values():
        for word in {node.name, node.report.host, node.report.data_host} - {""}:
            found[word] = "" if found.get(word, node.name) != node.name else node.name
    return found


def about(finding: Finding, node: str, known: Mapping[str, str], places: Mapping[int, Place]) -> tuple[str, Finding]:
    """The node that a finding is about: a peer that it names, else the one whose probe saw it. known: see `addresses`."""
    for device in finding.device.split(",", PARTS_MAX)[:PARTS_MAX] if finding.role == "cause" else ():
        form, _, name = device.partition(":")
        if form != "peer" or not name:
            continue
        name = name.split("<")[0].strip("[]")
        if name.isdecimal() and len(name) < DIGITS_MAX:
            rank = int(name)
            if rank in places:
                return places[rank].node, msgspec.structs.replace(finding, ranks=(rank,), rank=rank, worker="", pid=0)
            continue
        host = name.rpartition(":")[0] if name.count(":") == 1 else name
        if found := known.get(host) or known.get(name):
            return found, finding if found == node else msgspec.structs.replace(finding, ranks=None, rank=NONE, worker="", pid=0)
    return node, finding
