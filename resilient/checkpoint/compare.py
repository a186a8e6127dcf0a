"""Compare: in what two committed steps differ.

Think of two shipments with seals: crates with equal seals stay closed; only those whose seals differ are opened and counted.

Contract: tensors are matched by the names that torch gives them (tensors.py), so that a DDP run can be compared with an FSDP2 run, and with
one of another world size. Equal digests of equal boxes cost no reading. What differs is read, checked, and told with the largest absolute
difference (of numbers: not of dtypes that numpy does not know) and the count of elements that differ. Memory: two tensors.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from resilient.checkpoint import numbers
from resilient.checkpoint.layout import ITEMSIZES
from resilient.checkpoint.tensors import Entry, Tensors

PIECE: Final = 1 << 22  # elements that are compared at once


class Difference(NamedTuple):
    """One thing that is not alike."""

    key: str
    what: str  # "only in A", "only in B", "dtype", "shape", "values", "value" (of what is no tensor)
    a: str = ""
    b: str = ""
    elements: int = 0  # that differ
    max_abs: float | None = None


class Doubt(NamedTuple):
    """Tensors that only reading can tell apart."""

    a: Entry
    b: Entry


def by_digest(a: Tensors, b: Tensors) -> tuple[list[Difference], list[Doubt], int]:
    """What is known without reading: differences, doubts, and how many tensors are equal."""
    found, doubts, equal = _values(a, b), [], 0
    for key in [*a.entries, *(key for key in b.entries if key not in a.entries)]:
        left, right = a.entries.get(key), b.entries.get(key)
        if left is None or right is None:
            found.append(Difference(key, f"only in {'B' if left is None else 'A'}", a=_text(left), b=_text(right)))
        elif left.dtype != right.dtype or left.shape != right.shape:
            found.append(Difference(key, "shape" if left.shape != right.shape else "dtype", a=_text(left), b=_text(right)))
        elif _seals(left) == _seals(right):
            equal += 1
        else:
            doubts.append(Doubt(left, right))
    return found, doubts, equal


def by_reading(a: Tensors, b: Tensors, doubt: Doubt) -> Difference | None:
    """None if they are equal after all (cut otherwise). Raises as Tensors.read."""
    left, right = a.read(doubt.a), b.read(doubt.b)
    if left == right:
        return None
    size, elements, largest = ITEMSIZES[doubt.a.dtype], 0, None
    for begin in range(0, len(left), PIECE * size):
        count, most = _distance(left[begin : begin + PIECE * size], right[begin : begin + PIECE * size], doubt.a.dtype)
        elements += count
        largest = most if largest is None or (most is not None and most > largest) else largest
    return Difference(doubt.a.key, "values", elements=elements, max_abs=largest)


def _distance(left: memoryview, right: memoryview, dtype: str) -> tuple[int, float | None]:
    """(elements whose bits differ, the largest distance of two that are numbers); no distance of what numpy has no numbers for."""
    import numpy as np  # noqa: PLC0415  0.1 s, and only who finds a difference pays them

    raw = f"V{ITEMSIZES[dtype]}"
    odd = np.flatnonzero(np.frombuffer(left, raw) != np.frombuffer(right, raw))
    if not len(odd) or dtype.startswith("float8"):
        return len(odd), None
    wide = "complex128" if dtype.startswith("complex") else "float64"
    apart = np.abs(numbers.array(left, dtype)[odd].astype(wide) - numbers.array(right, dtype)[odd].astype(wide))
    apart = apart[~np.isnan(apart)]
    return len(odd), float(apart.max()) if len(apart) else None


def _values(a: Tensors, b: Tensors) -> list[Difference]:
    found = []
    for key in [*a.values, *(key for key in b.values if key not in a.values)]:
        if key not in a.values or key not in b.values:
            found.append(Difference(key, f"only in {'A' if key in a.values else 'B'}"))
        elif a.values[key].digest != b.values[key].digest:
            found.append(Difference(key, "value"))
    return found


def _seals(entry: Entry) -> list[tuple[tuple[int, ...], tuple[int, ...], str, bytes]]:
    return [(part.row.offsets, part.row.local, type(part.place).__name__, part.digest) for part in entry.parts]


def _text(entry: Entry | None) -> str:
    return f"{entry.dtype} {list(entry.shape)}" if entry is not None else ""
