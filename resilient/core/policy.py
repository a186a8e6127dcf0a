"""Policy: what a finding means.

Think of triage in a hospital: the nurse at the door does not treat anybody, she reads the symptom and says who goes where. The table is
hers, it can be read aloud, and no finding is without a line in it.

Contract: `judge` is pure but for `Trials`, which remembers which exceptions were seen at which step. Hardware is never the user's fault:
a text that says so wins over everything else, and costs no restart. An exception that leaves a broken step is nobody's fault.
The same exception at the same step twice, or on two ranks before any step was done, is the program's: another try would not help.
The texts are those of torch, NCCL, gloo, CUDA and HCCL as their sources and users' logs show them; "out of memory", "invalid argument"
and a failed device-side assert are deliberately absent: they are the program's.
"""

from __future__ import annotations

import re
from typing import Final

from resilient.core.messages import NONE, Finding, Msg, VerdictName


class Verdict(Msg):
    """What to do about one finding."""

    verdict: VerdictName
    why: str


TABLE: Final[dict[str, Verdict]] = {
    "exit": Verdict(verdict="replace", why="the process is gone"),
    "stopped": Verdict(verdict="replace", why="the process is stopped and its neighbours are not"),
    "stalled": Verdict(verdict="watch", why="no progress; who is to blame is seen when all reports are in"),
    "suspect": Verdict(verdict="watch", why="a collective failed; the round is formed again, with whoever is alive"),
    "node_lost": Verdict(verdict="replace", why="the node is silent"),
    "fork_failed": Verdict(verdict="replace", why="the worker could not be started"),
    "refused": Verdict(verdict="restart", why="a copy is damaged; another one is taken"),
    "unrecorded": Verdict(verdict="restart", why="the set-up was too large to be kept, so a newcomer cannot repeat it alone"),
    "store_lost": Verdict(verdict="restart", why="the store process is started again"),
    "zygote_lost": Verdict(verdict="restart", why="the zygote is started again"),
    "standby_lost": Verdict(verdict="restart", why="it had no chair; another one is warmed up"),
    "standbys_off": Verdict(verdict="watch", why="standbys die again and again; newcomers are forked when needed"),
    "allocation": Verdict(verdict="halt", why="the node has no room for the copies of its state"),
    "no_room": Verdict(verdict="watch", why="a chair waits for a node with room"),
}
UNKNOWN: Final = Verdict(verdict="watch", why="no rule for this kind of finding")

# Lower case, to be found in the lower-cased text of an exception: infrastructure, not the program. One line per layer.
_INFRASTRUCTURE: Final = (
    # torch and gloo: a peer, a link or the store went away
    r"connection closed by peer|connection reset by peer|connection refused|broken pipe|read error \[|write error \[|no route to host",
    r"timed out waiting \d+ms for (recv|send) operation|connectfullmesh failed|application timeout caused pair closure",
    r"watchdog caught collective operation timeout|timed out in blocking wait|heartbeat monitor timed out|watchdog got stuck",
    r"diststoreerror|distnetworkerror|socket timeout|recvvalue failed|sendbytes failed|rendezvous(timeout|connection|closed)error",
    r"dataloader worker .* killed by signal",
    # NCCL: everything but invalid argument and invalid usage
    r"nccl(unhandledcuda|system|internal|remote)error|unhandled (cuda|system) error|remote process exited|nccl communicator was aborted",
    r"async fatal event|exceeded error retry count|ibv_\w+ .*failed|got completion from peer|port error|connection closed by remote peer",
    # CUDA and the device
    r"uncorrectable (ecc|nvlink) error|hardware stack error|device\(s\) is/are busy or unavailable|no cuda-capable device",
    r"cuda error: (unspecified launch failure|unknown error|initialization error|system not yet initialized|driver shutting down)",
    r"fallen off the bus|gpu is lost|\becc error|nvrm: xid|\bxid \(pci|sxid|memory page retirement|row remapp",
    # Ascend
    r"\be[ij]000[126]\b|\bee1002\b|507046|507048|507054|hccl .*time-?out",
    # the host
    r"input/output error|stale file handle|remote i/o error|bus error|no space left on device: '/dev/shm",
)
_CUDA_BY_PROGRAM: Final = re.compile(
    r"out of memory|device-side assert|illegal memory access|illegal instruction|misaligned address|invalid pc|invalid device ordinal"
    r"|no kernel image|driver version is insufficient"
)
_PATTERN: Final = re.compile("|".join(_INFRASTRUCTURE) + r"|cuda error")


def infrastructure(text: str) -> str:
    """The words in `text` that mean infrastructure, "" if there are none.

    Only the last line that is not blank counts: it is the exception; the lines above it quote source code.
    """
    lines = [line for line in text.lower().splitlines() if line.strip()]
    last = _message(lines)
    found = _PATTERN.search(last)
    if found is None or (found[0] == "cuda error" and _CUDA_BY_PROGRAM.search(last)):
        return ""
    return found[0]


def _message(lines: list[str]) -> str:
    """From the traceback's last unindented `Type: text` line to the end: messages of torch go over several lines."""
    frames = [i for i, line in enumerate(lines) if line.startswith(("  file ", "    "))]
    return "\n".join(lines[frames[-1] + 1 :] if frames else lines)


class Trials:
    """Which exceptions were seen, where and when."""

    def __init__(self) -> None:
        """Nothing seen yet."""
        self._ranks: dict[tuple[int, str], set[int]] = {}  # (step, fingerprint) -> ranks
        self._count: dict[tuple[int, str], int] = {}

    def add(self, finding: Finding) -> tuple[int, int]:
        """Take in an exception; returns how often it was seen at this step, and on how many ranks."""
        key = (finding.step, finding.fingerprint)
        self._count[key] = self._count.get(key, 0) + 1
        self._ranks.setdefault(key, set()).add(finding.rank)
        return self._count[key], len(self._ranks[key])


def judge(finding: Finding, trials: Trials) -> Verdict:
    """The verdict on one finding. Exceptions are remembered in `trials`."""
    if finding.kind != "exception":
        return TABLE.get(finding.kind, UNKNOWN)
    if finding.consequence:
        return Verdict(verdict="replace", why="it left a broken step: nobody's fault")
    if words := infrastructure(finding.text):
        return Verdict(verdict="replace", why=f"infrastructure, not the program: {words!r}")
    times, ranks = trials.add(finding)
    if ranks > 1 and finding.step <= 0:
        return Verdict(verdict="halt", why=f"the same exception on {ranks} ranks before any step was done")
    if times > 1:
        return Verdict(verdict="halt", why=f"the same exception at step {_step(finding)} for the {_nth(times)} time")
    return Verdict(verdict="replace", why=f"first time at step {_step(finding)}: may be transient")


def _step(finding: Finding) -> str:
    return "set-up" if finding.step == NONE else str(finding.step)


def _nth(times: int) -> str:
    return {2: "second", 3: "third"}.get(times, f"{times}th")
