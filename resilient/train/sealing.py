"""Sealing: at the end of which steps all that a rank holds is sealed in memory.

Think of climbers who drive bolts into the rock: with one at every arm's length nobody falls far, and nobody gets up.

Contract: `wish` is what this rank puts into the vote at a step's gate; the greatest of all counts, so all ranks seal the same steps. Rank
0 asks as often as the copying takes SHARE of the time (at every step, where it takes no more), or at each multiple of `every`.
With sharded state there is always a step that all ranks have. A rank that sealed alone, or whose snapshot came to nothing, asks for
another of all (AGAIN); a vote that passes without that shows that all have sealed what they were to seal, and this step is overwritten
last (`Tier0.keep`); behind a broken vote, which some have heard and some not, the coordinator names it (`Plan.kept`). While somebody
needs what was sealed last (it is on its way to another node, where it is the only copy of a shard; the agent reads it for the persistent
tier) the wish is NOT_YET. Where it is certain that a step will be sealed, its gate waits for the copies instead. Both have an end: a peer
or storage that hangs holds nobody up for ever.
Where other ranks hold the same to the last bit, one of these snapshots is named for an AUDIT now and then: all ranks' agents hash it, and
the coordinator compares (core/audits.py). It costs the training thread nothing but this: of the two slots, that snapshot is not overwritten
before it is hashed.
Rejected: a seal at every step (with sharded state a pass of memory per step: 28 % of a step of 0.2 s with 1.1 GB of state, for one step
less to be done again after a fault that comes every few hours); a word of the coordinator's (the vote is there already, and exact).
"""

from __future__ import annotations

import time
from collections import deque
from typing import TYPE_CHECKING, Final

from resilient.core.messages import NONE

if TYPE_CHECKING:
    from collections.abc import Callable

    from resilient.train.tier0 import Tier0
    from resilient.wire.page import Page

NOTHING, SNAPSHOT, AUDIT, CHECKPOINT, NOT_YET, AGAIN = range(6)  # in a vote: what is to be sealed at the end of this step
SHARE: Final = 0.01  # of the time may go into snapshots
COPIES_S: Final = 2.0  # at a gate, for a peer that does not answer: twice the time after which its node counts as lost
NEEDED_S, NEEDED_BYTES_S = 10.0, 50 << 20  # who needs a snapshot for longer than this, and its bytes, is not waited for
COSTS: Final = 3  # newest snapshots: the cheapest of them is what one costs, for a pause of the machine is no reason to wait an hour
AUDIT_SHARE: Final = 0.005  # of one core of a node may go into audits; an interval that asks for more is stretched
AUDIT_MIN_S: Final = 1.0  # nodes report once a second: what is sealed sooner would take the place of what they have still to tell
_POLL_S: Final = 0.0005


class Sealing:
    """See the module's text. The training thread's."""

    def __init__(self, page: Page, tier0: Tier0, *, every: int | None, checkpoint_every: int, audit_every_s: float = 0.0) -> None:
        """every: steps between two seals, None = as often as it is worth it; checkpoint_every: its multiples are sealed in any case.

        audit_every_s: between two audits, 0 = there are none.
        """
        self._page, self._tier0, self._every, self._checkpoint_every = page, tier0, every, checkpoint_every
        self._alike = False  # every rank was to seal what this one sealed last
        self.newest = NONE  # the step sealed last
        self._sealed_s = 0.0
        self._priced = True
        self._costs: deque[float] = deque(maxlen=COSTS)
        self._audit_every_s = max(audit_every_s, AUDIT_MIN_S) if audit_every_s else 0.0
        self._audit_s = time.monotonic()
        self._audits = False  # the last vote that passed named an audit
        self.audit = NONE  # the step of the newest

    def sealed(self, step: int, *, alike: bool) -> None:
        """`step` was sealed here just now; alike: on every rank."""
        self.newest, self._alike, self._sealed_s, self._priced = step, alike, time.monotonic(), False
        if alike and self._audits:
            self.audit, self._audit_s = step, self._sealed_s
        self._audits = False

    def passed(self, wish: int) -> bool:
        """A vote passed: whether what this step makes is to be sealed."""
        if self._alike and wish != AGAIN:
            self._tier0.keep(self.newest)
        self._audits = wish == AUDIT
        return wish in (SNAPSHOT, AUDIT, CHECKPOINT, AGAIN)

    def told(self, kept: int) -> None:
        """The coordinator has looked which step all ranks have; some of them may not have heard it in the vote."""
        if kept != NONE:
            self._tier0.keep(kept)

    def placed(self, step: int, kept: int) -> None:
        """A round begins at `step`: what later ones sealed is gone, and somebody may be new. kept: as in the plan."""
        self.told(kept)
        self._alike, self.audit = False, NONE
        if self.newest > step:
            self.newest = NONE

    def wish(self, step: int, *, rank: int, sharded: bool, asked: bool, twins: bool = False) -> int:
        """For the step that will be `step`. sharded: not every rank holds what this one does; twins: some other rank does.

        asked: a checkpoint is wanted.
        """
        if not self._priced:  # only now: what is copied beside a body has its price when that is over
            self._priced = True
            self._costs.append(self._tier0.cost_s)
        if sharded and not (self._alike and self._tier0.sealed(self.newest)):
            return AGAIN
        certain = self.certain(step, sharded=sharded)
        if not certain and ((self.newest != self.audit and self._unaudited()) or (sharded and self._needed())):
            return NOT_YET
        if asked:
            return CHECKPOINT
        kind = AUDIT if rank == 0 and twins and self._audit_due(step) else SNAPSHOT
        if certain:
            return kind
        if sharded and self._every is not None:
            return NOTHING
        worth_it = rank == 0 and time.monotonic() - self._sealed_s > min(self._costs, default=0.0) / SHARE
        return kind if worth_it and not self._needed() else NOTHING

    def certain(self, step: int, *, sharded: bool) -> bool:
        """Whether all ranks will seal `step`, whatever they hear of each other."""
        return any(every and step % every == 0 for every in (self._every if sharded else None, self._checkpoint_every))

    def await_copies(self, step: int, broken: Callable[[], bool]) -> None:
        """Until what this rank sealed up to `step` lies on another node."""
        until = time.monotonic() + COPIES_S
        while self._page.copied() < step and not broken() and time.monotonic() < until:
            time.sleep(_POLL_S)

    def await_newest(self, broken: Callable[[], bool]) -> None:
        """The same for the newest snapshot."""
        if self.newest != NONE:
            self.await_copies(self.newest, broken)

    def await_audit(self, broken: Callable[[], bool]) -> None:
        """Before a snapshot that is taken whatever comes: until it does not overwrite one that the agent still hashes."""
        until = time.monotonic() + COPIES_S
        while self.newest != self.audit and self._unaudited() and not broken() and time.monotonic() < until:
            time.sleep(_POLL_S)

    def _audit_due(self, step: int) -> bool:
        """Whether it is time for one; where a checkpoint is made at fixed steps, its replicas are compared when it is committed."""
        if not self._audit_every_s or (self._checkpoint_every and step % self._checkpoint_every == 0):
            return False
        return time.monotonic() - self._audit_s >= max(self._audit_every_s, self._page.audit_s() / AUDIT_SHARE)

    def _unaudited(self) -> bool:
        """Whether the agent has not done with the snapshot that is audited, and it is still there; behind the newest it goes next."""
        if self.audit in (NONE, self._page.audited()) or self._late(self._audit_s):
            return False
        return self._tier0.sealed(self.audit)

    def _late(self, since_s: float) -> bool:
        """Whether who has needed a snapshot since then is not waited for any more."""
        return time.monotonic() - since_s > NEEDED_S + self._tier0.payload_bytes / NEEDED_BYTES_S

    def _needed(self) -> bool:
        """Whether somebody has not done with the newest snapshot."""
        if self.newest == NONE or self._late(self._sealed_s):
            return False
        return self._page.copied() < self.newest or self._tier0.being_read()
