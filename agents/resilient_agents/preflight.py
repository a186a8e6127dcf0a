"""Preflight: the gate before this node, or a repaired device of it, is given work.

Think of the walk around the aircraft: it happens before the passengers board, it has a time by which it must be done, and who has not
finished it does not fly.

Contract: runs `doctor` in a process of its own, so whatever hangs or crashes there hurts nobody here; ends within the limit and
`GRACE_S`. A doctor that does not come to its end, or says what cannot be read, has not let anybody through. Never imports torch.
`admit` looks at the whole node, `recheck` at the device of one local rank (the processor, where there is no GPU). Nothing is decided from
a warning.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from typing import TYPE_CHECKING, Final, NamedTuple

import msgspec

from resilient.core.messages import NONE
from resilient.errors import ResilientError
from resilient_agents.chart import Chart, table

if TYPE_CHECKING:
    from collections.abc import Sequence

    from resilient.config import Options
    from resilient.core.messages import Finding

UNFIT_EXIT: Final = 3  # of resilient-run: another node should be taken; the script was not started
GRACE_S: Final = 10.0  # from the doctor's own limit to ours: it is still killing and counting
ENDING_S: Final = 2.0  # from SIGKILL to the end of its processes, if they can end
RECHECK: Final = ("matmul", "bandwidth", "transfer")
_BOOT: Final = (
    "import sys; sys.path = [p for p in sys.path if p]; from resilient_agents import doctor, kernel; "
    "kernel.die_with(int(sys.argv.pop(1))); sys.exit(doctor.main())"
)
_OUTPUT_BYTES: Final = 8 << 20


class Unfit(ResilientError):
    """This node must not take part; the message ends with the table. `resilient-run` exits with UNFIT_EXIT."""


class Verdict(NamedTuple):
    """Whether the gate opens."""

    sound: bool
    text: str  # for people: the table, or why there is none
    findings: tuple[Finding, ...] = ()


async def admit(options: Options) -> None:
    """This node, before it is reported to anybody. Raises Unfit. `--preflight off` lets it through unseen."""
    if options.preflight == "off":
        return
    arguments = ["--run-dir", options.run_dir or "runs", "--memory-dir", options.memory_dir, "--root", options.probe_root]
    arguments += ["--policy", options.policy] if options.policy else []
    if options.checkpoint and "://" not in options.checkpoint:
        arguments += ["--checkpoint", options.checkpoint]
    if options.preflight == "quick":
        arguments.append("--quick")
    verdict = await _examined(arguments, options.preflight_timeout_s)
    if not verdict.sound:
        raise Unfit(f"this node failed its preflight (--preflight {options.preflight}) and takes no part\n{verdict.text}")


async def recheck(local_rank: int, timeout_s: float, pids: set[int] | None = None) -> Verdict:
    """The device of one local rank (NONE: all there are), before it is used again. pids: where the doctor's is while it is at work."""
    device = ["--devices", str(local_rank)] if local_rank != NONE and _has_gpus() else []
    return await _examined(["--quick", "--only", ",".join(RECHECK), *device], timeout_s, pids)


def _has_gpus() -> bool:
    return os.path.isdir("/proc/driver/nvidia/gpus")


async def _examined(arguments: Sequence[str], timeout_s: float, pids: set[int] | None = None) -> Verdict:
    try:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-u", "-c", _BOOT, str(os.getpid()), "--json", "--timeout-s", str(timeout_s), *arguments),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            limit=_OUTPUT_BYTES,
            start_new_session=True,
        )
    except OSError as error:
        return Verdict(sound=False, text=f"resilient doctor: it could not be started ({error.strerror or error})")
    pids = set() if pids is None else pids
    pids.add(process.pid)
    try:
        async with asyncio.timeout(timeout_s + GRACE_S):
            told, said = await process.communicate()
    except TimeoutError:
        return Verdict(sound=False, text=f"resilient doctor: an end within {timeout_s:g} s expected, none found {GRACE_S:g} s after that")
    finally:
        await _end(process)
        pids.discard(process.pid)
    try:
        chart = msgspec.json.decode(told, type=Chart)
    except msgspec.MsgspecError:
        last = said.decode("utf-8", "replace").strip().rpartition("\n")[2] or "nothing"
        return Verdict(sound=False, text=f"resilient doctor: a chart expected, exit code {process.returncode} found, and: {last}")
    return Verdict(chart.sound, table(chart).rstrip(), chart.findings)


async def _end(process: asyncio.subprocess.Process) -> None:
    """Leave nothing of it, whatever happened."""
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(process.wait(), ENDING_S)
