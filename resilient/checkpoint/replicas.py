"""Replicas: whether ranks that should hold the same bytes do.

Think of three clocks on a wall: if one shows another time than the other two, it is that one which is wrong, and nobody had to look at the
sun.

Contract: pure. Twins (layout.py) are compared tensor by tensor, by the digests of what each of them sealed. Of a difference the ranks in
the minority are named; where there is no majority, all that differ are. Data parallelism keeps replicas equal to the last bit, so a
difference is silent corruption (a bit flipped in memory, a device that computes wrongly) or a program that treats its ranks differently.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple

from resilient.checkpoint.layout import Layout

_NAMED_MAX: Final = 3


class Difference(NamedTuple):
    """Tensors that are not what the other twins hold."""

    ranks: tuple[int, ...]  # in the minority
    twins: int
    tensors: tuple[str, ...]

    def __str__(self) -> str:
        """For people."""
        names = ", ".join(self.tensors[:_NAMED_MAX]) + (f" and {more} more" if (more := len(self.tensors) - _NAMED_MAX) > 0 else "")
        return (
            f"{names}: differs on {'rank' if len(self.ranks) == 1 else 'ranks'} {', '.join(map(str, self.ranks))} of {self.twins} replicas"
        )


def compare(found: Mapping[int, tuple[Layout, Sequence[bytes]]]) -> list[Difference]:
    """found: rank -> its layout and the digest of each of its tensors. Differences, one per set of ranks."""
    tensors: dict[tuple[tuple[int, ...], int], list[str]] = {}
    for ranks in sorted({layout.twins.ranks for layout, _ in found.values()}, key=lambda ranks: ranks.start):
        held = [(rank, found[rank]) for rank in ranks if rank in found]
        for number, row in enumerate(held[0][1][0].rows):
            digests = {rank: digests[number] if layout.rows[number : number + 1] == (row,) else b"" for rank, (layout, digests) in held}
            count = Counter(digests.values())
            if len(count) > 1:
                common, times = count.most_common(1)[0]
                odd = tuple(rank for rank, digest in digests.items() if digest != common or 2 * times <= len(held))
                tensors.setdefault((odd, len(held)), []).append(row.key)
    return [Difference(ranks, twins, tuple(keys)) for (ranks, twins), keys in tensors.items()]
