"""Minutes: results of the set-up collectives of this node's ranks, for newcomers that repeat a set-up alone.

Think of the minutes of the first rehearsals: an understudy reads what was agreed there, and waits where the meeting is still going on.

Contract: kept per rank, in the order in which the rank made them, the next one only when the others have the one before as well
(train/rehearsal.py); at most 16 MiB and 10,000 results of each. Beyond that the rank's minutes are thrown away, and whoever asks is
refused: the group then starts again instead (finding "unrecorded").
"""

from __future__ import annotations

from dataclasses import dataclass, field

import msgspec

from resilient.core.messages import Recall, Recorded, Unrecorded

BYTES_MAX = 16 << 20
COUNT_MAX = 10_000


@dataclass(slots=True)
class _Rank:
    entries: dict[int, Recorded] = field(default_factory=dict)
    num_bytes: int = 0
    overflow: bool = False
    waiting: dict[int, list[str]] = field(default_factory=dict)  # index -> workers that asked too early


class Minutes:
    """Of all ranks of a node."""

    def __init__(self) -> None:
        """Nothing was said yet."""
        self._ranks: dict[int, _Rank] = {}

    def clear(self) -> None:
        """The group starts again: what was agreed is void."""
        self._ranks.clear()

    def has(self, item: Recorded) -> bool:
        """Whether just this result is kept already; of one that was made again the newer one counts."""
        rank = self._ranks.get(item.rank)
        return rank is not None and rank.entries.get(item.index) == item

    def add(self, item: Recorded) -> list[str] | None:
        """Keep a result. Returns the workers that wait for it; None if there is no room for it."""
        rank = self._ranks.setdefault(item.rank, _Rank())
        if item.index not in rank.entries:
            rank.num_bytes += len(item.payload) + len(item.key)
            rank.overflow = rank.overflow or rank.num_bytes > BYTES_MAX or len(rank.entries) >= COUNT_MAX
        if rank.overflow:
            rank.entries.clear()
            return None
        rank.entries[item.index] = item
        return rank.waiting.pop(item.index, [])

    def ask(self, worker: str, question: Recall, *, open_end: bool) -> Recorded | Unrecorded | str | None:
        """The result; or why there never will be one; or None: the worker is noted and `add` names it.

        open_end: who recorded is gone in the middle of the set-up, and the worker sits on that chair: nothing further will come.
        """
        rank = self._ranks.setdefault(question.rank, _Rank())
        if rank.overflow:
            return f"the set-up of rank {question.rank} was larger than what is kept ({BYTES_MAX >> 20} MiB, {COUNT_MAX} results)"
        found = rank.entries.get(question.index)
        if found is None and open_end:
            return Unrecorded(index=question.index)
        if found is None:
            rank.waiting.setdefault(question.index, []).append(worker)
        elif open_end and question.index + 1 not in rank.entries:
            return msgspec.structs.replace(found, last=True)
        return found
