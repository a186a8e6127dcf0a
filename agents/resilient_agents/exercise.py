"""Exercise: a process with torch loaded, in which the exercises of checks are done.

Think of a gym: opening it takes a while, so it is opened once; whoever trains has a cabin of his own, and a dumb-bell dropped there is
heard nowhere else.

Contract: serves one request on each connection of a listening socket: calls "module:function" with keyword arguments in a fork of this
process and sends back what it returned, or why it did not: where it crashed or took longer than it may, with what it printed last. This
process itself does no tensor operation and no CUDA call, so that forks find nothing half-done (zygote.py tells more). Whoever hangs up ends
his exercise. The socket has no name: only processes of the doctor's reach it.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import select
import socket
import sys
import time
from typing import Final, NamedTuple

import msgspec

from resilient_agents import kernel
from resilient_agents.check import Answer, Exercise
from resilient_agents.isolation import MESSAGE_BYTES, Isolated

BOOT: Final = "import sys; sys.path = [p for p in sys.path if p]; from resilient_agents.exercise import main; main()"
READY: Final = b"1"
_HUNG_UP: Final = select.POLLHUP | select.POLLRDHUP | select.POLLERR


def main() -> None:
    """Serve until the doctor is gone. Arguments: descriptors of the listening socket and of who waits for torch, the doctor's pid."""
    listener, ready, doctor = socket.socket(fileno=int(sys.argv[1])), int(sys.argv[2]), int(sys.argv[3])
    kernel.die_with(doctor)
    importlib.import_module("torch.distributed")
    os.write(ready, READY)  # and kept open: its end tells of ours
    _Gym(listener).run()


class _Cabin(NamedTuple):
    work: Isolated
    line: socket.socket  # to whoever waits for it
    until: float
    limit_s: float


class _Gym:
    def __init__(self, listener: socket.socket) -> None:
        self._listener = listener
        self._cabins: dict[int, _Cabin] = {}  # by both descriptors
        self._poll = select.poll()

    def run(self) -> None:
        self._poll.register(self._listener, select.POLLIN)
        while True:
            for fd, events in self._poll.poll(self._left_ms()):
                if fd == self._listener.fileno():
                    self._begin(self._listener.accept()[0])
                elif fd in self._cabins:
                    cabin = self._cabins[fd]
                    if fd == cabin.work.fileno():
                        self._finish(cabin, cabin.work.hear())
                    elif events & _HUNG_UP:
                        self._finish(cabin, None)
            for cabin in {id(it): it for it in self._cabins.values()}.values():
                if time.monotonic() >= cabin.until:
                    self._finish(cabin, None)

    def _left_ms(self) -> float | None:
        if not self._cabins:
            return None
        return 1000 * max(0.0, min(cabin.until for cabin in self._cabins.values()) - time.monotonic())

    def _begin(self, line: socket.socket) -> None:
        data = line.recv(MESSAGE_BYTES)
        if not data:
            line.close()
            return
        exercise = msgspec.msgpack.decode(data, type=Exercise)
        cabin = _Cabin(Isolated(lambda answer_to: _do(exercise, answer_to)), line, time.monotonic() + exercise.limit_s, exercise.limit_s)
        for fd, events in ((cabin.work.fileno(), select.POLLIN), (line.fileno(), select.POLLRDHUP)):
            self._cabins[fd] = cabin
            self._poll.register(fd, events)

    def _finish(self, cabin: _Cabin, answer: bytes | None) -> None:
        """answer: b"" = it ended without one; None = it is to be ended."""
        for fd in (cabin.work.fileno(), cabin.line.fileno()):
            del self._cabins[fd]
            self._poll.unregister(fd)
        how = cabin.work.end(kill=answer is None) or "ended without an answer"
        if answer is None:
            how = f"no answer within {cabin.limit_s:g} s, {how}"
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # he has left
            cabin.line.send(answer or msgspec.msgpack.encode(Answer(failure=how)))
        cabin.line.close()


def _do(exercise: Exercise, line: socket.socket) -> None:
    module, _, name = exercise.call.partition(":")
    value = getattr(importlib.import_module(module), name)(**exercise.arguments)
    line.send(msgspec.msgpack.encode(Answer(value=value)))
