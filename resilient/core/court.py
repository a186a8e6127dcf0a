"""Court: what was found, whose fault it is, who must go, and which copies are trusted no more.

Think of a bench of judges with three books: who was sent away, what was found to be forged, and who is suspected of standing still.
Nothing is ever struck out of the first two.

Contract: `judge` and `refuse` take in facts, `blame` looks at those that stand still; the coordinator reads `condemned`, `poison` and
`again` when it seats the next round. Worker names and poisoned copies are never used twice, so the books stay right for the whole run.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

import msgspec

from resilient.core.cause import Seen
from resilient.core.culprit import Blame, Standstill
from resilient.core.ledger import Poison
from resilient.core.machine import CoordinatorSettings
from resilient.core.messages import Chair, Finding, Report
from resilient.core.policy import Policy, Verdict

ONLY_TOLD: Final = Verdict(verdict="watch", why="--hang report: it is told, and nothing is done about it")


class Court:
    """See the head of this file."""

    def __init__(self, settings: CoordinatorSettings) -> None:
        """Nobody was accused yet."""
        self.condemned: set[str] = set()  # workers
        self.poison: set[Poison] = set()  # copies that were read and found wrong
        self.again = False  # somebody cannot go on unless the whole group starts again
        self.standstill = Standstill(settings.culprit_s, settings.alone_s)
        self._acts = settings.hang == "act"
        self._policy = Policy(settings.max_restarts)
        self._judged = 0  # newest round of which a finding was judged

    def judge(self, finding: Finding, chair: Chair | None, now: float, *, managed: bool, explained: Seen | None = None) -> Verdict:
        """The verdict, written into the books. chair: the one that the finding is about, if its node holds it in the round in force.

        explained: what a probe saw of its rank, a moment ago.
        """
        first = finding.round > self._judged
        self._judged = max(self._judged, finding.round)
        verdict = self._policy.judge(finding, managed=managed, first=first, explained=explained)
        if finding.kind == "stopped" and not self._acts:
            verdict = ONLY_TOLD
        if verdict.verdict == "replace" and finding.worker:
            self.condemned.add(finding.worker)
        if finding.kind == "unrecorded":
            self.again = True
        if finding.kind == "stalled" and chair is not None and chair.worker == finding.worker:
            self.standstill.add(finding, chair, now)
        return verdict

    def refuse(self, report: Report, round_: int) -> list[Finding]:
        """Poison what a node refuses; a finding for each copy that was trusted until now."""
        fresh = {(r.tier, r.step, r.rank): r for r in report.refused if (r.tier, r.step, r.rank) not in self.poison}
        self.poison.update(fresh)
        findings = []
        for (tier, step, rank), refused in sorted(fresh.items()):
            text = refused.reason if refused.kind != "refused" else f"{tier} copy of step {step} of rank {rank}: {refused.reason}"
            findings.append(Finding(seq=0, kind=refused.kind, rank=rank, step=step, round=round_, text=text))
        return findings

    def blame(self, chairs: Iterable[Chair], now: float) -> tuple[Blame, list[Finding]]:
        """Who keeps the others waiting, of those that have not moved since they were reported; it is condemned, unless all are at fault."""
        if not self.standstill.found:
            return Blame(wait=True), []
        found = self.standstill.look(chairs, now)
        accused = [self.standstill.found[rank][0] for rank in found.ranks if not found.wait]
        if found.crossed:
            found = self.standstill.judge(found)
            ring = {"kind": "collective-order", "layer": "training", "class_": "user", "text": found.why}
            return found, [msgspec.structs.replace(finding, **ring) for finding in accused]
        if self._acts:
            self.condemned.update(finding.worker for finding in accused)
        return found, accused

    def only_told(self) -> bool:
        """Standing still is told and nothing is done about it; once per standstill."""
        if not self._acts:
            self.standstill.found.clear()
        return not self._acts

    def adjourn(self, put_down: Iterable[str]) -> None:
        """A round is seated: who was put down never comes back, even if its node has not heard it; nobody stands still any more."""
        self.condemned.update(put_down)
        self.standstill.found.clear()
        self.again = False
