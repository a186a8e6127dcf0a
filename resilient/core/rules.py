"""Rules: what the policy is made of, as data.

Think of a hospital's book of orders: the nurse reads the symptom, finds the page, and does what stands there. The book is printed
(resilient/policy.toml), each ward may paste its own slips over a line (--policy FILE), and nobody has to ask who wrote it: every line
names its source.

Contract: frozen structs without I/O; resilient/rulebook.py reads them and says what is wrong with a file. A rule names the findings that
it is for (`kind`, `layer`, `codes`, `probe`, `given`: those that are set must all fit) and what they mean (the rest). Of several that fit
the one that names most wins, of equals the later one. Without a rule a finding has the class that its probe gave it, and the class has
its verdict; a class that is not in the book is watched.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

import msgspec

from resilient.core.messages import Class, Finding, Msg, VerdictName

HARMLESS: Final = ("ignore", "watch", "halt")  # all that may become of what is the program's, or nobody's: no node is blamed for it


class Rule(Msg):
    """One line of the book."""

    name: str = ""
    # which findings
    kind: str = ""
    layer: str = ""
    codes: tuple[str, ...] = ()  # any of them
    probe: str = ""
    given: Class = ""  # the class that the probe gave
    # what they mean
    class_: Class = msgspec.field(default="", name="class")  # "" = as given
    verdict: VerdictName | None = None  # None = that of the class
    threshold: int = 1  # before so many of one node and device have come within `window_s` they are watched
    window_s: float = 0.0  # 0 = since the run began
    hold_s: float = 0.0  # wait so long for the same of other nodes, or a recovery, before anybody is moved
    repeats: int = 0  # so many workers that met this on one device, and none on another, make it the device's; 0 = never
    repeats_s: float = 86400.0  # within
    repeated: Class = "cordon"  # what it is then
    jobs: int = 0  # so many jobs of a node, one after the other, the same; 0 = never
    jobs_s: float = 604800.0  # within
    source: str = ""


class Limits(Msg):
    """How far is looked, and how fast nodes may be closed. Each default's reason is in resilient/policy.toml."""

    before_s: float = 30.0
    after_s: float = 30.0
    shared_nodes: int = 3
    shared_share: float = 0.2
    shared_window_s: float = 60.0
    cordons_per_s: float = 0.1
    reduced_per_s: float = 0.01
    unhealthy_nodes: int = 3
    unhealthy_share: float = 0.55
    large_nodes: int = 50


class Rules(Msg):
    """The whole book. An empty one watches everything that probes see."""

    classes: dict[Class, VerdictName] = {}
    limits: Limits = Limits()
    rules: tuple[Rule, ...] = ()
    kinds: tuple[str, ...] = ()  # that a rule may name
    proof: tuple[str, ...] = ()  # probes whose word alone is enough to move a rank: `name`, or `name-...`
    hearsay: tuple[str, ...] = ()  # and those that only repeat what a worker wrote


class Ruling(Msg):
    """What the book says of one finding."""

    class_: Class
    verdict: VerdictName
    rule: Rule
    proof: bool  # its probe's word is enough


class Book:
    """The rules, opened at the right page in O(rules of that kind)."""

    def __init__(self, rules: Rules) -> None:
        """Sorted once."""
        self.limits, self._classes, self._proof = rules.limits, rules.classes, rules.proof
        self._by_kind: dict[str, list[Rule]] = {}
        for rule in rules.rules:
            self._by_kind.setdefault(rule.kind, []).append(rule)

    def ruling(self, finding: Finding) -> Ruling:
        """See the head of this file."""
        rule = _best((*self._by_kind.get("", ()), *self._by_kind.get(finding.kind, ())), finding) or Rule()
        class_ = rule.class_ or finding.class_ or "ignore"
        verdict = rule.verdict or self._classes.get(class_, "watch")
        if class_ in ("user", "ignore") and verdict not in HARMLESS:
            verdict = "watch"
        proof = any(finding.probe == name or finding.probe.startswith(f"{name}-") for name in self._proof)
        return Ruling(class_=class_, verdict=verdict, rule=rule, proof=proof)

    def verdict_of(self, class_: Class) -> VerdictName:
        """What a class means by itself."""
        return self._classes.get(class_, "watch")


def _best(rules: Iterable[Rule], finding: Finding) -> Rule | None:
    best, most = None, -1
    for rule in rules:
        wanted = ((rule.kind, finding.kind), (rule.layer, finding.layer), (rule.probe, finding.probe), (rule.given, finding.class_))
        if any(want and want != has for want, has in wanted) or (rule.codes and finding.code not in rule.codes):
            continue
        named = sum(bool(want) for want, _ in wanted) + bool(rule.codes)
        if named >= most:
            best, most = rule, named
    return best
