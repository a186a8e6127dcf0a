"""Evidence: what the processes were doing when something went wrong, saved before anybody is killed.

Contract: `ask` sends SIGUSR2 to all at once (faulthandler then writes all threads' stacks, also while the GIL is held) and returns; the
files appear in <run dir>/evidence/<incident>/ a moment later: `<worker>.stacks.txt`, `<worker>.page.json`, `<worker>.proc.txt`. A process
that has no handler is not signalled, because the signal would end it; one that is stopped cannot answer, and /proc speaks for it.
`spare` lets a kill wait until the process has answered, for at most `PATIENCE_S`.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec

from resilient_agents import kernel

if TYPE_CHECKING:
    from collections.abc import Iterable

    from resilient_agents.workers import Worker

PATIENCE_S: Final = 0.25  # a dump of 40 threads takes 5 ms on an idle machine
QUIET_S: Final = 0.02  # the file grew no more for this long: the dump is whole


class Evidence:
    """Collects for one run directory."""

    def __init__(self, run_dir: Path) -> None:
        """Directories are made when there is something to put into them."""
        self._directory = run_dir / "evidence"
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
            await asyncio.wait(tasks, timeout=2 * PATIENCE_S)

    def pending(self, worker: str) -> bool:
        """Whether something was asked of it and has not been collected."""
        return worker in self._tasks.values()

    async def close(self) -> None:
        """Wait for what is under way."""
        if self._tasks:
            await asyncio.wait(list(self._tasks), timeout=2 * PATIENCE_S)

    async def _collect(self, directory: Path, worker: Worker, before: int, why: str, *, answers: bool) -> None:
        seen = kernel.stat(worker.pid) if worker.alive else None
        stacks = worker.files.path("stacks.txt")
        if answers and stacks and seen is not None and seen.state not in "TtZ":
            await _whole(stacks, before)
        with contextlib.suppress(OSError, ValueError):  # a full disk, or a page forgotten meanwhile: evidence is never worth a run
            _save(directory, worker, before, why)


def _save(directory: Path, worker: Worker, before: int, why: str) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "why.txt").write_text(why + "\n", encoding="utf-8")
    page, stacks = worker.page, worker.files.path("stacks.txt")
    groups = [{"group": f"{key:x}", "entered": entered, "completed": completed} for key, entered, completed in page.groups()]
    content = {"worker": worker.name, "rank": worker.fork.rank, "pid": worker.pid, "record": page.read(), "groups": groups}
    (directory / f"{worker.name}.page.json").write_bytes(msgspec.json.format(msgspec.json.encode(content)))
    (directory / f"{worker.name}.proc.txt").write_text(_proc(worker.pid), encoding="utf-8")
    if stacks:
        (directory / f"{worker.name}.stacks.txt").write_bytes(_tail(stacks, before))


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
    """What the kernel says about every thread."""
    lines = []
    for name in ("stat", "wchan", "syscall", "status"):
        try:
            lines.append(f"--- {name}\n" + Path(f"/proc/{pid}/{name}").read_text(errors="replace"))
        except OSError as error:
            lines.append(f"--- {name}: {error.strerror}\n")
    return "\n".join(lines)
