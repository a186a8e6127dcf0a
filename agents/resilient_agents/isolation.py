"""Isolation: one piece of work in a process of its own, that may do whatever it likes there.

Think of a test pit: what explodes in it breaks no window.

Contract: the process is a fork of this one, which therefore has one thread. It leads a session of its own, so that `end` takes along what
it has started; it dies with us; what it prints is kept and its last line told if it fails. Both sides have one end of a line
that carries whole messages, at most `MESSAGE_BYTES` each. `end` never waits long: a process that cannot be killed (uninterruptible sleep,
in a driver or a file system) is left behind, and that is said.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import traceback
from typing import TYPE_CHECKING, Final

from resilient_agents import kernel

if TYPE_CHECKING:
    from collections.abc import Callable

MESSAGE_BYTES: Final = 128 << 10  # the kernel takes 200 KiB at once
ENDING_S: Final = 1.0  # from the end of its line to its own end, and from SIGKILL to its death
_LAST_BYTES: Final = 4096


class Isolated:
    """One such process."""

    def __init__(self, work: Callable[[socket.socket], None]) -> None:
        """Begin. `work` is given the other end of the line; when it returns, the process ends."""
        self._line, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._said = os.memfd_create("said")
        sys.stdout.flush()
        sys.stderr.flush()
        parent = os.getpid()
        self.pid = os.fork()
        if self.pid == 0:
            self._line.close()
            _live(work, theirs, self._said, parent)
        theirs.close()

    def fileno(self) -> int:
        """Readable: there is something to hear."""
        return self._line.fileno()

    def tell(self, data: bytes) -> None:
        """Say something to it; it may have gone."""
        try:
            self._line.send(data)
        except (BrokenPipeError, ConnectionResetError):
            return  # `hear` will tell

    def hear(self) -> bytes:
        """The next message; b"" = it hung up."""
        try:
            return self._line.recv(MESSAGE_BYTES)
        except ConnectionResetError:
            return b""

    def end(self, *, kill: bool) -> str:
        """Have it end, and collect it: "" if it ended well by itself, else how it ended and what it said last. Nothing may follow."""
        self._line.close()
        code = None if kill else kernel.collect(self.pid, ENDING_S)
        killed = code is None
        if code is None:
            self.kill()
            code = kernel.collect(self.pid, ENDING_S)
        else:
            kernel.kill_group(self.pid, signal.SIGKILL)
        said = self._last_words()
        os.close(self._said)
        if code == 0:
            return ""
        how = "cannot be killed: it sleeps uninterruptibly" if code is None else "killed by us" if killed else ending(code)
        return f"{how} ({said})" if said else how

    def kill(self) -> None:
        """Kill it, and what it has started."""
        os.kill(self.pid, signal.SIGKILL)  # not collected yet, so the number is still its own
        kernel.kill_group(self.pid, signal.SIGKILL)

    def _last_words(self) -> str:
        size = os.fstat(self._said).st_size
        data = os.pread(self._said, _LAST_BYTES, max(0, size - _LAST_BYTES))
        lines = data.decode("utf-8", "replace").strip().splitlines()
        return lines[-1].strip()[:300] if lines else ""


def ending(code: int) -> str:
    """How a process ended that should not have. code: Python's convention."""
    if code >= 0:
        return f"exit code {code}"
    try:
        return f"killed by signal {-code} ({signal.Signals(-code).name})"
    except ValueError:
        return f"killed by signal {-code}"


def _live(work: Callable[[socket.socket], None], line: socket.socket, said: int, parent: int) -> None:
    """What the process does. Never returns: of what stands above us on the stack, nothing is ours to run."""
    code = 1
    try:
        os.setsid()
        kernel.die_with(parent)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD):
            signal.signal(number, signal.SIG_DFL)
        os.dup2(os.open(os.devnull, os.O_RDWR), 0)
        os.dup2(said, 1)
        os.dup2(said, 2)
        sys.stdout = sys.stderr = open(2, "w", buffering=1, encoding="utf-8", errors="replace", closefd=False)  # noqa: SIM115
        work(line)
        code = 0
    finally:
        if code:
            traceback.print_exc()
        os._exit(code)
