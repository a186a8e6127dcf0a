"""Tally: what became of every fault, counted by the place that it hit and by what it did there; `make faults` prints it.

Think of the sheet at a crash-test track: one line for each kind of crash, one stroke for each car, and a column that has to stay empty.

    found      it was noticed before a byte was used, and the copy before it, or another one, was taken
    verify     nothing of it is read for a restore, which was right; `resilient ckpt verify` notices it
    harmless   nobody reads these bytes: what was loaded is right to the last bit
    survived   a process was killed, or storage failed: the run ended with the bits of an undisturbed one, and nothing committed was lost
    WRONG      anything else
"""

from __future__ import annotations

from collections import Counter
from typing import Final

OUTCOMES: Final = ("found", "verify", "harmless", "survived", "WRONG")
_rows: dict[tuple[str, str], Counter[str]] = {}


def count(place: str, deed: str, outcome: str) -> None:
    """One fault more."""
    assert outcome in OUTCOMES, outcome
    _rows.setdefault((place, deed), Counter())[outcome] += 1


def table() -> list[str]:
    """Lines for people; none if nothing was counted."""
    if not _rows:
        return []
    width = max(len(place) for place, _ in _rows)
    longest = max(len(deed) for _, deed in _rows)
    lines = [f"{'place':<{width}}  {'fault':<{longest}}  {'tried':>6}" + "".join(f"{name:>10}" for name in OUTCOMES)]
    places = list(dict.fromkeys(place for place, _ in _rows))
    for (place, deed), counts in sorted(_rows.items(), key=lambda row: places.index(row[0][0])):
        cells = "".join(f"{counts[name] or '':>10}" for name in OUTCOMES[:-1]) + f"{counts['WRONG']:>10}"
        lines.append(f"{place:<{width}}  {deed:<{longest}}  {counts.total():>6}{cells}")
    whole = sum(_rows.values(), Counter[str]())
    cells = "".join(f"{whole[name]:>10}" for name in OUTCOMES)
    return [*lines, f"{'all':<{width}}  {'':<{longest}}  {whole.total():>6}{cells}"]
