"""Retention: which checkpoints stay.

Think of a diary of which one keeps the last few pages at hand, and one page of every year in the cellar.

Contract: pure. Counted are whole checkpoints only; of these the newest always stays, so where none is whole nothing goes.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Final

import msgspec


class Keep(msgspec.Struct, frozen=True):
    """What stays."""

    last: int = 3  # one being read back after a fault, one found damaged, one more
    every: int = 0  # multiples of this many steps, for good; 0 = none


KEEP: Final = Keep()


def outdated(there: Collection[int], committed: Collection[int], whole: Collection[int], keep: Keep) -> tuple[int, ...]:
    """Steps that go: old ones, and uncommitted leftovers older than the newest whole one. there: all that has a directory."""
    if not whole:
        return ()
    held = sorted(whole)
    newest, oldest = held[-1], held[-max(1, keep.last) :][0]
    kept = {step for step in held if keep.every and step % keep.every == 0}
    return tuple(step for step in sorted(there) if step not in kept and (step < oldest or (step < newest and step not in committed)))
