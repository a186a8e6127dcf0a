"""Workers: one process of the user's script, as its agent holds it.

Contract: a `Worker` is its page (there before the process, kept after its death until `forget`), its files, and a pidfd, which is the
process for ever: a signal through it never hits a stranger that got the same pid. When it dies its whole process group is
killed before it is reaped, because what it forked (data loaders) holds its sockets open and would keep its neighbours waiting.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
from typing import TYPE_CHECKING, Final

from resilient.core.machine import Fork, Look
from resilient.core.messages import NONE
from resilient.wire.page import Page
from resilient_agents import kernel

if TYPE_CHECKING:
    from resilient_agents.logs import Files
    from resilient_agents.orders import Launch

DYING_S: Final = 1.0  # between SIGKILL and the end, where nobody has waited for the pidfd
TEXT_BYTES_MAX: Final = 16 << 10  # of a traceback


class Worker:
    """One process."""

    def __init__(self, fork: Fork, page: str, files: Files) -> None:
        """Make its page at `page`. Raises OSError if the memory is full."""
        self.fork = fork
        self.name = fork.worker
        self.files = files
        self.page = Page(page, create=True)
        self.chair = NONE  # the rank it was last seated as
        self.pid = 0
        self.pidfd = -1
        self.exit_code: int | None = None
        self._last_stat: kernel.Stat | None = None

    def born(self, pid: int) -> None:
        """It has been forked; `pid` is our child and not reaped."""
        self.pid = pid
        self.pidfd = os.pidfd_open(pid)

    @property
    def alive(self) -> bool:
        """Forked and not reaped."""
        return self.pidfd >= 0

    def signal(self, number: int) -> None:
        """Signal the process and what it forked, as torchrun does (its process group). Nothing if it is gone."""
        if self.alive and not kernel.kill_group(self.pid, number):
            with contextlib.suppress(ProcessLookupError):  # it has not made its group yet, or has ended
                signal.pidfd_send_signal(self.pidfd, number)

    def look(self, now_ns: int) -> Look:
        """What its page and /proc say; a dead one's page stays readable."""
        seen = kernel.stat(self.pid) if self.alive else None
        if seen is not None:
            self._last_stat = seen
        last = self._last_stat
        return Look(
            record=self.page.read(now_ns),
            parked=self.page.parked(),
            os_state=seen.state if seen is not None else "Z",
            cpu_s=last.cpu_s if last is not None else 0.0,
            pace=self.page.pace(self.chair) if self.chair != NONE else None,
        )

    def reap(self) -> int:
        """Collect the exit code of a process that has ended (Python's convention: -9 = killed by signal 9)."""
        kernel.kill_group(self.pid, signal.SIGKILL)
        code = kernel.collect(self.pid, DYING_S)
        os.close(self.pidfd)
        self.pidfd = -1
        self.exit_code = -signal.SIGKILL if code is None else code  # stuck in the kernel: init will collect it
        return self.exit_code

    def error_text(self) -> str:
        """What it wrote into torchrun's error file: the traceback, or else the message; "" if there is none."""
        try:
            with open(self.files.path("error.json") or os.devnull, encoding="utf-8", errors="replace") as file:
                message = json.load(file)["message"]
        except (OSError, ValueError, KeyError, TypeError):
            return ""
        if isinstance(message, dict):
            message = message.get("extraInfo", {}).get("py_callstack") or message.get("message", "")
        return str(message)[-TEXT_BYTES_MAX:]

    def forget(self) -> None:
        """Unmap and unlink its page."""
        self.page.close()
        with contextlib.suppress(OSError):
            os.unlink(self.page.path)


def environment(fork: Fork, launch: Launch, run: dict[str, str]) -> dict[str, str]:
    """torchrun's variables for this worker, and ours. `run`: those that are the same for all workers of this node."""
    host, _, port = fork.store.rpartition(":")
    env = {
        "RANK": str(fork.rank),
        "LOCAL_RANK": str(fork.local_rank),
        "WORLD_SIZE": str(fork.world_size),
        "LOCAL_WORLD_SIZE": str(fork.local_world_size),
        "GROUP_RANK": str(fork.node_rank),
        "GROUP_WORLD_SIZE": str(fork.nodes),
        "ROLE_RANK": str(fork.rank),
        "ROLE_NAME": launch.role,
        "ROLE_WORLD_SIZE": str(fork.world_size),
        "MASTER_ADDR": host,
        "MASTER_PORT": port,
        "TORCHELASTIC_RESTART_COUNT": str(fork.restart),
        "TORCHELASTIC_MAX_RESTARTS": str(launch.max_restarts),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_SIGNALS_TO_HANDLE": ",".join(launch.signals),
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": os.environ.get("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1"),
        "RESILIENT_WORKER": fork.worker,
        "RESILIENT_ROLE": fork.role,
        **run,
    }
    if launch.virtual_local_rank:
        env["LOCAL_RANK"] = "0"
        env["CUDA_VISIBLE_DEVICES"] = shown_devices(launch, fork.local_rank) or ""
    return env


def shown_devices(launch: Launch, local_rank: int) -> str | None:
    """CUDA_VISIBLE_DEVICES of the worker on this chair; None = unset."""
    devices = os.environ.get("CUDA_VISIBLE_DEVICES")
    if not launch.virtual_local_rank:
        return devices
    mine = [str(local_rank)] if devices is None else [entry.strip() for entry in devices.split(",")][local_rank : local_rank + 1]
    return "".join(mine)
