"""Gym: the doctor's end of the process with torch: opens it, sends exercises there, closes it.

Contract: `open` returns at once; `fileno` is readable when torch has been loaded, or when the process has died. `exercise_all` may be
called from any process forked of this one; it begins all exercises at the same time and gives their answers in order, each with what
went wrong in its place. Nothing is left, even if we are killed: the process dies with us, and the socket has lost its name before
anybody could meet it; our own processes reach it through a descriptor.
"""

from __future__ import annotations

import os
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import time
from typing import TYPE_CHECKING, Final, Literal

import msgspec

from resilient_agents.check import Answer, Exercise
from resilient_agents.exercise import BOOT, READY
from resilient_agents.isolation import ENDING_S, MESSAGE_BYTES, ending

if TYPE_CHECKING:
    from collections.abc import Sequence

LATE_S: Final = 3.0  # from an exercise's limit to ours: its end is awaited, and told

State = Literal["shut", "opening", "open", "gone"]


class Gym:
    """One process with torch, and the way there."""

    def __init__(self) -> None:
        """Shut at first: many an examination needs no torch."""
        self.state: State = "shut"
        self.opened_s = 0.0  # how long that took
        self.why = ""  # it is gone
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with tempfile.TemporaryDirectory(prefix="resilient.") as directory:  # mode 0700
            path = os.path.join(directory, "exercises")
            self._listener.bind(path)
            self._door = os.open(path, os.O_PATH)

    def open(self) -> None:
        """Start loading torch."""
        assert self.state == "shut"
        self._ready, theirs = os.pipe()
        self._said = os.memfd_create("said")
        self._listener.listen(64)
        self._process = subprocess.Popen(  # noqa: S603
            [sys.executable, "-u", "-c", BOOT, str(self._listener.fileno()), str(theirs), str(os.getpid())],
            pass_fds=[self._listener.fileno(), theirs],
            stdin=subprocess.DEVNULL,
            stdout=self._said,
            stderr=self._said,
            start_new_session=True,
        )
        os.close(theirs)
        self._since = time.monotonic()
        self.state = "opening"

    def fileno(self) -> int:
        """Readable: call `changed`."""
        return self._ready

    def changed(self) -> None:
        """Torch has been loaded, or its process has ended."""
        if os.read(self._ready, 1) == READY:
            self.state = "open"
            self.opened_s = time.monotonic() - self._since
        else:
            self.give_up("")

    def give_up(self, why: str) -> None:
        """End it; `why` is told to those who wait."""
        try:
            code: int | None = self._process.wait(0.0 if why else ENDING_S)
        except subprocess.TimeoutExpired:
            code = None
        self._kill()
        self._listener.shutdown(socket.SHUT_RDWR)  # whoever comes now is told at once
        size = os.fstat(self._said).st_size
        lines = os.pread(self._said, 4096, max(0, size - 4096)).decode("utf-8", "replace").strip().splitlines()
        last = f" ({lines[-1].strip()[:300]})" if lines else ""
        self.state, self.why = "gone", f"the process that loads torch: {why or ending(code if code is not None else 1)}{last}"

    def close(self) -> None:
        """Leave nothing."""
        if self.state in {"opening", "open"}:
            self._kill()
        if self.state != "shut":
            os.close(self._ready)
            os.close(self._said)
        self._listener.close()
        os.close(self._door)

    def _kill(self) -> None:
        try:
            if self._process.poll() is None:
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait(ENDING_S)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            return  # it sleeps uninterruptibly: it dies when the driver lets it go

    # ------------------------------------------------------------------ in the processes of checks

    def exercise_all(self, exercises: Sequence[Exercise], limit_s: float) -> list[Answer]:
        """Have all of them done at once; each has `limit_s` seconds."""
        until = time.monotonic() + limit_s + LATE_S
        answers = [Answer(failure=f"no answer within {limit_s:g} s")] * len(exercises)
        with selectors.DefaultSelector() as waiting:
            for at, exercise in enumerate(exercises):
                line = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
                try:
                    line.connect(f"/proc/self/fd/{self._door}")
                    line.send(msgspec.msgpack.encode(msgspec.structs.replace(exercise, limit_s=limit_s)))
                except OSError as error:
                    line.close()
                    answers[at] = Answer(failure=f"the process that has torch is not there ({error.strerror})")
                    continue
                waiting.register(line, selectors.EVENT_READ, at)
            while waiting.get_map() and (left := until - time.monotonic()) > 0:
                for key, _ in waiting.select(left):
                    assert isinstance(key.fileobj, socket.socket)
                    answers[key.data] = _heard(key.fileobj)
                    waiting.unregister(key.fileobj)
                    key.fileobj.close()
            for key in list(waiting.get_map().values()):
                assert isinstance(key.fileobj, socket.socket)
                key.fileobj.close()  # which ends it
        return answers


def _heard(line: socket.socket) -> Answer:
    try:
        data = line.recv(MESSAGE_BYTES)
    except OSError as error:
        return Answer(failure=f"the process that has torch hung up ({error.strerror})")
    if not data:
        return Answer(failure="the process that has torch hung up")
    return msgspec.msgpack.decode(data, type=Answer)
