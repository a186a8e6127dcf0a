"""Output: a file that is being written, as whoever fills it sees it, wherever it goes.

Think of the hatch of a mill: one pours in what is at hand, or leaves the whole sack there until the day's work is done; what stands behind
it is the miller's affair.

Contract: bytes come in order, from the first to the last. Local files: local.py; object stores and the rest: remote.py.
"""

from __future__ import annotations

from typing import Protocol


class Output(Protocol):
    """A file that is being written, from its start to its end."""

    position: int  # bytes so far

    def room(self, wanted: int) -> memoryview:
        """Memory to be filled, of 1 to `wanted` bytes; then say `filled`."""
        ...

    def filled(self, count: int) -> None:
        """So many bytes of the last `room` are the next ones of the file."""
        ...

    def lend(self, view: memoryview) -> None:
        """The next bytes, from memory that nobody uses for anything else before `finish`."""
        ...

    def finish(self) -> None:
        """Nothing comes any more: bring all of it to where it will be."""
        ...


def put(output: Output, data: bytes | memoryview) -> None:
    """The next bytes, from memory of one's own."""
    view = memoryview(data).cast("B")
    while view:
        room = output.room(len(view))
        room[:] = view[: len(room)]
        output.filled(len(room))
        view = view[len(room) :]
