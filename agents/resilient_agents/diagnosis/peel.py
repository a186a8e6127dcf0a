"""Peel: what was written, without what logging put around it.

Think of a letter in an envelope in a mail bag: colour codes, the kernel's clock, syslog's host and program, a container runtime's stamp and
torchrun's prefix each say who carried it and when; the text is inside.

Contract: `peel(line)` never fails and looks at no more than a dozen layers. What it learns on the way (program, rank, time) is given back;
`tag` is "kernel" where a layer says so, a program's name where it says that, "" where none does.
"""

from __future__ import annotations

import datetime as dt
import re
from typing import Final, NamedTuple

ANSI: Final = re.compile(r"\x1b(?:\[[0-9;?]{0,20}[A-Za-z]|\][^\x07\x1b]{0,200}(?:\x07|\x1b\\)|[()][A-Z0-9])")
LAYERS: Final = 12
YEARS: Final = (1970, 9000)  # another year is no date of a log, and its neighbours may be none that a calendar has
MONTHS: Final = {name: i for i, name in enumerate(["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"], 1)}

_ISO: Final = r"(?P<iso>\d{4}[-/]\d\d[-/]\d\d[T -]\d\d:\d\d:\d\d(?:[.,:]\d{1,9}(?:\.\d{1,3})?)?)(?P<zone>Z|[+-]\d\d:?\d\d)?(?: UTC| GMT)?"
_WEEKDAY: Final = r"(?:Mon|Tue|Wed|Thu|Fri|Sat|Sun)"
_CLOCK: Final = r"\d\d:\d\d:\d\d"
_BSD: Final = r"(?P<bsd>(?:Jan|Feb|Mar|Apr|May|Jun|Jul|Aug|Sep|Oct|Nov|Dec) {1,2}\d{1,2} \d\d:\d\d:\d\d(?:\.\d{1,9})?)"
_TAG: Final = r"(?P<tag>[A-Za-z][\w./@()-]{0,60}?)(?:\[\d{1,10}\])?: ?"
_DIGITS: Final = "0123456789"
_KINDS: Final = (  # the letters with which each can begin, and what it looks like
    ("<", r"<\d{1,3}>(?:\d )?"),  # syslog priority
    (_DIGITS, r"(?P<kmsg>\d{1,3}),\d{1,20},(?P<us>\d{1,20}),[^;\n]{0,40};"),  # /dev/kmsg itself
    ("kudasl", r"(?P<level>kern|user|daemon|auth|syslog|local\d) {0,3}:(?:emerg|alert|crit|err|warn|notice|info|debug) {0,3}: "),
    ("[", r"\[ {0,12}(?P<up>\d{1,12}\.\d{3,9})\](?: {0,2}\[ {0,6}[TC]\d{1,8}\])? ?"),  # the kernel's clock, and its caller
    ("[", r"\[ {0,12}[+]?\d{1,10}\.\d{3,9}\] ?"),
    ("[", r"\[ {0,6}[TC]\d{1,8}\] ?"),
    ("[", rf"\[(?:{_WEEKDAY} )?(?P<dmesg>[A-Z][a-z]{{2}} {{1,2}}\d{{1,2}} (?:{_CLOCK}(?:\.\d+)? \d{{4}}|\d{{4}} {_CLOCK}|\d\d:\d\d))\] ?"),
    ("[" + _DIGITS, rf"\[?{_ISO}\]?(?: (?P<cri>stdout|stderr) [FP](?= ))?[:,]? ?"),
    ("JFMASOND", rf"{_BSD} (?:[\w.-]{{1,64}} (?={_TAG.replace('?P<tag>', '')}))?"),  # syslog: host only where a program follows
    ("k", r"(?P<kern>kernel): ?"),
    ("[", r"\[(?:default|rank|worker_?|trainer|node)_?(?P<rank>\d{1,7})\]:? ?"),  # torchrun's and torch's own
    ("[", r"\[\d{1,5},(?P<mpi>\d{1,6})\]<(?:stdout|stderr)>: ?"),
    ("(", r"\((?P<ray>[\w:.]{1,60}) pid=\d{1,10}(?:, ip=[\d.]{7,15})?\) "),
    ("[", r"\[(?:pod|container)/[^\]\n]{1,150}\] "),
    (_DIGITS, r"(?P<srun>\d{1,5}): {1,2}(?=\S)"),  # srun --label
)
_COATS: Final = {first: tuple(re.compile(it) for firsts, it in _KINDS if first in firsts) for first in {*"".join(it for it, _ in _KINDS)}}
_TAGGED: Final = re.compile(_TAG)
_HOST_TAG: Final = re.compile(rf"(?P<host>[A-Za-z][\w.-]{{0,63}}) {_TAG}")
_RSYSLOG: Final = re.compile(r"\d{4}-\d\d-\d\dT[^,]*$")
_ONLY_TAG: Final = re.compile(r"(?P<tag>[a-z][\w.@()-]{1,60})\[\d{1,10}\]: ?(?! ?(?:segfault|general protection|trap |unhandled))")
_DOCKER: Final = re.compile(r'\{"log":"((?:[^"\\]|\\.){0,60000})')


class Peeled(NamedTuple):
    """What is left, and what was learned."""

    text: str
    tag: str = ""
    rank: str = ""
    t: float | None = None  # seconds; since the epoch where `wall`, since the boot otherwise
    wall: bool = False


def plain(text: str) -> str:
    """Without colours, and with of each line only what a terminal would still show of it."""
    if "\x1b" in text:
        text = ANSI.sub("", text)
    if "\r" in text:
        text = "\n".join(line.rstrip("\r").rpartition("\r")[2] for line in text.split("\n"))
    return text.replace("\0", " ") if "\0" in text else text


def peel(line: str) -> Peeled:
    """Take off what stands before the text, layer by layer."""
    tag, rank, t, wall = "", "", None, False
    if line.startswith('{"log":"') and (inner := _DOCKER.match(line)):
        line = inner[1].replace("\\n", "").replace('\\"', '"').replace("\\t", "\t").replace("\\u001b", "\x1b")
        line = ANSI.sub("", line)
    for _ in range(LAYERS):
        for coat in _COATS.get(line[:1], ()):
            if match := coat.match(line):
                break
        else:
            break
        found = match.groupdict()
        line = line[match.end() :].lstrip(" ") if not found.get("rank") else line[match.end() :]
        rank = found.get("rank") or rank
        if found.get("kern") or found.get("level") == "kern" or found.get("kmsg"):
            tag = "kernel"
        if t is None or not wall:
            t, wall = _time(found, t, wall=wall)
        if named := _program(line, match[0], found, kernel=tag == "kernel"):
            tag, line = named["tag"], line[named.end() :]
    if (own := _ONLY_TAG.match(line)) and tag in {"", "kernel"}:
        tag, line = own["tag"], line[own.end() :]
    return Peeled(line, tag.lower(), rank, t, wall)


def _program(line: str, coat: str, found: dict[str, str | None], *, kernel: bool) -> re.Match[str] | None:
    """The program that syslog names after the date; dmesg and programs write a date, too, but no host after it."""
    if found.get("bsd"):
        return _TAGGED.match(line)  # the host is off already
    if not found.get("iso") or found.get("cri") or kernel:
        return None
    named = _HOST_TAG.match(line)
    return named if named and (_RSYSLOG.match(coat) or named["tag"] == "kernel") else None


def _time(found: dict[str, str | None], t: float | None, *, wall: bool) -> tuple[float | None, bool]:
    """Of a layer: when, and by which clock. A date wins over the time since the boot."""
    if up := found.get("up"):
        return (float(up), False) if t is None else (t, wall)
    if us := found.get("us"):
        return int(us) / 1e6, False
    try:
        if iso := found.get("iso"):
            zone = found.get("zone") or "Z"
            head, _, rest = iso.replace("/", "-").partition(".")
            head = head.replace(",", ".")
            stamp = dt.datetime.fromisoformat(f"{head[:10]}T{head[11:19]}")
            if not YEARS[0] <= stamp.year <= YEARS[1]:
                return t, wall
            digits = "".join(c for c in (rest or head[20:]) if c.isdigit())[:6]
            offset = dt.datetime.fromisoformat(f"2000-01-01T00:00:00{zone}").tzinfo
            return stamp.replace(tzinfo=offset).timestamp() + (float("0." + digits) if digits else 0.0), True
        for name in ("bsd", "dmesg"):
            if raw := found.get(name):
                month, day, *rest_ = raw.split()
                clock = next(part for part in rest_ if ":" in part)
                year = next((int(part) for part in rest_ if ":" not in part), 1970)  # syslog does not say; 1970 orders as well
                hour, minute, *second = clock.split(":")
                date = dt.datetime(year, MONTHS[month], int(day), int(hour), int(minute), tzinfo=dt.UTC)
                return date.timestamp() + (float(second[0]) if second else 0.0), True
    except (ValueError, KeyError, OverflowError):  # 31 February, or a month that is none
        return t, wall
    return t, wall
