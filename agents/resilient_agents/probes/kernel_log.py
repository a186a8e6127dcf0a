"""Kernel log: what the kernel and its drivers say, as they say it.

Think of somebody who sits beside the ticker with a hand on the paper: sleeps while it is still, and reads every line that comes.

Contract: begins at now, or where its predecessor was lost: what was said before is not news. Only who looks once before a node is used
(`lookback_s`) is told at the first look what was said within that time, each thing once with its age, but not what a later line has called
over. The newest line of a recorded log is its now. Blocks in `poll` for at most `WAIT_S`, so
that an idle log costs two wake-ups in ten seconds and a line is known in a millisecond. Where /dev/kmsg is refused (dmesg_restrict)
`journalctl -k -f` is the source, and `note` says which it is. Lines that programs wrote into /dev/kmsg are judged as lines of the
syslog are: by the name before them. What a line means is diagnosis/text.py's business. The time of a
finding is that of its record. Where <root>/dev/kmsg is a growing file or a FIFO (tests, recorded machines) it is read in the same way,
with or without records' heads.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import select
import shutil
import stat
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Final, NamedTuple

from msgspec.structs import replace

from resilient.core.messages import Finding
from resilient_agents.probe import Absent, Surroundings
from resilient_agents.sieve import WORSE

if TYPE_CHECKING:
    from collections.abc import Iterable

WAIT_S: Final = 5.0
FILE_S: Final = 0.1  # between two looks into a file that grows
RECORD_BYTES: Final = 8192  # the kernel's CONSOLE_EXT_LOG_MAX: a shorter read fails
RECORDS_MAX: Final = 2000  # of one check; the ring holds about ten thousand
BACKLOG_MAX: Final = 100_000
PIECE_BYTES: Final = 1 << 18
LINE_BYTES_MAX: Final = 1 << 16
JOURNAL: Final = ("journalctl", "--dmesg", "--follow", "--lines=0", "--output=cat", "--no-hostname")
_HEAD: Final = re.compile(rb"(\d{1,10}),(\d{1,20}),(\d{1,20}),[^;\n]{0,200};")
_KERNEL_FACILITY: Final = 0
_AGE_MAX_S: Final = 60.0  # an older stamp is of a machine that slept, or of a recorded one


class Line(NamedTuple):
    """One line of the log."""

    text: str
    stream: str  # "kmsg", or "syslog" where a program wrote it
    t: float = 0.0  # CLOCK_MONOTONIC seconds, 0 = not said


def parse(record: bytes) -> Line | None:
    """A record of /dev/kmsg ("6,339,5140900,-;text", then lines with a space before them), or just a line. None: nothing in it."""
    row = record.split(b"\n", 1)[0]
    head = _HEAD.match(row)
    text = row[head.end() if head else 0 :].decode(errors="replace").strip()
    if not text:
        return None
    if head is None:
        return Line(text, "kmsg")
    return Line(text, "kmsg" if int(head[1]) >> 3 == _KERNEL_FACILITY else "syslog", int(head[3]) / 1e6)


def found(lines: Iterable[Line], now: float) -> list[Finding]:
    """What these lines tell; those that tell nothing give nothing."""
    from resilient_agents.diagnosis.text import classify  # noqa: PLC0415 - its tables are loaded by those who need them

    findings = []
    for line in lines:
        finding = classify(line.text, line.stream)
        if finding.kind:
            findings.append(replace(finding, probe=KernelLog.name, t=line.t if now - _AGE_MAX_S < line.t <= now else now))
    return findings


def standing(lines: Iterable[Line], now: float, at: float) -> list[Finding]:
    """What these tell and no later one calls over, each once, the worst first; `at`: when the log was read, by its own clock."""
    left: dict[tuple[str, str, str], Finding] = {}
    for line in lines:
        for finding in found([line], now):
            if finding.clears:
                left = {key: it for key, it in left.items() if (it.kind, it.device) != (finding.kind, finding.device)}
            elif finding.class_ != "ignore":
                key = (finding.kind, finding.code, finding.device)
                times = finding.count + (left.pop(key).count if key in left else 0)
                ago = f" ({(at - line.t) / 60:.0f} min ago)" if 0 < line.t <= at - _AGE_MAX_S else ""
                left[key] = replace(finding, count=times, text=f"{finding.text}{ago}")
    return sorted(left.values(), key=lambda it: -WORSE.index(it.class_))


class KernelLog:
    """Follows one log."""

    name = "kernel-log"
    period_s = 0.05  # the rest of the time it waits inside
    timeout_s = 3 * WAIT_S

    def __init__(self, surroundings: Surroundings) -> None:
        """Raises Absent where there is no kernel log that we may read."""
        path = surroundings.path("/dev/kmsg")
        self._child: subprocess.Popen[bytes] | None = None
        self._pending = b""
        self._backlog: list[Line] = []
        self._past: list[Line] | None = None  # what there was before the first look, if that is wanted
        back = surroundings.lookback_s
        try:
            kind = os.stat(path).st_mode
            fifo = os.O_RDWR if stat.S_ISFIFO(kind) else os.O_RDONLY  # else each writer's end would be the end of it
            self._fd = os.open(path, fifo | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            if surroundings.root != "/":
                raise Absent(f"{path}: {error.strerror}") from error
            self._fd = self._journal(path, error, back)
            self._records = False
            return
        self.note = path
        self._is_file = stat.S_ISREG(kind)
        self._records = stat.S_ISCHR(kind)
        if not stat.S_ISFIFO(kind):
            os.lseek(self._fd, 0, os.SEEK_SET if surroundings.since or back else os.SEEK_END)
        if back:
            lines = self._all()
            self._at = time.monotonic() if self._records else max((line.t for line in lines), default=0.0)
            self._past = [line for line in lines if not line.t or line.t > self._at - back]
        elif surroundings.since:
            self._backlog = [line for line in self._all() if not line.t or line.t > surroundings.since]

    def check(self, now: float) -> list[Finding]:
        """What has been said since the last call; waits a while for it."""
        if self._past is not None:
            past, self._past = self._past, None
            return standing(past, time.monotonic(), self._at)
        until = now + WAIT_S
        while True:
            lines, self._backlog = self._backlog, []
            lines = lines or (self._read() if self._records else self._read_stream())
            if lines or (left := until - time.monotonic()) <= 0:
                return found(lines, time.monotonic())
            if self._child is None and self._is_file:
                time.sleep(min(left, FILE_S))
            else:
                self._wait(left)

    # ------------------------------------------------------------------

    _is_file = False
    _at = 0.0

    def _all(self) -> list[Line]:
        """What is there already. By their stamps the later ones are news; of those still to come all are, for the kernel's clock drifts."""
        lines: list[Line] = []
        while len(lines) < BACKLOG_MAX and (more := self._read() if self._records else self._read_stream()):
            lines += more
        return lines

    def _wait(self, seconds: float) -> None:
        poll = select.poll()
        poll.register(self._fd, select.POLLIN)
        poll.poll(1000 * seconds)

    def _read(self) -> list[Line]:
        """Whole records, one a read."""
        lines: list[Line] = []
        for _ in range(RECORDS_MAX):
            try:
                record = os.read(self._fd, RECORD_BYTES)
            except BlockingIOError:
                break
            except OSError as error:
                if error.errno not in {errno.EPIPE, errno.EINVAL}:  # overwritten before we read it; longer than any record should be
                    raise
                continue
            if (line := parse(record)) is not None:
                lines.append(line)
        return lines

    def _read_stream(self) -> list[Line]:
        """Lines of a pipe or a file; the unfinished last one waits."""
        with contextlib.suppress(BlockingIOError):
            data = os.read(self._fd, PIECE_BYTES)
            if not data and self._child is not None:
                code = self._child.wait(1.0)
                self._child.stdout.close()  # type: ignore[union-attr]
                self._fd = self._follow()
                raise RuntimeError(f"journalctl has ended (exit code {code}); another one is started")
            *whole, self._pending = (self._pending + data).split(b"\n")
            if len(self._pending) > LINE_BYTES_MAX:
                whole.append(self._pending)
                self._pending = b""
            return [line for row in whole if (line := parse(row)) is not None]
        return []

    def _journal(self, path: str, refused: OSError, back: float) -> int:
        program = shutil.which(JOURNAL[0])
        if program is None:
            raise Absent(f"{path}: {refused.strerror}, and there is no journalctl") from refused
        self.note = f"journalctl ({path}: {refused.strerror})"
        self._command = [sys.executable, "-I", "-S", "-c", _DIES_WITH_US, str(os.getpid()), program, *JOURNAL[1:]]
        if back:
            self._past = _journaled(program, back)
        return self._follow()

    def _follow(self) -> int:
        """A journalctl that ends with us; its output."""
        self._child = subprocess.Popen(  # noqa: S603
            self._command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        assert self._child.stdout is not None
        fd = self._child.stdout.fileno()
        os.set_blocking(fd, False)
        return fd


def _journaled(program: str, back: float) -> list[Line]:
    """What the journal has of the kernel's log of this start and that time."""
    command = [program, "--dmesg", f"--since=-{back:.0f}s", "--output=cat", "--no-hostname", "--no-pager", f"--lines={BACKLOG_MAX}"]
    try:
        told = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=WAIT_S, check=False).stdout  # noqa: S603
    except subprocess.TimeoutExpired as late:
        told = late.stdout or b""
    return [line for row in told.splitlines() if (line := parse(row)) is not None]


_DIES_WITH_US: Final = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGTERM, 0, 0, 0)
if os.getppid() == int(sys.argv[1]): os.execv(sys.argv[2], sys.argv[2:])
"""
