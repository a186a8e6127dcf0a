"""Progress: how far long work is, for people who wait at a terminal.

Think of the bar on a kettle: it does not make the water boil sooner, but one knows whether to sit down.

Contract: a bar is drawn on stderr, only if that is a terminal, at most ten times a second, and is gone afterwards. `Watched` is a `Storage`
whose reading moves it, so that no work has to know of it.
"""

from __future__ import annotations

import contextlib
import math
import sys
import time
from collections.abc import Iterator
from typing import Final, Self

from resilient.checkpoint.storage import Input, Storage

WIDTH: Final = 24
EVERY_S: Final = 0.1
_UNITS: Final = ("B", "KB", "MB", "GB", "TB", "PB")


class Bar:
    """One piece of work; use it in `with`."""

    def __init__(self) -> None:
        """Silent until `begin`, and where stderr is no terminal."""
        self._what, self._total, self._done = "", 0, 0
        self._begin = self._drawn = 0.0
        self._shown = False

    def begin(self, what: str, total: int) -> None:
        """`total` bytes are to be read from here on."""
        self._what, self._total, self._done = what, total, 0
        self._begin, self._drawn = time.monotonic(), -math.inf
        self._shown = sys.stderr.isatty()

    def add(self, count: int) -> None:
        """So many more bytes have been read."""
        self._done = min(self._done + count, self._total)
        now = time.monotonic()
        if self._shown and now - self._drawn >= EVERY_S:
            self._drawn = now
            sys.stderr.write("\r" + line(self._what, self._done, self._total, now - self._begin) + "\x1b[K")
            sys.stderr.flush()

    def __enter__(self) -> Self:
        """See the class."""
        return self

    def __exit__(self, *_: object) -> None:
        """Away with it."""
        self.hide()

    def hide(self) -> None:
        """Something else is to be printed on this line; what is added next draws it again."""
        if self._shown:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()
            self._drawn = -math.inf


def line(what: str, done: int, total: int, spent_s: float) -> str:
    """What is drawn."""
    share = done / total if total else 1.0
    full = int(share * WIDTH)
    pace = done / spent_s if spent_s else 0.0
    left = f"{(total - done) / pace:.0f} s left" if pace else ""
    return f"{what}  {'█' * full}{'░' * (WIDTH - full)} {share:4.0%}  {size(done)} of {size(total)}  {size(pace)}/s  {left}"


def size(count: float) -> str:
    """Bytes for people."""
    power = 0
    while count >= 1000 and power < len(_UNITS) - 1:
        count, power = count / 1000, power + 1
    return f"{count:.3g} {_UNITS[power]}" if count < 100 or not power else f"{count:.0f} {_UNITS[power]}"


class Watched(Storage):
    """See the module's text."""

    def __init__(self, url: str, bar: Bar) -> None:
        """As `Storage`."""
        super().__init__(url)
        self._bar = bar

    @contextlib.contextmanager
    def reading(self, path: str) -> Iterator[Input]:
        """As `Storage.reading`."""
        with super().reading(path) as file:
            yield _Counted(file, self._bar)


class _Counted:
    def __init__(self, file: Input, bar: Bar) -> None:
        self._file, self._bar, self.num_bytes = file, bar, file.num_bytes

    def fill(self, view: memoryview, offset: int) -> None:
        self._file.fill(view, offset)
        self._bar.add(len(view))
