"""Replayable iterators: the same items again when a step is replayed.

Think of a card dealer who keeps the cards of the last hand face down beside the pack, in case the hand must be played again.

Contract: wraps any iterable whose items come in the same order every time it is iterated from its start. Items of the last two committed
steps, and of the one under way, are kept: a replay goes back one step, a rollback to the snapshot before goes back two. Own state is one
number, the count of items taken. A newcomer, or a resumed run, brings a fresh iterator forward to that count by taking and dropping
items; going back further than what is kept starts the source again, where it can be iterated twice. Not thread-safe.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from resilient.errors import GoneError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

T = TypeVar("T")


class Replayable(Generic[T]):
    """An iterator over `source` that can go back to the last commits."""

    def __init__(self, source: Iterable[T]) -> None:
        """Nothing is taken yet."""
        self._source = source
        self._items = iter(source)
        self._kept: list[T] = []  # items base .. base + len - 1
        self._base = 0
        self._at = 0
        self._marks = deque([0], maxlen=3)  # counts at the last commits, the oldest first

    def __iter__(self) -> Iterator[T]:
        """Itself."""
        return self

    def __next__(self) -> T:
        """The next item: a kept one while replaying, else a fresh one."""
        place = self._at - self._base
        if place == len(self._kept):
            self._kept.append(next(self._items))
        self._at += 1
        return self._kept[place]

    def committed(self) -> None:
        """A step is complete: what was taken two steps before it will not be asked for again."""
        self._marks.append(self._at)
        self._forget(self._marks[0])

    def _forget(self, before: int) -> None:
        del self._kept[: max(0, before - self._base)]
        self._base = max(self._base, before)

    def state_dict(self) -> dict[str, Any]:
        """The count of items taken."""
        return {"taken": self._at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go back or forward to that count. Raises GoneError if those items were let go, ValueError if there are not so many."""
        wanted = int(state["taken"])
        if wanted < self._base:
            again = iter(self._source)
            if again is self._items:
                msg = f"replayable: item {wanted} is wanted, the first one kept is {self._base}, and the iterator cannot begin again"
                raise GoneError(msg)
            self._items, self._kept, self._base = again, [], 0
        if wanted > self._base + len(self._kept):
            self._skip(wanted)
        self._at = wanted
        while len(self._marks) > 1 and self._marks[-1] > wanted:
            self._marks.pop()

    def _skip(self, wanted: int) -> None:
        """Take items and drop them until `wanted` is the next one."""
        there = self._base + len(self._kept)
        self._kept.clear()
        self._base = there
        while self._base < wanted:
            try:
                next(self._items)
            except StopIteration:
                msg = f"replayable: {wanted} items expected, the iterator ended after {self._base}"
                raise ValueError(msg) from None
            self._base += 1
        self._marks.clear()
        self._marks.append(wanted)
