"""Audits: whether replicas still are replicas, between checkpoints.

Think of bank branches that each telephone one number in the evening: the sum of the day's book. Where the sums agree nobody reads the
books; where they do not, the pages are laid side by side, and the branch is found whose page is another one.

Contract: the workers' vote names a step (train/sealing.py), every vault makes one digest for each set of ranks that sealed the same
(checkpoint/replicas.py), and reports bring them here. `take` is called with every report, `seated` with every new round. When all ranks of
the round have told of the same step, the digests of twins are compared. Where they differ, `wish` asks the leader's vault to look into
the tensors' digests, one sheet for each digest, and what it says becomes findings: one per rank in the minority, told once until the
replicas were equal again or others differ. An audit that does not come to its end is void, not a finding: a newer step or a round takes
its place. `doubted`: ranks that a majority of their twins contradicts; nobody is given state from them while somebody else has it.
Numbers: of 12,500 nodes with 8 ranks each, 2 us for each report and 30 ms once they are all in; 111 bytes of a report.
Rejected: a step named here (by the time that every agent has heard of it, small states have overwritten it); tensors' digests in every
report (a megabyte for each rank of a large model, and equal almost always). More: docs/decisions/0019-audits.md.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from resilient.core.lines import ReplicasStatus
from resilient.core.messages import NONE, Audit, Compared, Comparison, Finding, Plan, Report, Sheet

SHEETS_MAX: Final = 16  # of one set of twins: if more of them differ, the program treats its ranks differently
SETS_MAX: Final = 16
COMPARE_S: Final = 120.0  # for the leader's vault; its own waits end sooner
LISTED: Final = 64  # ranks of which a finding is told

Twins = tuple[int, int, int]


class Audits:
    """The coordinator's."""

    def __init__(self) -> None:
        """Nothing was compared yet."""
        self.wish: Comparison | None = None  # for the leader's vault
        self.doubted: frozenset[int] = frozenset()
        self._count, self._step = 0, NONE  # audits that all ranks have told of, and the newest
        self._differ: frozenset[int] = frozenset()  # ranks that were told of
        self._since = NONE
        self._round, self._at = 0, NONE  # the audit that reports tell of now
        self._told: dict[str, tuple[str, Audit]] = {}  # node -> its vault, and what it says
        self._ranks = 0  # how many that is
        self._wished_at = 0.0

    def seated(self, round_: int, plan: Plan) -> None:
        """A round begins: what was sealed before it is not compared any more."""
        self._round, self._at, self.wish = round_, NONE, None
        self._told, self._ranks = {}, 0
        if plan.tier == "persistent":  # its replicas were compared when it was committed
            self.doubted = self._differ = frozenset()
        elif plan.tier == "live":
            self.doubted -= set(plan.receivers)

    def take(self, report: Report, before: Report | None, world_size: int, now: float, *, leads: bool) -> list[Finding]:
        """Take in what a node says. before: its last report."""
        audit = report.audit
        if audit is not None and audit.round == self._round and audit.step >= self._at and (before is None or audit != before.audit):
            if audit.step > self._at:
                self._at, self._told, self._ranks = audit.step, {}, 0
            if report.node in self._told:
                self._ranks -= _count(self._told[report.node][1])
            self._told[report.node] = (report.vault, audit)
            self._ranks += _count(audit)
            if self._ranks == world_size:
                self._weigh(now)
        return self._hear(report.compared) if leads and report.compared is not None else []

    def _weigh(self, now: float) -> None:
        """All ranks have told of one step."""
        sets: dict[Twins, dict[str, tuple[str, list[int]]]] = {}  # twins -> digest -> a vault that has its sheet, and ranks
        for _, (vault, audit) in sorted(self._told.items()):
            for one in audit.sums:
                sets.setdefault(one.twins, {}).setdefault(one.digest, (vault, []))[1].extend(one.ranks)
        if sorted(rank for digests in sets.values() for _, ranks in digests.values() for rank in ranks) != list(range(self._ranks)):
            return  # somebody tells of ranks that sit elsewhere
        self._count, self._step = self._count + 1, self._at
        apart = [digests for _, digests in sorted(sets.items()) if len(digests) > 1]
        if not apart:
            self._agree()
        elif self.wish is None or now - self._wished_at >= COMPARE_S:
            sheets = (sheet for digests in apart[:SETS_MAX] for sheet in _sheets(digests))
            self.wish, self._wished_at = Comparison(step=self._at, round=self._round, sheets=tuple(sheets)), now

    def _agree(self) -> None:
        self.doubted = self._differ = frozenset()
        self._since = NONE

    def _hear(self, found: Compared) -> list[Finding]:
        """The leader's vault has looked."""
        if self.wish is None or (found.step, found.round) != (self.wish.step, self.wish.round):
            return []
        self.wish = None
        if found.void:
            return []
        ranks = frozenset(rank for it in found.differences for rank in it.ranks)
        self.doubted = frozenset(rank for it in found.differences if 2 * len(it.ranks) < it.twins for rank in it.ranks)
        if ranks == self._differ:
            return []
        self._differ, self._since = ranks, found.step if ranks else NONE
        about = [(rank, it.text) for it in found.differences for rank in sorted(it.ranks)]
        kind, step = "replicas_differ", found.step
        return [Finding(seq=0, kind=kind, rank=rank, step=step, round=found.round, text=text) for rank, text in about[:LISTED]]

    def status(self) -> ReplicasStatus | None:
        """What status.json says; None before the first audit."""
        if self._step == NONE:
            return None
        return ReplicasStatus(audits=self._count, step=self._step, differ=tuple(sorted(self._differ))[:LISTED], since=self._since)


def _count(audit: Audit) -> int:
    return sum(len(one.ranks) for one in audit.sums)


def _sheets(digests: dict[str, tuple[str, list[int]]]) -> Iterable[Sheet]:
    """One for each digest, those of most ranks first."""
    rows = sorted((-len(ranks), sorted(ranks), digest, vault) for digest, (vault, ranks) in digests.items())
    return (Sheet(vault=vault, digest=digest, ranks=tuple(ranks)) for _, ranks, digest, vault in rows[:SHEETS_MAX])
