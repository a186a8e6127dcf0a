"""Canary: a number that a state must reproduce before anybody trains on with it.

Think of the bird that miners took along: nobody could see the gas, but while it sang the air was good. Digests say that a copy is what was
sealed; the canary says that what was sealed, read back, still computes what it did.

Contract: the script's function gives one number from a batch that it has kept and from tracked state alone; all ranks call it at the same
moments (it may use collectives): when a checkpoint is sealed, and after all ranks were given that checkpoint, before the first step. It
runs without gradients, and random numbers are afterwards where they were. In the same world the number has to be equal to the last bit, in
another one up to rounding (`CLOSE`).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Final

import torch

from resilient.errors import RoundAborted, SnapshotCorrupt
from resilient.train import rng

if TYPE_CHECKING:
    from collections.abc import Callable

CLOSE: Final = 1e-3  # relative: sums in another order, in bf16


class Canary:
    """One per process."""

    def __init__(self) -> None:
        """No function yet: nothing is asked."""
        self.function: Callable[[], Any] | None = None

    def sing(self) -> float | None:
        """The number now; None if there is no function, or if the round broke meanwhile."""
        try:
            return self._ask()
        except RoundAborted:  # the step is committed all the same, and the next checkpoint has its number
            return None

    def listen(self, sealed: float | None, *, exact: bool, where: str) -> None:
        """Compare with the number that was sealed. Raises SnapshotCorrupt naming both; RoundAborted if the round breaks meanwhile."""
        found = self._ask()
        if sealed is None or found is None or (math.isnan(sealed) and math.isnan(found)):
            return
        if found != sealed if exact else not math.isclose(found, sealed, rel_tol=CLOSE):
            raise SnapshotCorrupt(f"{where}: the canary's number was {sealed!r} when it was sealed, {found!r} now")

    def _ask(self) -> float | None:
        if self.function is None:
            return None
        before = rng.take()
        try:
            with torch.no_grad():
                return float(self.function())
        finally:
            rng.put(before)
