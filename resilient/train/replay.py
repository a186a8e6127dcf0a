"""Replayable iterators: the same items again when a step is replayed.

Think of a card dealer who keeps the cards of the last hand face down beside the pack, in case the hand must be played again.

Contract: wraps any iterable whose items come in the same order every time it is iterated from its start. Items taken since the last
commit are kept; own state is one number, the count of items taken. A newcomer, or a resumed run, brings a fresh iterator forward to
that count by taking and dropping items. Tracked by the run under its own name; not thread-safe.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

T = TypeVar("T")


class Replayable(Generic[T]):
    """An iterator over `source` that can go back to the last commit."""

    def __init__(self, source: Iterable[T]) -> None:
        """Nothing is taken yet."""
        self._source = iter(source)
        self._kept: list[T] = []  # items base .. base + len - 1
        self._base = 0
        self._at = 0

    def __iter__(self) -> Iterator[T]:
        """Itself."""
        return self

    def __next__(self) -> T:
        """The next item: a kept one while replaying, else a fresh one."""
        place = self._at - self._base
        if place == len(self._kept):
            self._kept.append(next(self._source))
        self._at += 1
        return self._kept[place]

    def committed(self) -> None:
        """What was taken will not be asked for again."""
        del self._kept[: self._at - self._base]
        self._base = self._at

    def state_dict(self) -> dict[str, Any]:
        """The count of items taken."""
        return {"taken": self._at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go back or forward to that count. Raises ValueError if those items are gone or do not exist."""
        wanted = int(state["taken"])
        if wanted < self._base:
            msg = f"replayable: item {wanted} was let go, the first one kept is {self._base}"
            raise ValueError(msg)
        while self._base + len(self._kept) < wanted:
            try:
                self._kept.append(next(self._source))
            except StopIteration:
                msg = f"replayable: {wanted} items expected, the iterator ended after {self._base + len(self._kept)}"
                raise ValueError(msg) from None
        self._at = wanted
