"""Daemon: the console script `resilient-agent`, a node's probes without any job.

    resilient-agent                      look at this node until SIGTERM; findings on stdout, one JSON object a line
    resilient-agent --once               look once, tell what is the matter, exit (1 if a finding is of class replace, cordon or gpu-reset)

Think of a house's night watch: looks before anybody has moved in, tells whoever comes what is the matter now, and then what is new.

Contract: one process, no torch, the same engine as an agent's prober, probes of scope "node" only. Whoever can open the socket may listen
(0666 if not told otherwise: a finding is no secret on its own node), and say once which program of its uses which devices (a Hello):
other bytes close the connection. By that, jobs are told apart whose faults strike one device (strikes.py), which is then a finding, too.
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
import struct
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import msgspec
from msgspec.structs import replace

from resilient import rulebook
from resilient.errors import ConfigError, ProtocolError
from resilient.wire.frames import HELLO_BYTES_MAX, Decoder, encode
from resilient_agents import instruments, kernel, marks, strikes
from resilient_agents.engine import Engine
from resilient_agents.prober import ALIVE_S, FRAME_FINDINGS_MAX, TICK_S
from resilient_agents.sieve import NODE
from resilient_agents.sightings import Alive, Begin, Hello, Sighted
from resilient_agents.strikes import Strikes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from resilient.core.messages import Finding
    from resilient_agents.sightings import Up

SOCKET: Final = "/run/resilient/agent.sock"
STATE: Final = "/var/lib/resilient/strikes.jsonl"
LISTENERS_MAX: Final = 64  # a node has as many runs as GPUs, at most
COUNTS_S: Final = 60.0
_CREDENTIALS: Final = struct.Struct("3i")
UNHEALTHY_EXIT: Final = 1
USAGE_EXIT: Final = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Watch this node; gives the exit code."""
    args = _parser().parse_args(argv)
    try:
        wanted = instruments.choice(args.probes)
        rules = rulebook.load(args.policy)
        changed = marks.read(args.policy)
    except ConfigError as error:
        sys.stderr.write(f"resilient-agent: error: {error}\n")
        return USAGE_EXIT
    begin = Begin(root=args.root, scopes=("node",) if wanted.on else (), only=wanted.only, without=wanted.without, marks=changed)
    book = Strikes(args.state, rules)
    _warn(book.open())
    if args.once:
        marks.lay(begin.marks)
        return _once(replace(begin, lookback_s=marks.lookback_s()), book)
    try:
        listener = _listen(args.socket, int(args.mode, 8))
    except OSError as error:
        sys.stderr.write(f"resilient-agent: --socket {args.socket}: cannot be opened ({error.strerror or error})\n")
        return USAGE_EXIT
    try:
        _Daemon(begin, listener, book).run()
    finally:
        with contextlib.suppress(OSError):
            os.unlink(args.socket)
    sys.stdout.flush()
    os._exit(0)  # probes that hang are left where they hang


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="resilient-agent", description="Watch this node, before and while runs use it.")
    parser.add_argument("--socket", default=SOCKET, help="where runs on this node listen (default: %(default)s)")
    parser.add_argument("--mode", default="666", help="who may listen, as chmod has it (default: %(default)s)")
    parser.add_argument("--root", default="/", help="where this node's /proc, /sys and /dev are (default: %(default)s)")
    parser.add_argument("--probes", default="auto", help="'auto', names, or names with 'no-' before each (default: %(default)s)")
    parser.add_argument("--policy", default="", metavar="FILE", help="TOML file over the rules and limits of findings, as of resilient-run")
    parser.add_argument(
        "--state", default=STATE, metavar="FILE", help="users' faults by device and job ('' = forgotten; default: %(default)s)"
    )
    parser.add_argument("--once", action="store_true", help="look once, print what is the matter, and exit")
    return parser


def _once(begin: Begin, book: Strikes) -> int:
    engine = Engine()
    found = engine.once(begin)
    engine.add(strikes.NAME, book.standing(time.time()))
    found += engine.news()
    for finding in found:
        _print("finding", finding)
    _print("started", engine.who())
    _print_counts(engine)
    sys.stdout.flush()
    os._exit(UNHEALTHY_EXIT if any(finding.class_ in NODE and not finding.clears for finding in found) else 0)


def _listen(path: str, mode: int) -> socket.socket:
    """Raises OSError, also where another daemon is there."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with socket.socket(socket.AF_UNIX) as other:
        try:
            other.connect(path)
        except OSError:
            with contextlib.suppress(FileNotFoundError):
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
    return _credentials(line)[0]


def _credentials(line: socket.socket) -> tuple[int, int, int]:
    """Of the process at the other end: pid, uid, gid."""
    return _CREDENTIALS.unpack(line.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))


class _Listener:
    """One connection."""

    def __init__(self, line: socket.socket) -> None:
        self.line = line
        self.owner = ""  # "train.py of user 1000", when it has said so
        self.devices: tuple[str, ...] = ()
        self._decoder: Decoder[Hello] = Decoder(Hello, limit=HELLO_BYTES_MAX)

    def hear(self) -> bool:
        """What it has to say, once. False: it has hung up, says more than that, or is no program of ours."""
        try:
            data = self.line.recv(2 * HELLO_BYTES_MAX)
            said = self._decoder.feed(data)
        except BlockingIOError:
            return True
        except (OSError, ProtocolError):
            return False
        if not data or (said and (self.owner or len(said) > 1)):
            return False
        for hello in said:
            self.owner = f"{hello.program} of user {_credentials(self.line)[1]}"
            self.devices = hello.devices
        return True


class _Daemon:
    """Until SIGTERM."""

    def __init__(self, begin: Begin, listener: socket.socket, book: Strikes) -> None:
        self._begin = begin
        self._book = book
        self._said = ""  # the last warning
        self._listener = listener
        self._engine = Engine()
        self._lines: dict[int, _Listener] = {}
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
        self._engine.add(strikes.NAME, self._book.standing(time.time()))
        counts_at = time.monotonic() + COUNTS_S
        while not self._stopping:
            ready = {fd for fd, _ in self._poll.poll(1000 * TICK_S)}
            if woken in ready:
                with contextlib.suppress(BlockingIOError):
                    os.read(woken, 512)
            for fd in ready & self._lines.keys():
                if not self._lines[fd].hear():
                    self._drop(fd)
            if self._listener.fileno() in ready:
                self._welcome()
            self._tell()
            if self._asked or time.monotonic() >= counts_at:
                counts_at, self._asked = time.monotonic() + COUNTS_S, False
                self._engine.add(strikes.NAME, self._book.standing(time.time()))
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
            self._lines[line.fileno()] = _Listener(line)
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
            self._remember(finding)
        frames += [Sighted(findings=tuple(news[i : i + FRAME_FINDINGS_MAX])) for i in range(0, len(news), FRAME_FINDINGS_MAX)]
        if not frames and time.monotonic() - self._spoke > ALIVE_S - TICK_S:
            frames = [Alive()]
        for data in [encode(frame) for frame in frames]:
            self._spoke = time.monotonic()
            for listener in list(self._lines.values()):
                self._send(listener.line, data)

    def _remember(self, finding: Finding) -> None:
        """A user's fault goes into the book, and what it comes to is news of the next turn."""
        warning = self._book.take(finding, self._owner(finding), time.time())
        if warning is None:
            return
        if warning != self._said:
            _warn(warning)
        self._said = warning
        self._engine.add(strikes.NAME, self._book.standing(time.time()))

    def _owner(self, finding: Finding) -> str:
        """Whose work runs on that device, "" if nobody can tell: a run that named it, or the only one here, if it named none."""
        at_work = [listener for listener in self._lines.values() if listener.owner]
        named = [it for it in at_work if set(finding.device.split(",")) & set(it.devices)]
        found = named or [it for it in at_work if not it.devices]
        return found[0].owner if len(found) == 1 and (named or len(at_work) == 1) else ""

    def _send(self, line: socket.socket, data: bytes) -> None:
        """All of it, or the connection is closed: half a frame is of no use to anybody."""
        try:
            whole = line.fileno() >= 0 and line.send(data) == len(data)
        except OSError:
            whole = False
        if not whole:
            self._drop(line.fileno())

    def _drop(self, fd: int) -> None:
        if (listener := self._lines.pop(fd, None)) is not None:
            self._poll.unregister(fd)
            listener.line.close()


def _warn(text: str) -> None:
    if text:
        sys.stderr.write(f"resilient-agent: {text}\n")


def _print(event: str, message: Any) -> None:
    row = {"event": event, "t": round(time.time(), 3), **{k: v for k, v in msgspec.to_builtins(message).items() if k != "type"}}
    with contextlib.suppress(BrokenPipeError):
        sys.stdout.write(msgspec.json.encode(row).decode() + "\n")
        sys.stdout.flush()


def _print_counts(engine: Engine) -> None:
    rows = [
        {"probe": probe, "kind": kind, "class": class_, "count": count} for (probe, kind, class_), count in sorted(engine.counts().items())
    ]
    seen = kernel.stat(os.getpid())
    row = {"event": "counts", "t": round(time.time(), 3), "cpu_s": seen.cpu_s if seen is not None else 0.0, "findings": rows}
    with contextlib.suppress(BrokenPipeError):
        sys.stdout.write(msgspec.json.encode(row).decode() + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
