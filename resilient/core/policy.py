"""Policy: what a finding means.

Think of triage in a hospital: the nurse at the door does not treat anybody, she reads the symptom and says who goes where. The table is
hers, it can be read aloud, and no finding is without a line in it.

Contract: `Policy.judge` is a table, and a memory of which exceptions were seen at which step. Hardware is never the user's fault: a text
that says so wins over everything else, and costs no restart. An exception that leaves a broken step is nobody's fault. The same
exception at the same step twice, or on two ranks before any step was done, is the program's: another try would not help.
A group that does not use this library is judged as torchrun does, but a signal is not the user's failure.
What explains a failure (cause.py) is asked first: broken hardware makes it nobody's fault, and a fault of the program's makes also a signal
the program's, but for one that comes from outside (SIGKILL, SIGTERM). What a worker only wrote counts for less: of the hardware it does
not save it twice, of the program it does not outweigh what the failure itself says, for it may have been written for another reason.
What probes see is judged by triage.py, with rules that are data. Those here are not: they are halves of the protocol.
The texts are those of torch, NCCL, gloo, CUDA and HCCL as their sources and users' logs show them; "out of memory", "invalid argument"
and a failed device-side assert are deliberately absent: they are the program's.
"""

from __future__ import annotations

import re
from typing import Final

from resilient.core.cause import Seen
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
    "replicas_differ": Verdict(
        verdict="watch", why="replicas are not equal to the last bit: silent data corruption, or ranks treated differently"
    ),
    "unrecorded": Verdict(verdict="restart", why="a newcomer cannot repeat the set-up: the group starts again"),
    "store_lost": Verdict(verdict="restart", why="the store process is started again"),
    "zygote_lost": Verdict(verdict="restart", why="the zygote is started again"),
    "standby_lost": Verdict(verdict="restart", why="it had no chair; another one is warmed up"),
    "standbys_off": Verdict(verdict="watch", why="standbys die again and again; newcomers are forked when needed"),
    "allocation": Verdict(verdict="halt", why="the node has no room for the copies of its state"),
    "warning": Verdict(verdict="watch", why="trouble may be coming: a checkpoint is made first"),
    "no_room": Verdict(verdict="watch", why="a chair waits for a node with room"),
}
OPEN: Final = ("replicas_differ", "standbys_off", "warning", "straggler")  # of the runtime's own: a rule may say halt, watch or ignore
HANDLED: Final = ("user-exc", "cuda-oom", "traceback")  # Python's: who does not handle one ends with an exit code, not by a signal
OUTSIDE: Final = (-1, -2, -9, -15)  # SIGHUP, SIGINT, SIGKILL, SIGTERM: no fault of a program's own ends it with one of these
UNKNOWN: Final = Verdict(verdict="watch", why="no rule for this kind of finding")
FOREIGN: Final = Verdict(verdict="watch", why="the group does not use this library: only exits count")

# Lower case, to be found in the lower-cased text of an exception: infrastructure, not the program. One line per layer.
_INFRASTRUCTURE: Final = (
    # torch and gloo: a peer, a link or the store went away
    r"connection closed by peer|connection reset by peer|connection refused|broken pipe|read error \[|write error \[|no route to host",
    r"timed out waiting \d+ms for (recv|send) operation|connectfullmesh failed|application timeout caused pair closure",
    r"watchdog caught collective operation timeout|timed out in blocking wait|heartbeat monitor timed out|watchdog got stuck",
    r"diststoreerror|distnetworkerror|socket timeout|recvvalue failed|sendbytes failed|rendezvous(timeout|connection|closed)error",
    r"dataloader worker .* (killed by signal|exited unexpectedly)|pytorchstreamwriter failed writing",
    # NCCL: everything but invalid argument and invalid usage
    r"nccl(unhandledcuda|system|internal|remote)error|unhandled (cuda|system) error|remote process exited|nccl communicator was aborted",
    r"async fatal event|exceeded error retry count|ibv_\w+ .*failed|got completion from peer|port error|connection closed by remote peer",
    # CUDA and the device; "cuda error" alone counts unless the program caused it, see below
    r"uncorrectable (ecc|nvlink) error|hardware stack error|device\(s\) is/are busy or unavailable|no cuda-capable device",
    r"no cuda gpus are available|system not yet initialized",
    r"fallen off the bus|gpu is lost|\becc error|nvrm: xid|\bxid \(pci|sxid|memory page retirement|row remapp|cuda error",
    # Ascend
    r"\be[ij]000[126]\b|\bee1002\b|507046|507048|507054|hccl .*time-?out|error: hccl\w+, error code",
    # the host
    r"input/output error|stale file handle|remote i/o error|bus error|no space left on device: '/dev/shm",
)
_PATTERN: Final = re.compile("|".join(_INFRASTRUCTURE))
_CUDA_BY_PROGRAM: Final = re.compile(
    r"out of memory|device-side assert triggered|illegal memory access|illegal instruction|misaligned address|invalid pc"
    r"|invalid device ordinal|no kernel image|driver version is insufficient|invalid argument|invalid configuration"
)


def infrastructure(text: str) -> str:
    """The words in `text` that mean infrastructure, "" if there are none.

    text: a traceback, or just a message. Only what comes after its last frame counts: the frames quote source code.
    """
    rows = text.lower().splitlines()
    frames = [i for i, row in enumerate(rows) if row.startswith(("  file ", "    "))]
    message = "\n".join(rows[frames[-1] + 1 :] if frames else rows)
    found = [match[0] for match in _PATTERN.finditer(message)]
    named = next((words for words in found if words != "cuda error"), "")  # "CUDA error" alone says too little
    return named or (found[0] if found and not _CUDA_BY_PROGRAM.search(message) else "")


def unrelated(finding: Finding, *, managed: bool) -> bool:
    """Whether no machine need be broken for this end: an error of the program's own that says nothing of one, or a signal from outside.

    managed: the worker says by which exception it ends; else a bare exit code may be of any.
    """
    if finding.kind == "stopped" or finding.exit_code in OUTSIDE:
        return True
    told = managed or finding.text != f"exit code {finding.exit_code}"
    return told and (finding.exit_code or 0) > 0 and not infrastructure(finding.text)


def users_fault(finding: Finding, explained: Seen | None) -> bool:
    """Whether a fault of the program's, seen a moment ago, explains this failure. A program may write of errors that it has handled."""
    if explained is None or explained.class_ != "user" or finding.exit_code in OUTSIDE:
        return False
    if explained.proof:
        return True
    return not infrastructure(finding.text) and not ((finding.exit_code or 0) < 0 and explained.finding.kind in HANDLED)


def _words(seen: Seen) -> str:
    return f"{seen.name} ({seen.class_})"


class Policy:
    """The table, and what was seen before."""

    def __init__(self, max_restarts: int) -> None:
        """max_restarts: torchrun's, for groups that do not use this library."""
        self._max_restarts = max_restarts
        self._failures = 0
        self._count: dict[tuple[int, str], int] = {}  # (step, fingerprint) -> times seen
        self._ranks: dict[tuple[int, str], set[int]] = {}

    def judge(self, finding: Finding, *, managed: bool, first: bool, explained: Seen | None = None) -> Verdict:
        """The verdict on one finding. first: it is the one that breaks the round; later ones of the round cost no restart.

        explained: what a probe saw of its rank, a moment ago.
        """
        if not managed:
            return self._judge_foreign(finding, first=first, explained=explained)
        failed = finding.kind == "exit" and (finding.exit_code or 0) > 0
        users = users_fault(finding, explained)
        if finding.kind in ("exit", "exception") and not finding.consequence and explained is not None:
            if users:
                return self._try_again(finding, finding.fingerprint or f"{explained.finding.kind} {explained.finding.code}")
            if explained.class_ == "user":
                return self.judge(finding, managed=managed, first=first)
            if explained.proof or not (failed or finding.kind == "exception"):
                return Verdict(verdict="replace", why=f"{_words(explained)} explains it")
            verdict = self._try_again(finding, finding.fingerprint or f"exit code {finding.exit_code}")
            return verdict if verdict.verdict == "halt" else Verdict(verdict="replace", why=f"{_words(explained)} may explain it")
        if finding.kind != "exception" and not failed:
            return TABLE.get(finding.kind, UNKNOWN)
        if finding.consequence:
            return Verdict(verdict="replace", why="it left a broken step: nobody's fault")
        if words := infrastructure(finding.text):
            return Verdict(verdict="replace", why=f"infrastructure, not the program: {words!r}")
        return self._try_again(finding, finding.fingerprint or f"exit code {finding.exit_code}")

    def _try_again(self, finding: Finding, fingerprint: str) -> Verdict:
        key = (finding.step, fingerprint)
        self._count[key] = times = self._count.get(key, 0) + 1
        ranks = self._ranks.setdefault(key, set())
        ranks.add(finding.rank)
        where = "in the set-up" if finding.step == NONE else f"at step {finding.step}"
        if len(ranks) > 1 and finding.step <= 0:
            return Verdict(verdict="halt", why=f"the same error on {len(ranks)} ranks before any step was done")
        if times > 1:
            return Verdict(verdict="halt", why=f"the same error {where} for the second time")
        return Verdict(verdict="replace", why=f"first time {where}: may be transient")

    def _judge_foreign(self, finding: Finding, *, first: bool, explained: Seen | None) -> Verdict:
        if finding.kind not in ("exit", "exception"):
            known = TABLE.get(finding.kind, FOREIGN)
            return known if known.verdict in ("halt", "restart") or finding.kind == "node_lost" else FOREIGN
        users = users_fault(finding, explained)
        if explained is not None and explained.class_ != "user" and explained.proof:
            return Verdict(verdict="restart", why=f"{_words(explained)} explains it: the group starts again")
        if finding.exit_code is not None and finding.exit_code < 0 and not users:
            return Verdict(verdict="restart", why="killed by a signal: the group starts again")
        if not users and (words := infrastructure(finding.text)):
            return Verdict(verdict="restart", why=f"infrastructure, or a neighbour's death: {words!r}")
        self._failures += first
        if self._failures > self._max_restarts:
            return Verdict(verdict="halt", why=f"exit code {finding.exit_code}, --max-restarts {self._max_restarts}")
        return Verdict(verdict="restart", why=f"failure {self._failures} of --max-restarts {self._max_restarts}")
