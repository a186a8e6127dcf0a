"""Daemon: the console script `resilient-agent`, a node's probes without any job.

    resilient-agent                      look at this node until SIGTERM; findings on stdout, one JSON object a line
    resilient-agent --once               look once, tell what is the matter, exit (1 if a finding is of class replace, cordon or gpu-reset)

Think of a house's night watch: looks before anybody has moved in, tells whoever comes what is the matter now, and then what is new.

Contract: one process, no torch, the same engine as an agent's prober, probes of scope "node" only. Whoever can open the socket may listen
(0666 if not told otherwise: a finding is no secret on its own node), and nobody is listened to: bytes that come in close the connection.
A listener that does not read loses its connection, never the daemon's time. At most `LISTENERS_MAX` at a time. Lines of JSON, by "event":
"finding"; "started" when the probes change; "counts" each `COUNTS_S`, and at once on SIGUSR1: how many findings by probe, kind and class
since the start, the ignored ones too, which is what a metrics exporter wants.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import select
import signal
import socket
import stat
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import msgspec

from resilient.errors import ConfigError
from resilient.wire.frames import encode
from resilient_agents import instruments, kernel
from resilient_agents.engine import Engine
from resilient_agents.prober import ALIVE_S, FRAME_FINDINGS_MAX, TICK_S
from resilient_agents.sieve import NODE
from resilient_agents.sightings import Alive, Begin, Sighted

if TYPE_CHECKING:
    from collections.abc import Sequence

    from resilient_agents.sightings import Up

SOCKET: Final = "/run/resilient/agent.sock"
LISTENERS_MAX: Final = 64  # a node has as many runs as GPUs, at most
COUNTS_S: Final = 60.0
UNHEALTHY_EXIT: Final = 1
USAGE_EXIT: Final = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Watch this node; gives the exit code."""
    args = _parser().parse_args(argv)
    try:
        wanted = instruments.choice(args.probes)
    except ConfigError as error:
        sys.stderr.write(f"resilient-agent: error: {error}\n")
        return USAGE_EXIT
    begin = Begin(root=args.root, scopes=("node",) if wanted.on else (), only=wanted.only, without=wanted.without)
    if args.once:
        return _once(begin)
    try:
        listener = _listen(args.socket, args.mode)
    except OSError as error:
        sys.stderr.write(f"resilient-agent: --socket {args.socket}: cannot be opened ({error.strerror or error})\n")
        return USAGE_EXIT
    try:
        _Daemon(begin, listener).run()
    finally:
        with contextlib.suppress(OSError):
            os.unlink(args.socket)
    os._exit(0)  # probes that hang are left where they hang


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="resilient-agent", description="Watch this node, before and while runs use it.")
    parser.add_argument("--socket", default=SOCKET, help="where runs on this node listen (default: %(default)s)")
    parser.add_argument("--mode", type=_mode, default="666", help="who may listen, as chmod has it (default: %(default)s)")
    parser.add_argument("--root", default="/", help="where this node's /proc, /sys and /dev are (default: %(default)s)")
    parser.add_argument("--probes", default="auto", help="'auto', names, or names with 'no-' before each (default: %(default)s)")
    parser.add_argument("--once", action="store_true", help="look once, print what is the matter, and exit")
    return parser


def _mode(text: str) -> int:
    if (mode := int(text, 8)) & ~0o777:
        raise ValueError(text)
    return mode


_mode.__name__ = "chmod's octal"  # argparse: "invalid ... value"


def _once(begin: Begin) -> int:
    engine = Engine()
    found = engine.once(begin)
    for finding in found:
        _print("finding", finding)
    _print("started", engine.who())
    _print_counts(engine)
    os._exit(UNHEALTHY_EXIT if any(finding.class_ in NODE and not finding.clears for finding in found) else 0)


def _listen(path: str, mode: int) -> socket.socket:
    """Raises OSError, also where another daemon is there, or a file that is none of ours."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with socket.socket(socket.AF_UNIX) as other, contextlib.suppress(FileNotFoundError):
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise OSError("a socket, or nothing, expected there, a file found")
        other.setblocking(False)  # noqa: FBT003 - it has no name
        try:
            other.connect(path)
        except BlockingIOError:
            raise OSError("another resilient-agent has it, and does not answer") from None
        except ConnectionRefusedError:
            os.unlink(path)  # of one that was killed
        else:
            raise OSError(f"another resilient-agent (pid {_peer(other)}) serves it")
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    os.chmod(path, mode)
    listener.listen(LISTENERS_MAX)
    listener.setblocking(False)  # noqa: FBT003 - it has no name
    return listener


def _peer(line: socket.socket) -> int:
    return int.from_bytes(line.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 4), sys.byteorder)


class _Daemon:
    """Until SIGTERM."""

    def __init__(self, begin: Begin, listener: socket.socket) -> None:
        self._begin = begin
        self._listener = listener
        self._engine = Engine()
        self._lines: dict[int, socket.socket] = {}
        self._poll = select.poll()
        self._spoke = 0.0
        self._asked = False
        self._stopping = False

    def run(self) -> None:
        """Look, and tell."""
        woken, waker = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(waker, warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._stop)
        signal.signal(signal.SIGUSR1, self._ask)
        for fd in (self._listener.fileno(), self._engine.fd, woken):
            self._poll.register(fd, select.POLLIN)
        self._engine.start(self._begin)
        counts_at = time.monotonic() + COUNTS_S
        while not self._stopping:
            ready = {fd for fd, _ in self._poll.poll(1000 * TICK_S)}
            if woken in ready:
                with contextlib.suppress(BlockingIOError):
                    os.read(woken, 512)
            for fd in ready & self._lines.keys():
                self._drop(fd)  # they are not to say anything: it has hung up, or is no program of ours
            if self._listener.fileno() in ready:
                self._welcome()
            self._tell()
            if self._asked or time.monotonic() >= counts_at:
                counts_at, self._asked = time.monotonic() + COUNTS_S, False
                _print_counts(self._engine)

    def _stop(self, *_: object) -> None:
        self._stopping = True

    def _ask(self, *_: object) -> None:
        self._asked = True

    def _welcome(self) -> None:
        """Tell a newcomer what is the matter."""
        with contextlib.suppress(BlockingIOError):
            line, _ = self._listener.accept()
            if len(self._lines) >= LISTENERS_MAX:
                line.close()
                return
            line.setblocking(False)  # noqa: FBT003
            self._lines[line.fileno()] = line
            self._poll.register(line.fileno(), select.POLLIN)
            matters = self._engine.matters()
            frames: list[Up] = [self._engine.who()]
            frames += [Sighted(findings=tuple(matters[i : i + FRAME_FINDINGS_MAX])) for i in range(0, len(matters), FRAME_FINDINGS_MAX)]
            for frame in frames:
                self._send(line, encode(frame))

    def _tell(self) -> None:
        frames: list[Up] = []
        if (started := self._engine.started()) is not None:
            _print("started", started)
            frames.append(started)
        news = self._engine.news()
        for finding in news:
            _print("finding", finding)
        frames += [Sighted(findings=tuple(news[i : i + FRAME_FINDINGS_MAX])) for i in range(0, len(news), FRAME_FINDINGS_MAX)]
        if not frames and time.monotonic() - self._spoke > ALIVE_S - TICK_S:
            frames = [Alive()]
        for data in [encode(frame) for frame in frames]:
            self._spoke = time.monotonic()
            for line in list(self._lines.values()):
                self._send(line, data)

    def _send(self, line: socket.socket, data: bytes) -> None:
        """All of it, or the connection is closed: half a frame is of no use to anybody."""
        try:
            whole = line.fileno() >= 0 and line.send(data) == len(data)
        except OSError:
            whole = False
        if not whole:
            self._drop(line.fileno())

    def _drop(self, fd: int) -> None:
        if (line := self._lines.pop(fd, None)) is not None:
            self._poll.unregister(fd)
            line.close()


def _print(event: str, message: Any) -> None:
    row = {"event": event, "t": round(time.time(), 3), **{k: v for k, v in msgspec.to_builtins(message).items() if k != "type"}}
    _write(row)


def _print_counts(engine: Engine) -> None:
    rows = [
        {"probe": probe, "kind": kind, "class": class_, "count": count} for (probe, kind, class_), count in sorted(engine.counts().items())
    ]
    seen = kernel.stat(os.getpid())
    row = {"event": "counts", "t": round(time.time(), 3), "cpu_s": seen.cpu_s if seen is not None else 0.0, "findings": rows}
    _write(row)


def _write(row: dict[str, Any]) -> None:
    """One line. A disk that is full, or a reader that has gone, is no reason to look no more."""
    data = msgspec.json.encode(row) + b"\n"
    with contextlib.suppress(OSError):
        while data:
            data = data[os.write(1, data) :]


if __name__ == "__main__":
    sys.exit(main())
