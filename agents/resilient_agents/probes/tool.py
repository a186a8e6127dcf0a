"""Tool: a vendor's program that is asked what only it can tell.

Think of sending an errand boy: he is told when to be back, what he brings is cut to what fits on the table, and if he does not come back
nobody sends a second one after him.

Contract: `Tool` raises `Absent` where no such program is on PATH, or at the place that its vendor installs it in. `ask` gives what it
printed; `Hangs` says that it did not end in time (it is killed with its children; one that the kernel holds fast is left, and
asked for at the next call before another is started), `Fails` that it ended with an error. Nothing is passed through a shell.
Numbers: 1 MiB of output is read at most. What such a call costs is the vendor's: a few hundred milliseconds of CPU are usual, so the
probes ask rarely and in turns.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
from typing import Final

from resilient_agents.probe import Absent

OUTPUT_MAX: Final = 1 << 20
GRACE_S: Final = 1.0  # for the kernel to end what was killed


class Hangs(Exception):
    """It did not end in its time."""


class Fails(Exception):
    """It ended with an error; the message is its last line."""


class Tool:
    """One program."""

    def __init__(self, name: str, *places: str) -> None:
        """Find it. places: full paths to look at where PATH has none. Raises Absent."""
        found = shutil.which(name) or next((place for place in places if os.access(place, os.X_OK)), None)
        if found is None:
            raise Absent(f"{name} is not on PATH")
        self.name = name
        self.path = found
        self._left: subprocess.Popen[bytes] | None = None  # killed, and still there

    def ask(self, *arguments: str, timeout_s: float) -> str:
        """What it printed. Raises Hangs, Fails."""
        if self._left is not None and self._left.poll() is None:
            raise Hangs(f"{self.name} of an earlier look cannot be ended (pid {self._left.pid})")
        self._left = None
        with tempfile.TemporaryFile() as output:  # a pipe would keep us as long as a grandchild holds it
            process = self._start(arguments, output.fileno())
            try:
                code = process.wait(timeout_s)
            except subprocess.TimeoutExpired:
                self._kill(process)
                raise Hangs(f"{self.name} {' '.join(arguments)} has not ended within {timeout_s:g} s") from None
            output.seek(0)
            text = output.read(OUTPUT_MAX).decode("utf-8", "replace")
        if code:
            raise Fails(f"{self.name} {' '.join(arguments)} ended with {code}: {(text.strip().splitlines() or [''])[-1][:200]}")
        return text

    def _start(self, arguments: tuple[str, ...], output: int) -> subprocess.Popen[bytes]:
        try:
            return subprocess.Popen(  # noqa: S603 - a program by its path, arguments of ours
                [self.path, *arguments],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            raise Fails(f"{self.name} cannot be started: {error}") from error

    def _kill(self, process: subprocess.Popen[bytes]) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        try:
            process.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            self._left = process
