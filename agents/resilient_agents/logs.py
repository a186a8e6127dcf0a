"""Logs: where a worker's output goes, and what of it is seen on the console.

Think of a newspaper's archive and its front page: everything is filed, some of it is shown.

Contract: files lie as torchrun lays them, `<base>/<run id>_<random>/attempt_<n>/<local rank>/{stdout.log,stderr.log,error.json}`, and
beside them `standby_<m>/` for workers that began without a chair. A worker writes its files itself, so its output needs nobody and outlives
everybody. Lines of seated workers are also shown, whole, behind torchrun's prefix `[default0]:`; redirected streams (-r without -t)
are filed only. A standby's lines are shown from when it takes a chair.
One thread copies from the files to the console: a terminal that is stopped stops that thread and nothing else. It reads a bounded piece
at a time and holds at most one unfinished line per stream; what is not UTF-8 passes as it is.
"""

from __future__ import annotations

import contextlib
import logging
import os
import string
import tempfile
import threading
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from resilient_agents.orders import Launch

PERIOD_S: Final = 0.05
PIECE_BYTES: Final = 1 << 16
LINE_BYTES_MAX: Final = 1 << 16  # a longer line is shown in parts
LINES_MAX: Final = 1000  # of our own, waiting for a console that does not take them
NAMES: Final = ("stdout", "stderr")


class Files:
    """The files of one worker. "" where output goes straight to the console (--log-dir /dev/null)."""

    def __init__(self, directory: Path | None) -> None:
        """Make the directory."""
        self.directory = directory
        if directory is not None:
            directory.mkdir(parents=True)

    def path(self, name: str) -> str:
        """Of "stdout.log", "stderr.log", "error.json", "stacks.txt"."""
        return "" if self.directory is None else str(self.directory / name)


class Archive:
    """Gives each worker its files."""

    def __init__(self, base: str, run_id: str) -> None:
        """Make this agent's directory under `base`. Raises OSError if that cannot be."""
        self._root: Path | None = None
        self._standbys = 0
        if base != os.devnull:
            Path(base).mkdir(parents=True, exist_ok=True)
            self._root = Path(tempfile.mkdtemp(prefix=f"{run_id}_", dir=base))

    def files(self, attempt: int, local_rank: int, role: str) -> Files:
        """New files for one worker; `attempt` counts restarts of the whole group."""
        if self._root is None:
            return Files(None)
        directory = self._root / f"attempt_{attempt}"
        chair = directory / str(local_rank)
        if role == "rank" and not chair.exists():
            return Files(chair)
        self._standbys += 1
        return Files(directory / f"standby_{self._standbys}")

    def filtered(self, name: str) -> str:
        """torchrun's file for --duplicate-stdout-filters; of the first attempt."""
        return "" if self._root is None else str(self._root / "attempt_0" / f"filtered_{name}.log")


class _Tail:
    """One stream of one worker on its way to the console."""

    def __init__(self, path: str, prefix: bytes, out: int) -> None:
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115 - open as long as it is followed
        self._prefix = prefix
        self._rest = b""
        self.out = out
        self.ending = False

    def seek_to_end(self) -> None:
        self._file.seek(0, os.SEEK_END)

    def lines(self) -> tuple[list[bytes], bool] | None:
        """Whole lines that have come, and whether to look again at once; None when the stream has ended and all of it was given."""
        data = self._file.read(PIECE_BYTES)
        *whole, self._rest = (self._rest + data).split(b"\n")
        if len(self._rest) >= LINE_BYTES_MAX or (self.ending and not data and self._rest):
            whole.append(self._rest)
            self._rest = b""
        if not whole and not data and self.ending:
            self._file.close()
            return None
        return [self._prefix + line + b"\n" for line in whole], bool(data)


class Console:
    """The thread that shows things."""

    def __init__(self, launch: Launch, archive: Archive) -> None:
        """Follows nothing yet; `start` starts the thread."""
        self._launch = launch
        self._archive = archive
        self._lock = threading.Lock()
        self._tails: dict[str, list[_Tail]] = {}
        self._said: deque[bytes] = deque(maxlen=LINES_MAX)
        self._ending = threading.Event()
        self._dead: set[int] = set()  # descriptors that nobody reads any more
        self._filters = (launch.stdout_filters, launch.stderr_filters)
        self._thread = threading.Thread(target=self._run, name="console", daemon=True)

    def start(self) -> None:
        """Begin to show."""
        self._thread.start()

    def say(self, line: str) -> None:
        """Show a line of our own on stderr. Never blocks."""
        self._said.append(f"resilient-run: {line}\n".encode(errors="replace"))

    def follow(self, worker: str, files: Files, rank: int, local_rank: int, *, from_now: bool) -> None:
        """Show this worker's output, from its beginning or from now on; once is enough."""
        launch = self._launch
        with self._lock:
            if worker in self._tails or files.directory is None:
                return
            tails: list[_Tail] = []
            if not launch.local_ranks_shown or local_rank in launch.local_ranks_shown:
                only_filed = _of(launch.redirects, local_rank) & ~_of(launch.tee, local_rank)
                for i, name in enumerate(NAMES):
                    with contextlib.suppress(OSError):  # a full disk: the worker will say so itself
                        if not only_filed & (1 << i):
                            Path(files.path(f"{name}.log")).touch()
                            tails.append(_Tail(files.path(f"{name}.log"), self._prefix(rank, local_rank), i + 1))
            for tail in tails if from_now else ():
                tail.seek_to_end()
            self._tails[worker] = tails

    def _prefix(self, rank: int, local_rank: int) -> bytes:
        template = self._launch.prefix_template
        if template:
            values = {"role_name": self._launch.role, "rank": rank, "local_rank": local_rank}
            return string.Template(template).safe_substitute(values).encode()
        return f"[{self._launch.role}{local_rank}]:".encode()

    def ended(self, worker: str) -> None:
        """This worker writes no more: show the rest, then close."""
        with self._lock:
            for tail in self._tails.get(worker, ()):
                tail.ending = True

    def close(self, timeout_s: float) -> None:
        """Show the rest of everything, for at most this long (somebody may have stopped the terminal)."""
        with self._lock:
            for tails in self._tails.values():
                for tail in tails:
                    tail.ending = True
        self._ending.set()
        self._thread.join(timeout_s)

    # ------------------------------------------------------------------ the thread

    def _run(self) -> None:
        ending = False
        while not ending:
            ending = self._ending.wait(PERIOD_S)
            while self._show_some():
                pass

    def _show_some(self) -> bool:
        """One piece of every stream. True if there may be more."""
        moved = False
        while self._said:
            self._write(2, self._said.popleft())
        with self._lock:
            following = [(worker, tail) for worker, tails in self._tails.items() for tail in tails]
        for worker, tail in following:
            found = tail.lines()
            if found is None:
                with self._lock:
                    self._tails[worker].remove(tail)
                continue
            lines, more = found
            moved |= more or tail.ending
            if lines:
                self._write(tail.out, b"".join(lines))
                self._filter(tail.out, lines)
        return moved

    def _write(self, out: int, data: bytes) -> None:
        if out in self._dead:
            return
        try:
            while data:
                data = data[os.write(out, data) :]
        except OSError:  # the pipe's reader has gone; training goes on, the files have it all
            self._dead.add(out)

    def _filter(self, out: int, lines: list[bytes]) -> None:
        """--duplicate-stdout-filters and --duplicate-stderr-filters."""
        words = [word.encode() for word in self._filters[out - 1]]
        kept = [line for line in lines if any(word in line for word in words)]
        path = self._archive.filtered(NAMES[out - 1])
        if kept and path:
            with contextlib.suppress(OSError), open(path, "ab") as file:
                file.write(b"".join(kept))


def _of(settings: tuple[int, ...], local_rank: int) -> int:
    """The setting for a chair; one that came here from a lost node has a number beyond --nproc-per-node."""
    return settings[local_rank % len(settings)]


class _ConsoleHandler(logging.Handler):
    """Log lines go the way of all lines: a stopped terminal must not stop the agent."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        self._console.say(self.format(record))


def log_to(console: Console, level: str) -> None:
    """What the library logs is said there, from this level on."""
    handler = _ConsoleHandler(console)
    handler.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger("resilient")
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    root.propagate = False
