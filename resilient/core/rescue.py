"""Rescue: before everything ends, the newest state that all ranks hold in memory is brought to the persistent tier.

Think of a ship that is given half an hour before the dock closes: nobody asks the passengers, the crew carries ashore what already lies
packed on deck, and what is not ashore in full does not count.

Contract: begun when a node is told to stop (a scheduler's SIGTERM). The workers are ended as always; their seals outlive them. When all of
them are gone, or half of the time is, `step` is the newest step that is sealed for every rank in its own node's memory and newer than what
is committed; it is written and committed like any checkpoint (I8), without a worker's help. `over` when that is done, when there is
nothing to do, or at `until`. Pure bookkeeping for coordinator.py.
Rejected: waiting for the workers to seal a last step (a hung one never does); copies on other nodes (a chest that is not seated is not
drained; a node that is lost in these seconds costs the steps since the last checkpoint).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Final

from resilient.core.ledger import Poison
from resilient.core.messages import NONE, Chair

SHARE: Final = 0.9  # of the grace; the rest is for ending what is left
GONE: Final = ("dead", "finished", "empty")


class Rescue:
    """One run's last minute."""

    def __init__(self, nodes: Iterable[str], grace_s: float, now: float) -> None:
        """Told to stop now. nodes: those with ranks."""
        self.step = NONE  # to be written, NONE = not known yet, or nothing
        self.until = now + SHARE * grace_s
        self.due = now + SHARE * grace_s / 2  # whoever is not gone by then is not waited for
        self._chosen = False
        self._working = set(nodes)  # with a worker that may yet seal something

    def take(self, node: str, chairs: Iterable[Chair]) -> None:
        """A report came; of a node that is lost, with no chairs."""
        if all(chair.state in GONE for chair in chairs):
            self._working.discard(node)

    def ready(self, now: float) -> bool:
        """Whether it is time to `choose`."""
        return not self._chosen and (not self._working or now >= self.due)

    def choose(self, chairs: Mapping[int, Chair | None], committed: Collection[int], poison: Collection[Poison]) -> None:
        """Find the step. chairs: of every rank; None where its node is lost. O(ranks)."""
        self._chosen = True
        newest = newest_common(chairs, poison)
        self.step = newest if newest > max(committed, default=0) else NONE

    def over(self, committed: Collection[int], now: float) -> bool:
        """Whether everything may end."""
        return now >= self.until or (self._chosen and (self.step == NONE or self.step in committed))

    def deadline(self) -> float:
        """When to look again if nothing is heard."""
        return self.until if self._chosen else self.due

    def outcome(self, committed: Collection[int], files: int, ranks: int, grace_s: float) -> str:
        """For people."""
        newest = max(committed, default=NONE)
        back = f"the newest checkpoint is step {newest}" if newest != NONE else "there is no checkpoint"
        if not self._chosen:
            return f"the workers did not end within {grace_s:g} s (--grace-s); {back}"
        if self.step == NONE:
            return f"nothing newer was in memory; {back}"
        if self.step in committed:
            return f"step {self.step} was brought from memory to the checkpoint URL; a later start continues from there"
        there = f"files of {files} of {ranks} ranks were there, its marker was not"
        return f"step {self.step} did not get from memory to the checkpoint URL within {grace_s:g} s (--grace-s): {there}; {back}"


def newest_common(chairs: Mapping[int, Chair | None], poison: Collection[Poison] = ()) -> int:
    """The newest step that every rank has sealed where it sits; NONE if there is none. Copies that were refused do not count."""
    common: set[int] | None = None
    for rank, chair in chairs.items():
        bad = {s for t, s, r in poison if r == rank and t in ("memory", "peer")}
        held = {s for s in chair.snapshots if s > 0 and s not in bad} if chair is not None else set()
        common = held if common is None else common & held
    return max(common or (), default=NONE)
