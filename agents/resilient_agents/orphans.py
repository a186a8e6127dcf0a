"""Orphans: processes that became the agent's children because their own parent died.

Think of a guardian who takes in whoever is left behind: collects the dead, and at the end of the day sends home only the own household.

Contract: `known` are the children whose end somebody else waits for; they are never collected here. A process that made a session of
its own in a worker (a daemon, on purpose) is left alone, as torchrun leaves it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time

from resilient_agents import kernel


def reap(known: set[int]) -> None:
    """Collect those that have ended."""
    with contextlib.suppress(ChildProcessError):
        while (found := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)) is not None:
            if found.si_pid in known:
                return  # what waits behind it, the next time
            os.waitpid(found.si_pid, os.WNOHANG)


def kill_unknown(known: set[int]) -> None:
    """Kill workers that nobody knows: a zygote may die between a fork and its answer. They lead a session, as all workers do."""
    for pid in kernel.children(os.getpid()):
        seen = kernel.stat(pid)
        if seen is not None and seen.session == pid and pid not in known:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def kill_sessions(sessions: set[int], timeout_s: float) -> None:
    """Kill and collect what is left of these workers' sessions. What those leave becomes ours in turn, so look until none is left."""
    until = time.monotonic() + timeout_s
    while time.monotonic() < until:
        left = [pid for pid in kernel.children(os.getpid()) if (seen := kernel.stat(pid)) is not None and seen.session in sessions]
        for pid in left:
            with contextlib.suppress(ProcessLookupError, ChildProcessError):
                os.kill(pid, signal.SIGKILL)
                kernel.collect(pid, timeout_s)
        if not left:
            return
