"""Probing: the agent's end of its probes. Starts the prober, listens to it and to the node's daemon, and starts another when it dies.

Think of a shift leader with two sources: the house's night watch, if there is one (`resilient-agent`, for the node), and a watchman of his
own for his own people. If the night watch goes home, his own man walks its rounds, too.

Contract: nothing here fails because of a probe. Findings come by callback, on the loop's thread. A prober that dies, stands still or talks
nonsense is replaced after 1, 2, 4 ... s, at most `DEATHS_MAX` times in `DEATHS_S`; each time is a finding "prober-lost". A probe whose
thread the crash report names twice is left out from then on. A process that cannot be killed (it stands in a driver) is not waited for.
A daemon's socket is only believed if it belongs to root or to this user. If it hangs up, the own prober looks at the node from then on.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import time
from collections import Counter, deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from msgspec.structs import replace

from resilient.core.messages import Finding
from resilient.errors import ProtocolError
from resilient.wire.frames import HEADER, Decoder, body_bytes, encode
from resilient_agents import marks
from resilient_agents.instruments import Choice, choice
from resilient_agents.probe import GROUP, Roster, Watched
from resilient_agents.sieve import LAYER
from resilient_agents.sightings import Begin, Hello, Marks, Sighted, Started, Up

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

NOBODY: Final = Hello()
PRINTED: Final = Marks()
DEATHS_MAX: Final = 5
DEATHS_S: Final = 600.0
CULPRIT_TIMES: Final = 2
OVERLAP_S: Final = 0.2  # of two probers, in the kernel's log: what one has read in its last moment it may not have told
BACKOFF_MAX_S: Final = 30.0
SILENCE_S: Final = 30.0  # six of its signs of life
DAEMON_S: Final = 2.0  # a local socket
END_S: Final = 1.0  # from SIGKILL to the end, where it does not stand in the kernel
CRASH_BYTES_MAX: Final = 1 << 16
_CURRENT: Final = re.compile(rb"Current thread 0x([0-9a-f]{1,16})")
_CREDENTIALS: Final = struct.Struct("3i")
log = logging.getLogger("resilient.probes")


@dataclass(frozen=True, slots=True)
class Senses:
    """What the launcher's options say."""

    choice: Choice = field(default_factory=Choice)
    root: str = "/"
    daemon: str = ""  # its socket; "" = do not look for one
    places: Roster = field(default_factory=Roster)  # its directories; nobody is in it
    marks: Marks = PRINTED  # by which our own prober judges
    hello: Hello = NOBODY  # what the daemon is told


def senses(
    probes: str,
    root: str,
    daemon: str,
    run_dir: str,
    checkpoint: str,
    memory_dir: str,
    *,
    policy: str = "",
    hello: Hello = NOBODY,
) -> Senses:
    """From the options of the same names. Raises ConfigError."""
    path = checkpoint.removeprefix("file://")
    directory = os.path.abspath(path) if path and "://" not in path else ""
    places = Roster(run_dir=run_dir, checkpoint=directory, memory_dir=memory_dir)
    return Senses(choice(probes), root, daemon, places, marks.read(policy), hello)


class Probing:
    """One agent's probes."""

    def __init__(self, senses: Senses) -> None:
        """Nothing is started before `start`."""
        self._senses = senses
        self._roster = senses.places
        self._tell: Callable[[tuple[Finding, ...]], None] = lambda _: None
        self._tasks: list[asyncio.Task[None]] = []
        self._process: subprocess.Popen[bytes] | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._scopes: tuple[str, ...] = ("node", "run")
        self._deaths: deque[float] = deque(maxlen=DEATHS_MAX)
        self._blamed: Counter[str] = Counter()
        self._since, self._read = 0.0, dict[str, int]()

    @property
    def pid(self) -> int:
        """Of the prober, 0 if there is none."""
        return self._process.pid if self._process is not None else 0

    def start(self, tell: Callable[[tuple[Finding, ...]], None]) -> None:
        """Begin to look. `tell` is given what is seen."""
        self._tell = tell
        if self._senses.choice.on:
            self._task(self._run())

    def watch(self, workers: tuple[Watched, ...]) -> None:
        """These are the workers now."""
        if workers == self._roster.workers:
            return
        self._roster = replace(self._roster, workers=workers)
        self._say(self._roster)

    async def close(self) -> None:
        """End all of it."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._end()

    def _task(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.append(task)
        task.add_done_callback(_ended)

    # ------------------------------------------------------------------ the node's daemon

    async def _run(self) -> None:
        if (daemon := await self._daemon()) is not None:
            self._scopes = ("run",)
            self._task(self._follow_daemon(*daemon))
        await self._keep()

    async def _daemon(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter] | None:
        """A connection to it, None if there is none that could be believed."""
        path = self._senses.daemon
        if not path:
            return None
        try:
            async with asyncio.timeout(DAEMON_S):
                reader, writer = await asyncio.open_unix_connection(path)
        except FileNotFoundError:
            return None
        except (OSError, TimeoutError) as error:
            log.warning("%s: no resilient-agent answers there (%s); this run looks at its node itself", path, error)
            return None
        _, uid, _ = _CREDENTIALS.unpack(
            writer.get_extra_info("socket").getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        )
        if uid not in {0, os.geteuid()}:
            log.warning("%s: a daemon of root or of user %d expected, one of user %d found; it is not used", path, os.geteuid(), uid)
            writer.transport.abort()
            return None
        writer.write(encode(self._senses.hello))
        return reader, writer

    async def _follow_daemon(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        why = await self._listen(reader, "resilient-agent")
        writer.transport.abort()
        self._note(f"{why}; this run looks at its node itself from now on", "resilient-agent")
        self._scopes = ("node", "run")
        self._since = time.monotonic() - OVERLAP_S
        self._say(self._begin())
        self._say(self._roster)

    # ------------------------------------------------------------------ our own prober

    async def _keep(self) -> None:
        """One prober at a time, until there have been too many."""
        while True:
            try:
                reader, crash = await self._start()
            except OSError as error:
                why, crash = f"it could not be started ({error})", None
            else:
                why = await self._listen(reader, "prober")
            self._mark()
            code = await self._end()
            culprit = self._culprit(crash)
            self._deaths.append(now := time.monotonic())
            many = len(self._deaths) == DEATHS_MAX and now - self._deaths[0] < DEATHS_S
            then = f"{DEATHS_MAX} in {DEATHS_S:.0f} s: no further one is started" if many else "another one is started"
            self._note(f"{why}, exit code {code}{culprit}; {then}", "prober")
            if many:
                return
            recent = sum(now - death < DEATHS_S for death in self._deaths)
            await asyncio.sleep(min(2.0 ** (recent - 1), BACKOFF_MAX_S))

    async def _start(self) -> tuple[asyncio.StreamReader, int]:
        crash = os.memfd_create("prober-crash")
        try:
            ours, theirs = socket.socketpair()
            with theirs:
                self._process = subprocess.Popen(  # noqa: ASYNC220, S603 - a fork and exec of milliseconds, as the nursery's
                    [sys.executable, "-P", "-m", "resilient_agents.prober", str(theirs.fileno()), str(os.getpid()), str(crash)],
                    pass_fds=[theirs.fileno(), crash],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,  # this process's own is the user's
                    start_new_session=True,  # Ctrl-C in a terminal is for the launcher alone
                )
            reader, self._writer = await asyncio.open_unix_connection(sock=ours)
        except OSError:
            os.close(crash)
            raise
        self._threads: dict[int, str] = {}
        self._say(self._begin())
        self._say(self._roster)
        return reader, crash

    def _begin(self) -> Begin:
        choice = self._senses.choice
        bad = tuple(name for name, times in self._blamed.items() if times >= CULPRIT_TIMES)
        return Begin(
            root=self._senses.root,
            scopes=self._scopes,
            only=choice.only,
            without=(*choice.without, *bad),
            since=self._since,
            read=self._read,
            marks=self._senses.marks,
        )

    def _mark(self) -> None:
        """From here on the next prober reads."""
        self._since = time.monotonic() - OVERLAP_S
        files = [path for worker in self._roster.workers for path in (worker.stdout, worker.stderr) if path]
        self._read = {path: size for path in files if (size := _size(path)) is not None}

    def _say(self, message: Begin | Roster) -> None:
        if self._writer is not None:
            self._writer.write(encode(message))  # a roster is 200 bytes per worker, and the prober reads while its probes look

    async def _listen(self, reader: asyncio.StreamReader, who: str) -> str:
        """Until it has ended, stands still or talks nonsense; says which."""
        decoder: Decoder[Any] = Decoder(Up)
        while True:
            try:
                message = decoder.decode(await _frame(reader))
            except TimeoutError:
                return f"{who} has not said a word for {SILENCE_S:.0f} s"
            except (OSError, EOFError):
                return f"{who} has ended"
            except ProtocolError as error:
                return f"{who} talks nonsense ({error})"
            if isinstance(message, Sighted):  # a daemon has its own choice of probes, and this run another
                self._tell(tuple(f for f in message.findings if who == "prober" or f.layer == LAYER or self._senses.choice.wants(f.probe)))
            elif isinstance(message, Started):
                if not message.threads and not message.absent:
                    log.warning("%s: no probe is installed (entry points %s); is the package's installation older than it?", who, GROUP)
                if who == "prober":
                    self._threads |= {ident: name for name, ident in message.threads.items()}
                log.info("%s: looking: %s; nothing to look at: %s; %s", who, sorted(message.threads), message.absent, message.notes)

    async def _end(self) -> int | str:
        """Kill it and collect it, if the kernel lets it go; its exit code."""
        if self._writer is not None:
            self._writer.transport.abort()
            self._writer = None
        process, self._process = self._process, None
        if process is None:
            return "none"
        if (code := process.poll()) is None:
            await asyncio.sleep(0)
            process.kill()
            until = time.monotonic() + END_S
            while (code := process.poll()) is None and time.monotonic() < until:  # noqa: ASYNC110 - not by pidfd: kernel.collect says why
                await asyncio.sleep(0.002)
        if code is None:
            process.returncode = -signal.SIGKILL  # it will be collected as an orphan, when the kernel lets it go
            return "none yet: it cannot be killed"
        return code

    def _culprit(self, crash: int | None) -> str:
        """Who was it? In words, "" if nobody knows."""
        if crash is None:
            return ""
        with open(crash, "rb", buffering=0) as file:
            file.seek(0)
            found = _CURRENT.search(file.read(CRASH_BYTES_MAX))
        name = self._threads.get(int(found[1], 16), "") if found is not None else ""
        if not name:
            return ""
        self._blamed[name] += 1
        again = " for the last time: it is left out" if self._blamed[name] >= CULPRIT_TIMES else ""
        return f", in the probe {name}{again}"

    def _note(self, text: str, who: str) -> None:
        log.warning("%s", text)
        now = time.monotonic()
        finding = Finding(
            seq=0, kind="prober-lost", probe="prober", layer=LAYER, device=f"probe:{who}", class_="ignore", role="context", t=now, text=text
        )
        self._tell((finding,))


def _ended(task: asyncio.Task[None]) -> None:
    """A fault of ours here is loud, and ends the looking, not the run."""
    if not task.cancelled() and (error := task.exception()) is not None:
        log.error("a fault of ours: this run is not watched any more", exc_info=error)


def _size(path: str) -> int | None:
    try:
        return os.stat(path).st_size
    except OSError:
        return None


async def _frame(reader: asyncio.StreamReader) -> bytes:
    """The next body. Raises TimeoutError after `SILENCE_S`, which this process may have slept through: then what is there is read first."""
    for patience_s in (SILENCE_S, 1.0):
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(patience_s):
                header = await reader.readexactly(HEADER.size)
                return await reader.readexactly(body_bytes(header))
    raise TimeoutError
