"""The page: 4 KiB of shared memory in which a worker shows where it is, and its agent says that the round broke.

Think of a shop window: whoever passes by can look in, also when the shopkeeper sleeps or is dead. A heartbeat is a store of
eight bytes; nobody is called, nobody answers.

Contract: one worker writes, one agent reads, except five words at the begin (agent writes, worker reads). All words
are aligned int64, little endian, and do not tear. The record (several words) stands under a sequence number: odd while it is being written.
The agent keeps the file of a dead worker, so the last record can always be read.

I1 (fence): the worker stores COMMITTING and then loads FENCE; the agent stores FENCE and then loads the phase. So either the agent
sees COMMITTING, or the worker sees the fence and waits to be told. Both sides put a full barrier between their two accesses.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import mmap
import os
import threading
import time
from typing import Final

from resilient.core.messages import NONE, Pace, Phase, Record, Tally
from resilient.errors import ProtocolError

PAGE_BYTES: Final = 4096
MAGIC: Final = 0x3145_4741_5052_5352  # "RSRPAGE1"
PHASES: Final[tuple[Phase, ...]] = ("setup", "clean", "running", "voted", "committing", "done")

# word indices
_MAGIC, _PID = 0, 1
_FENCE, _COPIED, _WANTED, _AUDITED, _AUDIT = 8, 9, 10, 11, 12  # agent; the last: ns of work
_SEQ = 16  # record, under the sequence number
_ROUND, _STEP, _PHASE, _TORN = 17, 18, 19, 20
_BROKEN, _REGROUPED, _RESTORED, _COMMITTED = 21, 22, 23, 24  # monotonic ns
_STEPPED, _SEALED, _SEALED_AT, _STALL = 25, 26, 27, 28  # when `step` was reached; newest step sealed for the persistent tier, when, and ns
_BEAT, _SECTION, _ENTERED, _COMPLETED, _PARKED = 32, 33, 34, 35, 36  # single words, no sequence number
_WAITED, _LOADED = 37, 38  # ns inside collectives, and from a boundary to the first forward, since the start of this process
_SECTIONS, _BEGUN = 39, 40  # sections opened since then; collectives entered when `step` was reached
_GROUPS = 64  # then GROUP_COUNT x (name, entered, completed, ns inside), the last two are the control group's and the overflow entry
_ROW = 4
GROUP_COUNT: Final = 112
CONTROL_SLOT: Final = GROUP_COUNT - 2  # of the votes
OVERFLOW_SLOT: Final = GROUP_COUNT - 1  # shared by all groups for which there is no other
STILL_S: Final = 1.0  # a page that has not moved for so long is shown with its groups: where nobody waits nobody needs them
_READ_TRIES: Final = 1000
UNCOPIED: Final = 1 << 62  # in COPIED: no copies are made, nobody waits for them


class Page:
    """One worker's page, mapped. Both sides use this class; each calls only its own half.

    Thread-safety: the worker half may be called from several threads for the single words, and for `sealed`; the record half
    (`write`) only under the ledger's lock.
    """

    def __init__(self, path: str, *, create: bool = False) -> None:
        """Map `path`; with `create`, make it first. Raises ProtocolError if it is no page, OSError if /dev/shm is full."""
        self.path = path
        flags = os.O_RDWR | (os.O_CREAT | os.O_EXCL if create else 0)
        fd = os.open(path, flags | os.O_CLOEXEC, 0o600)
        try:
            if create:
                os.posix_fallocate(fd, 0, PAGE_BYTES)  # a sparse file on a full tmpfs would be SIGBUS later
            found = os.fstat(fd).st_size
            if found != PAGE_BYTES:
                msg = f"page: {PAGE_BYTES} bytes expected, {found} found ({path})"
                raise ProtocolError(msg)
            self._map = mmap.mmap(fd, PAGE_BYTES)
        finally:
            os.close(fd)
        self._words = memoryview(self._map).cast("q")
        self._barrier = threading.Lock()  # taking and releasing it is a full barrier on every CPU that torch runs on
        self._writing = threading.Lock()  # `write` is the training thread's, `sealed` may be that of the thread which seals
        if create:
            w = self._words
            w[_STEP] = NONE
            w[_COPIED] = UNCOPIED
            w[_WANTED] = w[_SEALED] = w[_AUDITED] = NONE
            w[_BEAT] = time.monotonic_ns()
            w[_MAGIC] = MAGIC
        elif self._words[_MAGIC] != MAGIC:
            msg = f"page: magic {MAGIC:#x} expected, {self._words[_MAGIC]:#x} found ({path})"
            raise ProtocolError(msg)

    def close(self) -> None:
        """Unmap. The file stays; its owner unlinks it."""
        self._words.release()
        self._map.close()

    def occupy(self) -> None:
        """As long as this process lives, `is_occupied` says so; whoever finds our agent dead waits for that.

        A lock of the kind that a forked child does not have: data loaders may outlive us and write nothing.
        """
        self._lock = os.open(self.path, os.O_RDWR | os.O_CLOEXEC)  # closed by nobody: with any file of this page the lock would go
        with contextlib.suppress(OSError):  # a file system without locks: then nobody is taken for living
            fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)

    # ------------------------------------------------------------------ the worker's half

    def beat(self) -> None:
        """I am alive and moving. One store, no syscall but the vDSO clock."""
        self._words[_BEAT] = time.monotonic_ns()

    def write(self, *, round: int, step: int, phase: Phase, torn: bool, marks_ns: tuple[int, int, int, int]) -> None:
        """Publish the record. `marks_ns`: when this round was found broken, regrouped, restored, first committed."""
        w = self._words
        with self._writing:
            w[_SEQ] += 1
            if step != w[_STEP]:
                w[_STEPPED] = time.monotonic_ns()
                w[_BEGUN] = w[_ENTERED]
            w[_ROUND], w[_STEP], w[_PHASE], w[_TORN] = round, step, PHASES.index(phase), int(torn)
            w[_BROKEN], w[_REGROUPED], w[_RESTORED], w[_COMMITTED] = marks_ns
            w[_SEQ] += 1
        w[_BEAT] = time.monotonic_ns()
        with self._barrier:  # I1: what follows is loaded after what was stored above
            pass

    def fence(self) -> int:
        """Rounds up to this one are broken."""
        return self._words[_FENCE]

    def sealed(self, step: int, stall_ns: int = 0) -> None:
        """`step` was just completed, and sealed for the persistent tier; NONE: what was is of a future that will not be."""
        w = self._words
        with self._writing:
            w[_SEQ] += 1
            w[_SEALED], w[_SEALED_AT], w[_STALL] = step, time.monotonic_ns(), stall_ns
            w[_SEQ] += 1

    def wanted(self) -> int:
        """The step that is to be sealed for the persistent tier, or the first one after it; NONE = none but at a fixed interval."""
        return self._words[_WANTED]

    def copied(self) -> int:
        """Newest step of this rank that lies on another node too; UNCOPIED if none is to be awaited."""
        return self._words[_COPIED]

    def audited(self) -> int:
        """The step of this rank that was audited last, or whose audit came to nothing; NONE = none yet."""
        return self._words[_AUDITED]

    def audit_s(self) -> float:
        """How long this node has hashed, all its ranks together, for the newest audit."""
        return self._words[_AUDIT] / 1e9

    def section(self, depth: int) -> None:
        """Depth of open `run.section`s."""
        self._words[_SECTIONS] += depth > self._words[_SECTION]
        self._words[_SECTION] = depth
        self.beat()

    def park(self, *, parked: bool) -> None:
        """A standby has finished its warm-up (or has left its parking place)."""
        self._words[_PARKED] = int(parked)
        self.beat()

    def enter(self, slot: int) -> None:
        """An operation begins on the group with this `slot` (0 <= slot < GROUP_COUNT)."""
        w = self._words
        w[_GROUPS + _ROW * slot + 1] += 1
        w[_ENTERED] += 1
        w[_BEAT] = time.monotonic_ns()

    def leave(self, slot: int, since_ns: int = 0) -> None:
        """An operation of that group ended, well or not. since_ns: when somebody began to wait for it, 0 = nobody did."""
        w = self._words
        row = _GROUPS + _ROW * slot
        w[row + 2] += 1
        w[_COMPLETED] += 1
        w[_BEAT] = now = time.monotonic_ns()
        if since_ns:
            w[row + 3] += now - since_ns
            w[_WAITED] += now - since_ns

    def abandon(self) -> None:
        """An operation of an older round ended: its group's counters began anew meanwhile."""
        self._words[_COMPLETED] += 1
        self.beat()

    def regroup(self) -> None:
        """A round begins: its groups' counters stand at zero on every member, newcomers and survivors alike."""
        w = self._words
        for slot in range(GROUP_COUNT):
            row = _GROUPS + _ROW * slot
            w[row + 1] = w[row + 2] = w[row + 3] = 0

    def loaded(self, since_ns: int) -> None:
        """The first forward of a step begins; the step began at `since_ns`."""
        w = self._words
        w[_BEAT] = now = time.monotonic_ns()
        w[_LOADED] += now - since_ns

    def name_group(self, slot: int, name: int) -> None:
        """Say which group the counters of `slot` belong to (`group_name`, `pair_name`)."""
        self._words[_GROUPS + _ROW * slot] = name

    # ------------------------------------------------------------------ the agent's half

    def set_fence(self, round: int) -> None:
        """Rounds up to `round` are broken; returns after a barrier, so a `read` that follows is stable (I1)."""
        self._words[_FENCE] = max(self._words[_FENCE], round)
        with self._barrier:
            pass

    def set_copied(self, step: int) -> None:
        """What this rank sealed at `step` lies on another node; UNCOPIED = there is no other node."""
        self._words[_COPIED] = step

    def set_audited(self, step: int, seconds: float) -> None:
        """See `audited` and `audit_s`."""
        self._words[_AUDIT] = int(seconds * 1e9)
        self._words[_AUDITED] = step

    def want(self, step: int) -> None:
        """See `wanted`."""
        self._words[_WANTED] = step

    def parked(self) -> bool:
        """Whether the standby has finished its warm-up."""
        return bool(self._words[_PARKED])

    def beat_ns(self) -> int:
        """CLOCK_MONOTONIC nanoseconds of the last movement."""
        return self._words[_BEAT]

    def groups(self) -> tuple[Tally, ...]:
        """The counters of every group in use."""
        w = self._words
        rows = (tuple(w[_GROUPS + _ROW * i : _GROUPS + _ROW * i + 3]) for i in range(GROUP_COUNT))
        return tuple(Tally(*row) for row in rows if row[0])

    def read(self, now_ns: int | None = None) -> Record:
        """The record, whole: read again while it is being written; a writer that died in between leaves it odd: read as is."""
        w = self._words
        round_, step, phase, torn, *marks = self._row()
        now = time.monotonic_ns() if now_ns is None else now_ns
        return Record(
            round=round_,
            step=step,
            phase=PHASES[phase] if 0 <= phase < len(PHASES) else "setup",
            torn=bool(torn),
            section=w[_SECTION] > 0,
            entered=w[_ENTERED],
            completed=w[_COMPLETED],
            idle_s=max(0, now - w[_BEAT]) / 1e9,
            broken_s=marks[0] / 1e9,
            regrouped_s=marks[1] / 1e9,
            restored_s=marks[2] / 1e9,
            committed_s=marks[3] / 1e9,
            waited_s=w[_WAITED] / 1e9,
            loaded_s=w[_LOADED] / 1e9,
            sections=w[_SECTIONS],
            begun=w[_BEGUN],
            groups=self.groups() if now - w[_BEAT] > STILL_S * 1e9 else (),
        )

    def pace(self, rank: int) -> Pace:
        """How far this worker, who sits on `rank`, has come, and since when it could go on from there; whole, as the record."""
        row = self._row()
        _, step, *_, restored, _, stepped, sealed, sealed_at, stall = row
        return Pace(rank=rank, step=step, at_s=max(stepped, restored) / 1e9, sealed=sealed, sealed_s=sealed_at / 1e9, stall_s=stall / 1e9)

    def _row(self) -> tuple[int, ...]:
        w = self._words
        for _ in range(_READ_TRIES):
            seq = w[_SEQ]
            row = tuple(w[_ROUND : _STALL + 1])
            if seq % 2 == 0 and w[_SEQ] == seq:
                break
        return row


def group_name(key: str) -> int:
    """The name of a group in the pages, equal on all nodes: 62 bits. key: equal on all members, unique in the run."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "little") & (2**62 - 1) | 1


def is_occupied(path: str) -> bool:
    """Whether the worker of that page lives."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    finally:
        os.close(fd)
    return False
