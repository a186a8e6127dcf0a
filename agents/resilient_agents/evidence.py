"""Evidence: what the processes were doing when something went wrong, saved before anybody is killed.

Contract: `ask` sends SIGUSR2 to all at once (faulthandler then writes all threads' stacks, also while the GIL is held) and returns; the
files appear in <run dir>/evidence/<incident>/ a moment later: `<worker>.stacks.txt`, `<worker>.page.json`, `<worker>.proc.txt`, and
`<worker>.flight` where torch's flight recorder has left a dump. A process without a handler is not signalled: the signal would end it.
Who cannot answer (stopped, stuck in the kernel, without a handler) is looked at from outside (stacks.py); where that is refused or not
installed, /proc speaks for it. The first line of the stacks says which of these it was. All at once, each with its own deadline.
`spare` lets a kill wait until that is done, for at most `SPARE_S`.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec

from resilient_agents import kernel, stacks

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from resilient_agents.workers import Worker

PATIENCE_S: Final = 0.25  # a dump of 40 threads takes 5 ms on an idle machine
SPARE_S: Final = 1.0  # a look from outside takes a twentieth of that
RECENT_S: Final = 60.0  # an older dump of the flight recorder is of another hang
FLIGHT_BYTES_MAX: Final = 64 << 20
THREADS_MAX: Final = 64  # of one process, told one by one
QUIET_S: Final = 0.02  # the file grew no more for this long: the dump is whole


class Evidence:
    """Collects for one run directory."""

    def __init__(self, run_dir: Path, flight: Flight | None = None) -> None:
        """Directories are made when there is something to put into them."""
        self._directory = run_dir / "evidence"
        self._flight = flight or Flight()
        self._tasks: dict[asyncio.Task[None], str] = {}

    def ask(self, incident: int, workers: Iterable[Worker], why: str) -> None:
        """Have all of them write their stacks, now; collect later."""
        directory = self._directory / str(incident)
        for worker in workers:
            before = _size(worker.files.path("stacks.txt"))
            answers = worker.alive and kernel.catches(worker.pid, signal.SIGUSR2)
            if answers:
                with contextlib.suppress(ProcessLookupError):
                    signal.pidfd_send_signal(worker.pidfd, signal.SIGUSR2)
            task = asyncio.create_task(self._collect(directory, worker, before, why, answers=answers))
            self._tasks[task] = worker.name
            task.add_done_callback(lambda done: self._tasks.pop(done, None))

    async def spare(self, worker: str) -> None:
        """Until what was asked of this worker is collected."""
        tasks = [task for task, name in self._tasks.items() if name == worker]
        if tasks:
            await asyncio.wait(tasks, timeout=SPARE_S)

    def pending(self, worker: str) -> bool:
        """Whether something was asked of it and has not been collected."""
        return worker in self._tasks.values()

    async def close(self) -> None:
        """Wait for what is under way."""
        if self._tasks:
            await asyncio.wait(list(self._tasks), timeout=SPARE_S)

    async def _collect(self, directory: Path, worker: Worker, before: int, why: str, *, answers: bool) -> None:
        since = time.time()
        self._flight.ask(worker.fork.rank)
        seen = kernel.stat(worker.pid) if worker.alive else None
        path, reason = worker.files.path("stacks.txt"), ""
        if answers and path and seen is not None and seen.state not in "TtZ":
            await _whole(path, before)
        found, source = _tail(path, before) if path else b"", "faulthandler"
        if not found:
            text, reason = await stacks.peep(worker.pid) if seen is not None and seen.state != "Z" else ("", "the process is dead")
            found, source = text.encode(), "py-spy" if text else f"none ({reason}); see {worker.name}.proc.txt"
        with contextlib.suppress(OSError, ValueError):  # a full disk, or a page forgotten meanwhile: evidence is never worth a run
            _save(directory, worker, f"# stacks by {source}\n".encode() + found, why)
            await asyncio.sleep(0)
            self._flight.copy(worker.fork.rank, directory / f"{worker.name}.flight", since - RECENT_S)


class Flight:
    """Torch's flight recorder: what each rank's process group did last, written by torch itself when it is asked or times out."""

    def __init__(self, prefix: str = "", pipe: str = "") -> None:
        """prefix: of the files that it writes; pipe: of the pipes by which it is asked. Torch adds the rank. "" = not in use."""
        self._prefix, self._pipe = prefix, pipe

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> Flight:
        """As the workers' environment says."""
        prefix = environment.get("TORCH_FR_DUMP_TEMP_FILE") or environment.get("TORCH_NCCL_DEBUG_INFO_TEMP_FILE", "")
        return cls(prefix, environment.get("TORCH_NCCL_DEBUG_INFO_PIPE_FILE", ""))

    def ask(self, rank: int) -> None:
        """Have it written, where torch listens for that."""
        if self._pipe:
            with contextlib.suppress(OSError):  # nobody listens
                fd = os.open(f"{self._pipe}{rank}.pipe", os.O_WRONLY | os.O_NONBLOCK)
                try:
                    os.write(fd, b"1\n")
                finally:
                    os.close(fd)

    def copy(self, rank: int, to: Path, since: float) -> None:
        """Keep what it has written after `since` (unix seconds)."""
        if not self._prefix:
            return
        file = Path(f"{self._prefix}{rank}")
        with contextlib.suppress(FileNotFoundError):
            found = file.stat()
            if found.st_mtime >= since and found.st_size <= FLIGHT_BYTES_MAX:
                shutil.copyfile(file, to)


def _save(directory: Path, worker: Worker, stacks_: bytes, why: str) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "why.txt").write_text(why + "\n", encoding="utf-8")
    page = worker.page
    groups = [{"group": f"{t.name:x}", "entered": t.entered, "completed": t.completed} for t in page.groups()]
    content = {"worker": worker.name, "rank": worker.fork.rank, "pid": worker.pid, "record": page.read(), "groups": groups}
    (directory / f"{worker.name}.page.json").write_bytes(msgspec.json.format(msgspec.json.encode(content)))
    (directory / f"{worker.name}.proc.txt").write_text(_proc(worker.pid), encoding="utf-8")
    (directory / f"{worker.name}.stacks.txt").write_bytes(stacks_)


async def _whole(path: str, before: int) -> None:
    """Until the file has grown and stopped growing."""
    until = time.monotonic() + PATIENCE_S
    size, changed = before, time.monotonic()
    while time.monotonic() < until:
        await asyncio.sleep(0.005)
        now = _size(path)
        if now != size:
            size, changed = now, time.monotonic()
        elif size > before and time.monotonic() - changed > QUIET_S:
            return


def _size(path: str) -> int:
    try:
        return os.stat(path).st_size if path else 0
    except OSError:
        return 0


def _tail(path: str, start: int) -> bytes:
    try:
        with open(path, "rb") as file:
            file.seek(start)
            return file.read(1 << 20)
    except OSError:
        return b""


def _proc(pid: int) -> str:
    """What the kernel says about the process, and where each of its threads waits."""
    lines = [_said(f"/proc/{pid}/{name}") for name in ("stat", "wchan", "syscall", "status")]
    try:
        threads = sorted(os.listdir(f"/proc/{pid}/task"), key=int)
    except OSError:
        threads = []
    lines += [
        _said(f"/proc/{pid}/task/{thread}/{name}") for thread in threads[:THREADS_MAX] for name in ("comm", "wchan", "syscall", "stack")
    ]
    return "\n".join(lines)


def _said(path: str) -> str:
    name = path.split("/", 3)[3]
    try:
        return f"--- {name}\n" + Path(path).read_text(errors="replace")
    except OSError as error:
        return f"--- {name}: {error.strerror}\n"
