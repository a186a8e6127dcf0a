"""Engine: calls the probes, each on a thread of its own, and gives what is to be told of what they see.

Think of a ward round with one nurse per patient: who finds a patient that does not let go of her hand is missed after a while, is noted
down as missing, and all others go on; nobody else is sent into that room until she is back.

Contract: one daemon thread per probe. A check begins `period_s` after the one before began, a tenth earlier or later by chance so that
neither a node's probes nor a fleet's nodes look all at once, and never before the last one has returned. One that takes longer than the
probe's `timeout_s` is a finding "probe-hangs", or what the probe's `hangs(seconds)` says it means, and one that raises "probe-fails"; both
are over with the next check that returns well. What a probe gives that is no list of findings is a failure of the same sort. A probe is
imported and made on its thread, too, under the same rules. `fd` becomes readable when there is something for `news` or `started`.

Numbers: a thread that waits costs nothing; 15 probes wake up 7 times a second together. Cost of all: tests/bench/test_probe_cost.py.
Rejected: one process per probe (10 MB each); asyncio (a blocking read of /proc or of NVML stops all of them, and it is the ones that block
that matter); killing a thread that hangs (there is no such thing: it stands in the kernel).
"""

from __future__ import annotations

import contextlib
import os
import random
import threading
import time
from collections import deque
from itertools import islice
from typing import TYPE_CHECKING, Any, Final, NamedTuple, cast

from msgspec.structs import replace

from resilient.core.messages import Finding
from resilient.wire.frames import HEADER, Decoder, encode
from resilient_agents import instruments, marks
from resilient_agents.instruments import Choice
from resilient_agents.probe import TIMEOUT_S, Absent, Roster, Surroundings
from resilient_agents.sieve import LAYER, Sieve
from resilient_agents.sightings import Sighted, Started

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from resilient_agents.sightings import Begin

FIRST_S: Final = 1.0  # within which all probes have begun
JITTER: Final = 0.1
AFTER_ERROR_S: Final = 5.0  # what fails in a loop is not to cost more than what works
GAP_S: Final = 0.05  # between two checks at least, whatever a probe's period says
FINDINGS_MAX: Final = 1000  # of one check
NEWS_MAX: Final = 1000  # not fetched
ONCE_S: Final = 60.0  # for `once`, whatever the probes' own limits are
_decoder = Decoder[Sighted](Sighted)


class Wanted(NamedTuple):
    """For whom the probes look."""

    scopes: tuple[str, ...]
    surroundings: Surroundings


class _Post:
    """One probe and its thread."""

    def __init__(self, name: str, load: Callable[[], Any], engine: Engine, wanted: Wanted, *, once: bool) -> None:
        self.name = name
        self.probe: Any = None  # not made yet
        self.period_s, self.timeout_s = 0.0, TIMEOUT_S
        self.lasting = False
        self.since: float | None = None  # when the call that is under way began
        self.hung = False  # so far as the engine has said
        self.failed = False
        self._load = load
        self._engine = engine
        self._wanted = wanted
        self._once = once
        self.thread = threading.Thread(target=self._run, name=name[:15], daemon=True)

    def _run(self) -> None:
        luck = random.Random()  # noqa: S311 - against crowds, not against spies
        if not self._make():
            return
        pause = 0.0 if self._once else luck.uniform(0, min(FIRST_S, self.period_s))
        while True:
            time.sleep(pause)
            begun = time.monotonic()
            findings, error = self._call(lambda: _checked(self.probe.check(time.monotonic())))
            self._engine.told(self, findings or (), error)
            if self._once:
                return
            period = max(self.period_s, AFTER_ERROR_S if error else 0.0) * luck.uniform(1 - JITTER, 1 + JITTER)
            pause = max(GAP_S, begun + period - time.monotonic())

    def _make(self) -> bool:
        """Import and make it; False where it is not for this prober, or there is nothing for it to do."""
        made, error = self._call(lambda: _made(self._load(), self._wanted))
        if made is not None:
            self.probe, self.period_s, self.timeout_s, self.lasting = made
        self._engine.made(self, None if made is None and not error else error)
        return made is not None

    def _call(self, work: Callable[[], Any]) -> tuple[Any, str]:
        self.since = time.monotonic()
        result = _guarded(work)
        self.since = None
        return result


class Engine:
    """All probes of one process."""

    def __init__(self) -> None:
        """None is at work."""
        self.fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.roster = Roster()
        self._posts: dict[str, _Post] = {}
        self._absent: dict[str, str] = {}
        self._sieve = Sieve()
        self._news: deque[Finding] = deque(maxlen=NEWS_MAX)
        self._lock = threading.Lock()
        self._changed = False

    def start(self, wanted: Begin, *, once: bool = False) -> list[_Post]:
        """Put those to work that are installed and wanted, and not at work yet. once: for one check each."""
        marks.lay(wanted.marks)
        surroundings = Surroundings(wanted.root, lambda: self.roster, wanted.since, wanted.read, wanted.lookback_s)
        context = Wanted(tuple(wanted.scopes), surroundings)
        with self._lock:
            found = instruments.find(Choice(only=wanted.only, without=wanted.without))
            posts = [_Post(name, load, self, context, once=once) for name, load in found.items() if name not in self._posts]
            self._posts |= {post.name: post for post in posts}
            self._changed = True
        for post in posts:
            post.thread.start()
        return posts

    def once(self, wanted: Begin) -> list[Finding]:
        """One check of each, at the same time; what does not end in its time is told as hanging."""
        posts = self.start(wanted, once=True)
        until = time.monotonic() + ONCE_S
        news: list[Finding] = []
        while (busy := [post for post in posts if post.thread.is_alive() and not post.hung]) and time.monotonic() < until:
            busy[0].thread.join(0.1)
            news += self.news()
        return news + self.news()

    def started(self) -> Started | None:
        """Who looks, where that has changed since the last call."""
        with self._lock:
            changed, self._changed = self._changed, False
            return self._who() if changed else None

    def who(self) -> Started:
        """Who looks now."""
        with self._lock:
            return self._who()

    def _who(self) -> Started:
        return Started(
            threads={name: post.thread.ident or 0 for name, post in self._posts.items()},
            absent=dict(self._absent),
            notes={name: note for name, post in self._posts.items() if (note := _note(post.probe))},
        )

    def news(self) -> list[Finding]:
        """What is to be told since the last call; also looks who hangs. To be called once a second, and when `fd` is readable."""
        now = time.monotonic()
        with self._lock:
            for post in self._posts.values():
                since = post.since
                if since is not None and now - since >= post.timeout_s:
                    post.hung = True
                    self._news += self._sieve.take(f"{post.name} hangs", [_hangs(post, now - since)], now, lasting=True)
            self._news += self._sieve.held(now)
            news = list(self._news)
            self._news.clear()
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(self.fd)
        return news

    def matters(self) -> list[Finding]:
        """What a newcomer should know."""
        with self._lock:
            return self._sieve.matters(time.monotonic())

    def add(self, name: str, findings: Sequence[Finding]) -> None:
        """What somebody else in this process knows to be the matter now, as if a probe `name` had given it."""
        with self._lock:
            told = self._sieve.take(name, findings, time.monotonic(), lasting=True)
            self._news += told
            if told:
                os.eventfd_write(self.fd, 1)

    def counts(self) -> dict[tuple[str, str, str], int]:
        """(probe, kind, class) -> how many were seen."""
        with self._lock:
            return dict(self._sieve.counts)

    # ------------------------------------------------------------------ on the probes' own threads

    def made(self, post: _Post, error: str | None) -> None:
        """It is at work (""), or not: None = not for this prober."""
        with self._lock:
            if post.hung:
                self._news += self._sieve.take(f"{post.name} hangs", [], time.monotonic(), lasting=True)
                post.hung = False
            if error is None:
                del self._posts[post.name]
            elif error:
                del self._posts[post.name]
                self._absent[post.name] = error.removeprefix(_ABSENT)
                if not error.startswith(_ABSENT):
                    text = f"probe {post.name} could not be made: {error}"
                    self._news += self._sieve.take(f"{post.name} fails", [_about(post.name, "probe-fails", text)], time.monotonic())
            else:
                self._absent.pop(post.name, None)
            self._changed = True
            os.eventfd_write(self.fd, 1)

    def told(self, post: _Post, findings: Sequence[Finding], error: str) -> None:
        """A check has ended."""
        if not (findings or error or post.lasting or post.hung or post.failed):
            return
        now = time.monotonic()
        with self._lock:
            told = self._sieve.take(f"{post.name} hangs", [], now, lasting=True) if post.hung else []
            if error:
                wrong = [_about(post.name, "probe-fails", f"probe {post.name}: {error}")]
                told += self._sieve.take(f"{post.name} fails", wrong, now, lasting=True)
            else:
                if post.failed:
                    told += self._sieve.take(f"{post.name} fails", [], now, lasting=True)
                told += self._sieve.take(post.name, findings, now, lasting=post.lasting)
            post.hung, post.failed = False, bool(error)
            self._news += told
            if told:
                os.eventfd_write(self.fd, 1)


_ABSENT: Final = "Absent: "


def _guarded(work: Callable[[], Any]) -> tuple[Any, str]:
    """Call what others wrote: its result, or None and what went wrong. Nothing that it raises comes any further."""
    try:
        return work(), ""
    except Absent as error:
        return None, f"{_ABSENT}{error}"
    except (Exception, SystemExit) as error:  # noqa: BLE001 - the one place around a probe; by SystemExit its thread would end without a word
        return None, f"{type(error).__name__}: {error}"[:500]


def _made(kind: Any, wanted: Wanted) -> tuple[Any, float, float, bool] | None:
    """The probe, its period, its time limit, whether what it gives lasts. None: it is not for this prober."""
    if getattr(kind, "scope", "node") not in wanted.scopes:
        return None
    probe = kind(wanted.surroundings)
    period, timeout = float(probe.period_s), float(getattr(probe, "timeout_s", TIMEOUT_S))
    if not (period > 0 and timeout > 0 and callable(probe.check)):
        raise TypeError(f"a period_s and a timeout_s above 0 and a check expected, {period}, {timeout} and {probe.check!r} found")
    return probe, period, timeout, bool(getattr(probe, "lasting", False))


def _checked(findings: Any) -> Sequence[Finding]:
    """As they will arrive: what is no finding fails here and not at the other end."""
    if not findings:
        return ()
    whole = encode(Sighted(findings=tuple(islice(findings, FINDINGS_MAX))))
    return _decoder.decode(whole[HEADER.size :]).findings


def _note(probe: Any) -> str:
    note, _ = _guarded(lambda: str(getattr(probe, "note", ""))[:500].encode(errors="replace").decode())
    return note or ""


def _about(name: str, kind: str, text: str) -> Finding:
    text = text.encode(errors="replace").decode()
    return Finding(seq=0, kind=kind, probe=name, layer=LAYER, device=f"probe:{name}", class_="ignore", role="context", text=text)


def _hangs(post: _Post, seconds: float) -> Finding:
    meant = _guarded(lambda: _checked([post.probe.hangs(seconds)]))[0] if hasattr(post.probe, "hangs") else None
    if meant:
        return replace(cast("Finding", meant[0]), probe=post.name)
    text = f"probe {post.name} has not answered for {seconds:.0f} s, its limit is {post.timeout_s:.0f} s"
    return _about(post.name, "probe-hangs", text)
