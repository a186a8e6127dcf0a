"""Kernel: the few Linux calls that a supervisor needs and Python's `os` does not offer.

Contract: no state. Functions that look at another process say None (or nothing) when it is gone: that is an answer, not an error.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import time
from typing import Final, NamedTuple

PR_SET_PDEATHSIG: Final = 1
PR_SET_CHILD_SUBREAPER: Final = 36
PR_SET_PTRACER: Final = 0x59616D61  # "Yama"
TICKS_PER_S: Final = os.sysconf("SC_CLK_TCK")

_libc = ctypes.CDLL(None, use_errno=True)


def _prctl(option: int, value: int) -> None:
    if _libc.prctl(option, value, 0, 0, 0) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"prctl({option}): {os.strerror(code)}")


def adopt_orphans() -> None:
    """From now on, descendants whose parent dies become this process's children (child subreaper)."""
    _prctl(PR_SET_CHILD_SUBREAPER, 1)


def die_with(parent: int) -> None:
    """SIGKILL this process when `parent` dies; exit at once if it is dead already."""
    _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def allow_peeping(by: int) -> None:
    """`by` and what it starts may read this process's memory, where Yama would let only its ancestors. Nothing where there is no Yama."""
    with contextlib.suppress(OSError):
        _prctl(PR_SET_PTRACER, by)


class Stat(NamedTuple):
    """What /proc/<pid>/stat says."""

    state: str  # R S D T t Z ...
    parent: int
    session: int
    cpu_s: float  # user + system, of all threads
    start_ticks: int  # since boot: with the pid, names a process for ever


def stat(pid: int) -> Stat | None:
    """The process's state; None if there is no such process."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            data = file.read()
    except OSError:
        return None
    fields = data[data.rindex(b")") + 2 :].split()  # the name before may hold spaces and brackets
    return Stat(
        state=fields[0].decode(),
        parent=int(fields[1]),
        session=int(fields[3]),
        cpu_s=(int(fields[11]) + int(fields[12])) / TICKS_PER_S,
        start_ticks=int(fields[19]),
    )


def catches(pid: int, number: signal.Signals) -> bool:
    """Whether the process has a handler for this signal: without one, SIGUSR2 would end it."""
    try:
        with open(f"/proc/{pid}/status", encoding="ascii", errors="replace") as file:
            lines = [line for line in file if line.startswith("SigCgt:")]
    except OSError:
        return False
    return bool(lines) and bool(int(lines[0].split()[1], 16) >> (number - 1) & 1)


def thread_names() -> list[str]:
    """Names of this process's threads, the main one first."""
    names = []
    for task in sorted(os.listdir("/proc/self/task"), key=int):
        with contextlib.suppress(OSError), open(f"/proc/self/task/{task}/comm", encoding="utf-8", errors="replace") as file:
            names.append(file.read().strip())
    return names


def children(parent: int) -> list[int]:
    """Pids whose parent is `parent`, zombies too."""
    pids = [int(name) for name in os.listdir("/proc") if name.isdigit()]
    return [pid for pid in pids if (seen := stat(pid)) is not None and seen.parent == parent]


def collect(pid: int, timeout_s: float) -> int | None:
    """Reap a child that has ended or is about to: its exit code (Python's convention), None if it did not end in time.

    Not by pidfd: an event loop makes those non-blocking, and waiting on one then fails instead of waiting.
    """
    until = time.monotonic() + timeout_s
    while (found := os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG)) is None:
        if time.monotonic() >= until:
            return None
        time.sleep(0.001)
    return found.si_status if found.si_code == os.CLD_EXITED else -found.si_status


def kill_group(group: int, number: int) -> bool:
    """Signal a process group; False if there is none. Only for a leader that is not reaped: its number is then not given away."""
    try:
        os.killpg(group, number)
    except (ProcessLookupError, PermissionError):
        return False
    return True
