"""Commits: which checkpoints of the persistent tier are whole.

Think of a jury whose members hand in their votes one by one: when the last one lies on the table the foreman (the leader's agent) is
told to announce it, and only his word makes it a verdict.

Contract: `take` is called with every report. A step is complete when every rank's file is reported; then `commit` and `manifest` name it
for the leader's assignment. It is committed when the leader says that the marker is written. Older steps that were never complete are
dropped with that. A file of a step behind the one at which a later round began is of an abandoned attempt: it is not taken, for the files
of another attempt need not fit to it (`begin`). A committed step that a node found damaged is `wrong` until it is committed anew, by files
that were all written since. I8: a step is in `committed` only if its marker was seen, or written, by the leader.
"""

from __future__ import annotations

from resilient.core.messages import NONE, Persisted, Report


class Commits:
    """What lies on the persistent tier."""

    def __init__(self) -> None:
        """Nothing is known."""
        self.committed: set[int] = set()
        self.wrong: set[int] = set()  # of these, those that were read and found damaged
        self.commit = NONE  # the step whose marker the leader is to write
        self.manifest: tuple[Persisted, ...] = ()
        self.refused = NONE  # the step whose marker will not be written: its replicas differ
        self._pending: dict[int, dict[int, Persisted]] = {}  # step -> rank -> file
        self._begun: list[tuple[int, int]] = []  # (round, step at which it began), both ascending

    @property
    def asked(self) -> bool:
        """Whether a marker is being written."""
        return self.commit not in (NONE, self.refused, *self.sound)

    @property
    def sound(self) -> set[int]:
        """Committed steps that nobody found damaged."""
        return self.committed - self.wrong

    def files(self, step: int) -> int:
        """How many ranks' files of an uncommitted step are there."""
        return len(self._pending.get(step, ()))

    def begin(self, round_: int, step: int) -> None:
        """A round begins at that step: what was sealed of later ones before it is void."""
        self._begun = [(number, begun) for number, begun in self._begun if begun < step]
        self._begun.append((round_, step))
        kept = {s: {r: f for r, f in files.items() if not self._void(f)} for s, files in self._pending.items()}
        self._pending = {s: files for s, files in kept.items() if files}

    def _void(self, item: Persisted) -> bool:
        return any(0 < item.round < number and item.step > step for number, step in self._begun)

    def take(self, report: Report, before: Report | None, *, leads: bool, world_size: int) -> int:
        """Take in what a node says; returns the step that was committed by it, or NONE. `before`: its last report."""
        news = NONE
        if before is None or report.refused != before.refused:
            told = before.refused if before is not None else ()
            self.wrong.update(r.step for r in report.refused if r not in told and r.tier == "persistent" and r.damaged)
        if not leads and before is not None and report.persisted == before.persisted:
            return news
        if leads:
            self.refused = max([self.refused, *(r.step for r in report.refused if r.kind == "replicas_differ")])
            self.committed.update(report.available or ())
            fresh = before is None or report.committed != before.committed  # of a step that is wrong the old word does not count
            if report.committed not in (NONE, *self.sound) and (fresh or report.committed not in self.wrong):
                news = report.committed
                self.committed.add(news)
                self.wrong.discard(news)
        if before is None or report.persisted != before.persisted:
            for item in report.persisted:
                kept = item.step in self.wrong and not item.round  # not written anew: what the damaged checkpoint's manifest says
                if item.step not in self.sound and not kept and not self._void(item):
                    self._pending.setdefault(item.step, {})[item.rank] = item
        newest = max(self.sound, default=NONE)
        if news != NONE:
            self._pending = {step: files for step, files in self._pending.items() if step > newest}
        whole = max((step for step, files in self._pending.items() if len(files) == world_size), default=NONE)
        if whole != NONE and whole >= self.commit and whole not in self.sound:  # the same step again: its files were written anew
            self.commit = whole
            self.manifest = tuple(item for _, item in sorted(self._pending[whole].items()))
        return news
