"""The ledger: where this rank is, in words that its page shows to the agent.

Think of a chess clock's scoresheet: every move is written down before the next is made, so that somebody who looks at the table, even when
the player has fallen off the chair, knows exactly which position stands.

Contract: the record changes only here, always whole. `voted` is written before the vote is cast, `committing` after it passed and before
anything is changed; then the fence is looked at (I1 in wire/page.py). Used by the training thread.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from resilient.core.messages import NONE, Phase

if TYPE_CHECKING:
    from resilient.wire.page import Page


class Ledger:
    """The record of one worker; without a page (plain python, torchrun) it just counts."""

    def __init__(self, page: Page | None) -> None:
        """Nothing is known yet."""
        self._page = page
        self.round = 0
        self.step = NONE
        self.phase: Phase = "setup"
        self.torn = False
        self._marks = [0, 0, 0, 0]  # broken, regrouped, restored, committed; monotonic ns, of `round`

    def write(self, phase: Phase, *, step: int | None = None, torn: bool | None = None) -> None:
        """Publish a new phase."""
        self.phase = phase
        self.step = self.step if step is None else step
        self.torn = self.torn if torn is None else torn
        if self._page is not None:
            marks = (self._marks[0], self._marks[1], self._marks[2], self._marks[3])
            self._page.write(round=self.round, step=self.step, phase=self.phase, torn=self.torn, marks_ns=marks)

    def regrouped(self, round_: int, broken_ns: int) -> None:
        """The groups of a newer round stand; its predecessor was found broken at `broken_ns`."""
        self.round = round_
        self._marks = [broken_ns, time.monotonic_ns(), 0, 0]
        self.write(self.phase)

    def restored(self) -> None:
        """State is in place for the round's first step."""
        self._marks[2] = time.monotonic_ns()
        self.write("clean", torn=False)

    def committed(self, step: int) -> None:
        """`step` steps are complete."""
        if not self._marks[3]:
            self._marks[3] = time.monotonic_ns()
        self.write("clean", step=step)

    def fenced(self) -> bool:
        """Whether the agent says that this round is broken."""
        return self._page is not None and self._page.fence() >= self.round > 0
