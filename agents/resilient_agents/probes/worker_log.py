"""Worker log: what the workers write on stdout and stderr, and what of it means something.

Think of a reader behind the glass who follows every script at once: he skims pages, reads lines only where a word makes him stop, and
keeps an unfinished sentence in mind until its end has come.

Contract: scope "run". What a worker wrote before the probe was made is not news; of a worker that came later all is read. A finding
carries the worker, its rank and its pid. A traceback is judged as one block, with a few lines after it, because the exception says what
its stack does not. A stream is read `LOOK_BYTES_MAX` at a time; one that gets further ahead than `BEHIND_BYTES_MAX` loses its middle,
which is a finding "log-skipped". What is not UTF-8 is replaced, what has no end of line is cut.

Numbers: a stream may write 16 MB/s for as long as it likes. Of lines without a word that means something 450,000 a second pass on one core,
of lines that all have one 27,000 (tests/bench/test_probe_cost.py).
Rejected: inotify (a watch per file, and it says no more than a read that gives nothing, which takes a microsecond).
"""

from __future__ import annotations

import contextlib
import os
import re
from typing import TYPE_CHECKING, Final

from msgspec.structs import replace

from resilient.core.messages import NONE, Finding

if TYPE_CHECKING:
    from collections.abc import Iterator

    from resilient_agents.probe import Surroundings, Watched

LOOK_S: Final = 0.25
LOOK_BYTES_MAX: Final = 4 << 20
BEHIND_BYTES_MAX: Final = 16 << 20
PIECE_BYTES: Final = 4000  # skimmed as one; the classifier looks at no more of a line
LINE_BYTES_MAX: Final = 1 << 16
BLOCK_LINES_MAX: Final = 300
BLOCK_BYTES_MAX: Final = 1 << 16
AFTER: Final = 8  # lines of an exception's message that are read
END: Final = -1
STREAMS: Final = ("stdout", "stderr")
_START: Final = "Traceback (most recent call last)"
_LINKS: Final = ("During handling of the above exception", "The above exception was the direct cause")
_PREFIX: Final = re.compile(r"(?:\[[A-Za-z_]{0,32}\d{1,7}\]:? ?){1,2}")  # "[rank0]: ", "[default0]:"


class Blocks:
    """Joins the lines of a traceback; all others are blocks of one line. Pure."""

    def __init__(self) -> None:
        """Nothing is open."""
        self._open: list[str] = []
        self._bytes = 0
        self._left = AFTER

    @property
    def waiting(self) -> bool:
        """Whether a traceback has begun and may go on."""
        return bool(self._open)

    def feed(self, line: str) -> list[str]:
        """The blocks that this line completes."""
        if not self._open:
            if _START not in line:
                return [line]
            self._begin(line)
            return []
        bare = _PREFIX.sub("", line, count=1)
        if _START in line or bare.startswith(_LINKS):
            self._left = AFTER
        elif bare.strip() and not bare.startswith((" ", "\t")):
            self._left -= 1
        self._open.append(line)
        self._bytes += len(line)
        done = self._left <= 0 or len(self._open) >= BLOCK_LINES_MAX or self._bytes >= BLOCK_BYTES_MAX
        return self.flush() if done else []

    def flush(self) -> list[str]:
        """What has begun is all there is."""
        whole, self._open = self._open, []
        return ["\n".join(whole)] if whole else []

    def _begin(self, line: str) -> None:
        self._open, self._bytes, self._left = [line], len(line), AFTER


class Tail:
    """One stream of one worker."""

    def __init__(self, path: str, begin: int) -> None:
        """begin: byte, or END. Raises OSError if it cannot be opened yet."""
        self.fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        os.lseek(self.fd, max(0, begin), os.SEEK_END if begin == END else os.SEEK_SET)
        self.skipped = 0
        self._rest = b""
        self._blocks = Blocks()

    def look(self, *, ending: bool) -> tuple[list[str], bool]:
        """Blocks worth a closer look that have come since the last time, and whether the stream is at its end."""
        at, size = os.lseek(self.fd, 0, os.SEEK_CUR), os.fstat(self.fd).st_size
        if size < at:  # emptied by somebody
            at = os.lseek(self.fd, 0, os.SEEK_SET)
        if size - at > BEHIND_BYTES_MAX:
            self.skipped += size - LOOK_BYTES_MAX - at
            os.lseek(self.fd, size - LOOK_BYTES_MAX, os.SEEK_SET)
            self._rest = b""
        data = os.read(self.fd, LOOK_BYTES_MAX)
        if not data:
            rest, self._rest = (self._rest, b"") if ending else (b"", self._rest)
            last = [block for line in _text(rest) for block in self._blocks.feed(line)] if rest else []
            return [*last, *self._blocks.flush()], True
        data = self._rest + data
        end = data.rfind(b"\n") + 1
        self._rest = data[end:]
        if len(self._rest) > LINE_BYTES_MAX:
            end, self._rest = len(data), b""
        return list(self._worth(data[:end])), False

    def close(self) -> None:
        """It is over."""
        os.close(self.fd)

    def _worth(self, data: bytes) -> Iterator[str]:
        """The blocks of those pieces that have a word in them that means something, and of what is open."""
        from resilient_agents.diagnosis.text import relevant  # noqa: PLC0415 - its tables are loaded by those who need them

        begin = 0
        while begin < len(data):
            end = data.rfind(b"\n", begin, begin + PIECE_BYTES) + 1 or data.find(b"\n", begin) + 1 or len(data)
            piece = data[begin:end].decode(errors="replace")
            begin = end
            if self._blocks.waiting or relevant(piece):
                for line in piece.splitlines():
                    yield from self._blocks.feed(line[:LINE_BYTES_MAX])


def _text(data: bytes) -> list[str]:
    return data[:LINE_BYTES_MAX].decode(errors="replace").splitlines()


class WorkerLog:
    """Follows all streams of all workers of the run."""

    name = "worker-log"
    period_s = LOOK_S
    scope = "run"

    def __init__(self, surroundings: Surroundings) -> None:
        """Begins with whoever comes from now on."""
        self._roster = surroundings.roster
        self._tails: dict[tuple[str, str], Tail | None] = {}  # None: read to its end
        self._known: dict[str, Watched] = {}
        self._begin = dict(surroundings.read)
        for worker in surroundings.roster().workers if not surroundings.since else ():
            self._begin |= dict.fromkeys((worker.stdout, worker.stderr), END)

    def check(self, now: float) -> list[Finding]:
        """What the new lines tell."""
        present = {worker.worker: worker for worker in self._roster().workers}
        gone = {name: replace(worker, alive=False) for name, worker in self._known.items() if name not in present}
        self._known = {**gone, **present}  # who is forgotten was alive a moment ago, and its last words are to be read
        findings: list[Finding] = []
        for worker in self._known.values():
            for stream in STREAMS:
                findings += self._look(worker, stream, now)
        for name in gone:
            if all(self._tails.get((name, stream)) is None for stream in STREAMS):
                del self._known[name]
                for stream in STREAMS:
                    self._tails.pop((name, stream), None)
        return findings

    def _look(self, worker: Watched, stream: str, now: float) -> list[Finding]:
        key, path = (worker.worker, stream), str(getattr(worker, stream))
        if key not in self._tails and path:
            with contextlib.suppress(OSError):  # it has not been opened yet
                self._tails[key] = Tail(path, self._begin.get(path, 0))
        if (tail := self._tails.get(key)) is None:
            return []
        blocks, ended = tail.look(ending=not worker.alive)
        findings = [found for block in blocks if (found := self._found(worker, block, stream, now)) is not None]
        if tail.skipped:
            text = f"{worker.worker}: {tail.skipped} bytes of its {stream} came too fast to be read"
            about = {"layer": "probe", "device": "probe:worker-log", "class_": "ignore", "role": "context"}
            findings.append(Finding(seq=0, kind="log-skipped", rank=worker.rank, worker=worker.worker, text=text, t=now, **about))  # type: ignore[arg-type]
            tail.skipped = 0
        if ended and not worker.alive:
            tail.close()
            self._tails[key] = None
        return findings

    def _found(self, worker: Watched, block: str, stream: str, now: float) -> Finding | None:
        from resilient_agents.diagnosis.text import classify  # noqa: PLC0415

        found = classify(block, stream)
        if not found.kind:
            return None
        rank = worker.rank if worker.rank != NONE else found.rank
        return replace(found, probe=self.name, rank=rank, worker=worker.worker, pid=worker.pid, t=now)
