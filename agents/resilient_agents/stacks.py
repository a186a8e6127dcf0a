"""Stacks: what the Python threads of a process are doing, from outside of it.

Think of a doctor at the bed of somebody who does not answer: he looks under the eyelids. faulthandler is the question, and whoever can
answers it (evidence.py); this is for a process that is stopped, stuck in the kernel, or has no handler.

Contract: `peep` runs `py-spy dump --nonblocking` (extra `stacks`), which reads the other process's memory without stopping it, and returns
what it printed, or in one line why there is nothing: not installed, refused by the kernel, too slow. It never raises and takes at most
`PEEP_S`; so many at a time as `AT_ONCE`. A worker allows it to its agent and what the agent starts (kernel.allow_peeping), so that Yama's
ptrace_scope 1 refuses nothing; 2 and 3, and containers without CAP_SYS_PTRACE for another user's processes, do.
Numbers: 26 to 43 ms each on an idle machine, also while the GIL is held and while the process is stopped.
Rejected: --native (0.1 to 2.3 s, and it fails when the process is stopped); gdb (seconds, and it stops what it looks at).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import sys
from typing import Final

PEEP_S: Final = 2.0  # fifty times what it takes on an idle machine
BURIAL_S: Final = 0.2  # from a kill to the end
AT_ONCE: Final = 4
OUTPUT_MAX: Final = 1 << 20

_turns: dict[asyncio.AbstractEventLoop, asyncio.Semaphore] = {}


def program() -> str | None:
    """Where py-spy is: beside our Python, or on the path."""
    return shutil.which("py-spy", path=os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", os.defpath)]))


async def peep(pid: int) -> tuple[str, str]:
    """(stacks, "") or ("", why there are none)."""
    found = program()
    if found is None:
        return "", "py-spy is not installed (pip install 'resilient-run[stacks]')"
    turn = _turns.setdefault(asyncio.get_running_loop(), asyncio.Semaphore(AT_ONCE))
    try:
        async with asyncio.timeout(PEEP_S), turn:
            return await _run(found, pid)
    except TimeoutError:
        return "", f"py-spy took more than {PEEP_S:.0f} s"
    except OSError as error:
        return "", f"{found}: {error.strerror}"


async def _run(found: str, pid: int) -> tuple[str, str]:
    process = await asyncio.create_subprocess_exec(
        found,
        "dump",
        "--nonblocking",
        "--pid",
        str(pid),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    try:
        output, errors = await asyncio.gather(_all(process.stdout), _all(process.stderr))
        if b"Thread" in output:
            return output.decode(errors="replace"), ""
        said = errors.decode(errors="replace").strip().splitlines()
        return "", f"py-spy: {said[-1] if said else 'nothing was printed'}"
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        with contextlib.suppress(TimeoutError):  # somebody else (orphans.py) may have collected it
            await asyncio.wait_for(process.wait(), BURIAL_S)


async def _all(stream: asyncio.StreamReader) -> bytes:
    """To its end, or so much of it as is kept."""
    found = b""
    while len(found) < OUTPUT_MAX and (piece := await stream.read(OUTPUT_MAX - len(found))):
        found += piece
    return found
