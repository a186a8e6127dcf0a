"""Notes: results of the set-up collectives of a rank, kept beside its state for whoever takes its chair.

Think of the score that a musician leaves on the stand, with the conductor's marks in it: whoever sits down next plays from it.

Contract: the first note of an index stays; when the whole group starts again, the old ones go. Of a rank that has said too much, nothing
more is kept.
"""

from __future__ import annotations

from typing import Final

from resilient.core.messages import Recorded

NOTES_BYTES_MAX: Final = 16 << 20  # per rank; a script that records more cannot be repeated by a newcomer anyway


class Notes:
    """Results of set-up collectives, by rank; of ranks seated here, and of others whose node sent them."""

    def __init__(self) -> None:
        """Empty."""
        self._kept: dict[int, dict[int, Recorded]] = {}
        self._num_bytes: dict[int, int] = {}
        self._restarts: dict[int, int] = {}  # rank -> the start of the group that its notes are of

    def add(self, note: Recorded) -> None:
        """Keep it; the first one of an index stays, until the whole group starts again (`restart` grows).

        Of a rank that has said too much, nothing more is kept.
        """
        newest = self._restarts.setdefault(note.rank, note.restart)
        if note.restart < newest:
            return
        if note.restart > newest:
            self._restarts[note.rank] = note.restart
            self._kept.pop(note.rank, None)
            self._num_bytes.pop(note.rank, None)
        kept = self._kept.setdefault(note.rank, {})
        grown = self._num_bytes.get(note.rank, 0) + len(note.payload) + len(note.key)
        if note.index not in kept and grown <= NOTES_BYTES_MAX:
            kept[note.index] = note
            self._num_bytes[note.rank] = grown

    def of(self, rank: int) -> tuple[Recorded, ...]:
        """All notes of a rank, in their order."""
        return tuple(note for _, note in sorted(self._kept.get(rank, {}).items()))
