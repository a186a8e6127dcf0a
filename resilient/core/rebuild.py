"""Rebuild: which snapshots of lost nodes can be put together from parity, and from where.

Think of a torn photograph: it can be had again if somebody has each strip of it, or something from which that strip follows.

Contract: `sources` is pure. A rank's snapshot of a step can be had if for each of its stripes a node that lives keeps a parity with that
stripe in it, of the same cut, and if of every other snapshot that is in there a node that lives has that step. (That they are of the same
attempt is seen by their headers when they are fetched; a snapshot that does not come out right is refused.) Only ranks without a chair on
a living node are looked at.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from resilient.core.ledger import Copy
    from resilient.core.messages import Parity


class Sources(NamedTuple):
    """What one snapshot is put together from."""

    stripes: tuple[tuple[str, int], ...]  # in order: node, and the rank under which it keeps the parity
    others: tuple[tuple[int, str], ...]  # rank, and the node that has its snapshot


def sources(
    ranks: Iterable[int], parities: Mapping[str, tuple[Parity, ...]], copies: Mapping[int, tuple[Copy, ...]]
) -> dict[int, dict[int, Sources]]:
    """Rank -> step -> from what. parities: of each living node. copies: by rank, on living nodes."""
    if not any(parities.values()):
        return {}
    lost = {rank for rank in ranks if not any(copy.seated for copy in copies.get(rank, ()))}
    strips: dict[tuple[int, int, int], dict[int, tuple[str, Parity]]] = {}  # rank, step, of how many -> number -> where
    for node, kept in sorted(parities.items()):
        for parity in kept:
            for rank, number in parity.parts:
                if rank in lost:
                    strips.setdefault((rank, parity.step, parity.stripes), {})[number] = (node, parity)
    found: dict[int, dict[int, Sources]] = {}
    for (rank, step, count), there in sorted(strips.items()):
        others = {other for _, parity in there.values() for other, _ in parity.parts} - {rank}
        at = {other: _where(copies.get(other, ()), step) for other in others}
        if there.keys() == set(range(count)) and all(at.values()):
            stripes = tuple((there[number][0], there[number][1].rank) for number in range(count))
            found.setdefault(rank, {})[step] = Sources(stripes, tuple(sorted(at.items())))
    return found


def _where(copies: Iterable[Copy], step: int) -> str:
    """A node with that step, "" if there is none."""
    return next((copy.node for copy in copies if step in copy.snapshots), "")
