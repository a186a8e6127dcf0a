"""Readings: files of logs and dumps, as sightings.

Think of the clerk who opens the boxes: he notes for each sheet which box it lay in and when it was stamped, keeps what belongs together
clipped together, and reads nothing into it.

Contract: `sightings(path, ...)` reads one file of any size, or a pipe, line by line, with a bounded memory; a traceback is one block. What
the stream is (kmsg, syslog, stdout, stderr) is told by the name or the first lines. What gzip has packed is unpacked on the way; a file
that another program has packed is an OSError, as is one that is cut off. `dump(path)` reads a Flight Recorder dump, or gives None where the
file is none. Directories are walked by the caller.
"""

from __future__ import annotations

import contextlib
import errno
import gzip
import os
import re
import zlib
from itertools import chain, islice
from typing import TYPE_CHECKING, Final, cast

import msgspec

from resilient_agents.diagnosis import recorder, traces
from resilient_agents.diagnosis.grouping import Sighting
from resilient_agents.diagnosis.peel import Peeled, peel, plain
from resilient_agents.diagnosis.text import classify, relevant

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import BinaryIO

LINE: Final = 65_536
TRACE: Final = 300  # lines of a traceback that are kept
OPEN: Final = 64 << 20  # letters of all tracebacks that have not ended yet
SAMPLE: Final = 64
_PACKED: Final = {b"\xfd7zXZ\x00": "xz", b"BZh": "bzip2", b"\x28\xb5\x2f\xfd": "zstd"}
_KERNEL: Final = re.compile(r"(?:<\d{1,3}>)?\[ *[+]?\d+\.\d+\]|\d{1,3},\d+,\d+,[^;]*;|\[[A-Z][a-z]{2} [A-Z][a-z]{2} +\d+ [\d:]{8} \d{4}\]")
_SYSLOG: Final = re.compile(r"(?:<\d{1,3}>)?(?:[A-Z][a-z]{2} +\d+ \d\d:\d\d:\d\d|\d{4}-\d\d-\d\dT\S+) [\w.-]+ [\w./@-]+(?:\[\d+\])?: ")
_NAMES: Final = (
    ("kmsg", ("kmsg", "dmesg", "kern")),
    ("syslog", ("syslog", "messages", "journal", "fabricmanager")),
    ("stdout", ("stdout", ".out")),
    ("stderr", ("stderr", ".err")),
)
_RANK: Final = re.compile(r"(?:rank[_-]?|^|/)(\d{1,7})(?:\.(?:log|txt|out|err|json|pickle|pkl))?(?:/[^/]*)?$", re.IGNORECASE)
_HOST: Final = re.compile(r"([A-Za-z][\w.-]{1,63}):\d+:\d+ \[\d+\] ")  # NCCL's own prefix
_SYS_HOST: Final = re.compile(
    r"(?:<\d{1,3}>)?(?:[A-Z][a-z]{2} +\d+ \d\d:\d\d:\d\d(?:\.\d+)?|\d{4}-\d\d-\d\dT\S+) ([A-Za-z][\w.-]{0,63}) [\w./@-]+(?:\[\d+\])?: "
)


def stream_of(path: str, lines: list[str]) -> str:
    """Whose lines these are."""
    name = os.path.basename(path).lower()
    for stream, words in _NAMES:
        if any(word in name for word in words):
            return stream
    told = [line for line in lines if line.strip()]
    if sum(bool(_KERNEL.match(line)) for line in told) * 2 > len(told):
        return "kmsg"
    if sum(bool(_SYSLOG.match(line)) for line in told) * 2 > len(told):
        return "syslog"
    return "stderr"


def rank_of(path: str) -> int | None:
    """The rank that a file's name gives: nccl_trace_rank_3, rank3.log, attempt_0/3/stderr.log."""
    found = _RANK.search(path.removesuffix(".gz"))
    return int(found[1]) if found else None


def dump(path: str) -> recorder.Dump | None:
    """A Flight Recorder dump, None if the file is something else; DumpError if it is a broken one."""
    if not os.path.isfile(path):
        return None  # a pipe is read once
    with open(path, "rb") as file:
        head = file.read(4096)
        if not (head[:2] in {b"\x80\x02", b"\x80\x03", b"\x80\x04"} or (head.lstrip()[:1] == b"{" and b'"' in head)):
            return None
        if head[:1] != b"\x80" and not re.search(rb'"(?:entries|pg_config|pg_status|nccl_comm_state|version|collective_seq_id)"', head):
            return None
        return recorder.read(head + file.read(recorder.LARGEST + 1))


def sightings(path: str, node: str = "", stream: str = "", place: int = 0) -> Iterator[Sighting]:
    """What the lines of one file say."""
    with _opened(path) as file:
        lines = map(_text, _lines(file))
        first = list(islice(lines, SAMPLE))
        stream = stream or stream_of(path, first)
        rank = rank_of(path)
        numbered = enumerate(chain(first, lines), 1)
        for number, text, peeled in _blocks(numbered):
            finding = classify(text, stream)
            if not finding.kind or (finding.class_ == "ignore" and finding.role == "context" and not finding.clears):
                continue
            host = _SYS_HOST.match(text) or _HOST.match(peeled.text)
            if rank is not None and not finding.device:
                finding = msgspec.structs.replace(finding, device=f"rank:{rank}")
            clock = "" if peeled.t is None else "wall" if peeled.wall else "boot"
            yield Sighting(
                finding=finding,
                node=host[1] if host else node,
                t=peeled.t,
                clock=clock,
                place=place + number,
                source=f"{path}:{number}",
            )


@contextlib.contextmanager
def _opened(path: str) -> Iterator[BinaryIO]:
    """As it was before somebody packed it."""
    with open(path, "rb") as file:
        head = file.peek(8)
        for magic, name in _PACKED.items():
            if head.startswith(magic):
                raise OSError(errno.EINVAL, f"a log as it was written, or packed by gzip, expected, one packed by {name} found")
        if not head.startswith(b"\x1f\x8b"):
            yield file
            return
        try:
            yield cast("BinaryIO", gzip.GzipFile(fileobj=file))
        except (EOFError, zlib.error) as error:
            raise OSError(errno.EIO, f"cannot be unpacked to its end: {error}") from error


def _lines(file: BinaryIO) -> Iterator[bytes]:
    """Lines, of each at most LINE bytes."""
    while raw := file.readline(LINE):
        if not raw.endswith(b"\n"):
            while (more := file.readline(LINE)) and not more.endswith(b"\n"):
                pass
        yield raw


def _text(raw: bytes) -> str:
    return raw.decode("utf-8", "replace").rstrip("\r\n")


def _blocks(numbered: Iterator[tuple[int, str]]) -> Iterator[tuple[int, str, Peeled]]:
    """Single lines that may say something, and each rank's tracebacks as wholes."""
    open_: dict[str, tuple[int, list[str], Peeled]] = {}
    letters = 0
    for number, line in numbered:
        starts = "Traceback (most recent call last)" in line
        if not (starts or open_ or relevant(line)):
            continue
        peeled = peel(plain(line)[:LINE])
        block = open_.get(peeled.rank)
        if block is not None and (starts or _belongs(block[1], peeled.text)):
            if len(block[1]) < TRACE and letters < OPEN:
                block[1].append(line)
                letters += len(line)
            continue
        if block is not None:
            del open_[peeled.rank]
            letters -= sum(map(len, block[1]))
            yield block[0], "\n".join(block[1]), block[2]
        if starts:
            while open_ and letters >= OPEN:  # the one that has been open for longest will not come to its end any more
                old = open_.pop(next(iter(open_)))
                letters -= sum(map(len, old[1]))
                yield old[0], "\n".join(old[1]), old[2]
            open_[peeled.rank] = (number, [line], peeled)
            letters += len(line)
        elif relevant(line):
            yield number, line, peeled
    for number, lines, peeled in open_.values():
        yield number, "\n".join(lines), peeled


def _belongs(block: list[str], text: str) -> bool:
    """Whether this line goes on with a traceback: frames, the message, and what links it to another."""
    low = text.lower()
    if not text.strip() or text[:1] in " \t" or traces.CAUSE in low or traces.CONTEXT in low:
        return True
    texts = (peel(plain(line)).text for line in reversed(block))
    last = next((before for before in texts if before.strip()), "")
    linked = traces.CAUSE in last.lower() or traces.CONTEXT in last.lower()  # some print no frames of the other one
    return bool(traces.NAMED.match(text)) and (linked or last[:1] in {" ", "\t"})
