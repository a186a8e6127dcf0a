"""Journal: events.jsonl and status.json in the run directory, for people and tools that are not ours.

Think of a ship's log and the board on the bridge: the log is only ever appended to, the board is wiped and written anew.

Contract: formats as in core/lines.py; the journal adds "t" to a line and "updated_at" to the status, unix seconds. A line is one
write of one whole line in append mode, so several writers never mix theirs. status.json is replaced by rename: a reader sees the old
one or the new one, never half of one. A full disk costs lines, not the run: said once on stderr.
A file `snapshot.wanted` that somebody puts there (`resilient snapshot`) is a wish for a checkpoint, seen and taken away within a second.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import msgspec

if TYPE_CHECKING:
    from collections.abc import Iterator

    from resilient.core.lines import Status

WISH: Final = "snapshot.wanted"
_encoder = msgspec.json.Encoder()


class Journal:
    """The run directory as seen by whoever writes it. From one thread only."""

    def __init__(self, directory: Path) -> None:
        """Make `directory` if it is not there. Raises OSError if that cannot be."""
        directory.mkdir(parents=True, exist_ok=True)
        self.directory = directory
        self._events = os.open(directory / "events.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        self._status = directory / "status.json"
        self._spare = directory / f".status.{os.getpid()}.json"
        self._wish = directory / WISH
        self._complained = False

    def line(self, line: msgspec.Struct | dict[str, Any]) -> None:
        """Append one line: a struct of core/lines.py, or a mapping with "event"."""
        body = msgspec.to_builtins(line)
        with self._forgiving():
            os.write(self._events, _encoder.encode({"t": round(time.time(), 6), **body}) + b"\n")

    def status(self, status: Status) -> None:
        """Replace status.json."""
        body = {**msgspec.to_builtins(status), "updated_at": round(time.time(), 6)}
        with self._forgiving():
            self._spare.write_bytes(_encoder.encode(body) + b"\n")
            self._spare.replace(self._status)

    def asked(self) -> bool:
        """Whether somebody wants a checkpoint; said once."""
        try:
            self._wish.unlink()
        except OSError:  # usually: it is not there
            return False
        return True

    def close(self) -> None:
        """Close events.jsonl."""
        os.close(self._events)
        with contextlib.suppress(OSError):
            self._spare.unlink()

    @contextlib.contextmanager
    def _forgiving(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if not self._complained:
                self._complained = True
                sys.stderr.write(f"resilient-run: {self.directory}: cannot be written ({error.strerror}); the run goes on\n")
