"""Catalogue: what is known of lines and numbers, read from the data files in facts/.

Think of a botanist's key: it holds no opinions of its own, only entries, each with what to look for, what it is called, and who said so;
and an index of the words by which one finds the page.

Contract: `lines()` are the entries of every facts/*.toml in order of file name and place: the first that fits wins. `table(name)` are the
rows of facts/NAME.csv by their first column. An entry that is not well formed is an error when it is loaded, with its file and number.
`candidates(low)` gives the entries whose words stand in a lower-case text; `fits` says of one whether it does. Read once; never changed.
Numbers: some 350 entries; loading takes about 0.1 s, once. A line of 100 letters costs about 5 us where no word of it is in the index.
Rejected: one large alternation (10 times slower in `re`); a regular expression per entry tried in turn (100 times); entries in Python
(nobody could review them against their sources, or print them as a table).
"""

from __future__ import annotations

import csv
import functools
import re
import tomllib
from collections import Counter
from importlib import resources
from typing import TYPE_CHECKING, Any, Final, NamedTuple, get_args

from resilient.core.messages import Class, Msg, Role

if TYPE_CHECKING:
    from collections.abc import Iterable

HOME: Final = "resilient_agents.diagnosis"
WORD: Final = re.compile(r"[a-z]{3,}|e[a-z\d]\d{4}|50[57]\d{3}|[12]07\d{3}")  # words, and the codes of Ascend
# whose lines: the kernel's alone, those of programs in syslog, either, everybody's but the kernel's, anybody's
WHERE: Final = ("kernel", "daemon", "system", "user", "any")
PIECES: Final = {  # what a pattern may name with <...>, so that each is spelled once
    "<pci>": r"(?P<pci>(?:[0-9a-f]{4,8}:)?[0-9a-f]{2}:[0-9a-f]{2})(?:\.[0-9a-f])?",
    "<dev>": r"(?P<dev>[\w./#:+@-]{1,80}?)",
    "<pid>": r"(?P<pid>\d{1,10})",
    "<rank>": r"(?P<rank>\d{1,7})",
    "<gpu>": r"(?P<gpu>\d{1,3})",
    "<npu>": r"(?P<npu>\d{1,4})",
    "<cpu>": r"(?P<cpu>\d{1,5})",
    "<peer>": r"(?P<peer>[\w.:-]{1,80}?)",
    "<code>": r"(?P<code>\w{1,40})",
}
_NAMED: Final = re.compile(r"(?<!\?P)<\w+>")
COMMON: Final = frozenset(  # words that say nothing: an entry is not found by them if it has another
    [
        "the",
        "and",
        "for",
        "with",
        "not",
        "has",
        "was",
        "been",
        "from",
        "this",
        "that",
        "you",
        "are",
        "all",
        "got",
        "due",
        "than",
        "more",
        "can",
        "via",
        "out",
        "into",
        "after",
        "before",
        "while",
        "error",
        "errors",
        "failed",
        "fail",
        "failure",
        "warning",
        "info",
        "rank",
        "process",
        "device",
        "memory",
        "node",
        "state",
        "kernel",
        "system",
        "timeout",
        "message",
        "link",
        "time",
        "code",
        "status",
        "new",
        "data",
        "task",
        "job",
        "python",
        "torch",
        "nccl",
        "gpu",
        "cuda",
        "file",
        "line",
        "page",
        "bus",
        "size",
        "index",
        "null",
        "none",
        "zero",
        "are",
        "its",
        "may",
        "will",
        "run",
        "set",
        "get",
        "start",
        "stop",
        "call",
        "request",
    ]
)


class Entry(Msg):
    """One kind of line."""

    number: str  # file:place, to be named in errors and in the page
    kind: str
    layer: str
    class_: Class
    role: Role
    where: str
    has: tuple[str, ...]  # lower case; all must stand in the text
    any: tuple[str, ...] = ()  # lower case; one of them must
    no: tuple[str, ...] = ()  # lower case; none of them may
    key: str = ""  # the word to find it by, where the rarest of `has` may stand inside of a longer one
    re: str = ""  # must be found too; may name code, device and other pieces
    code: str = ""  # may have {pieces}
    device: str = ""  # may have {pieces}; those that the text does not give are left out
    by: str = ""  # a reader of decode.py that has the last word
    block: bool = False  # fits over several lines
    clears: bool = False
    example: str = ""
    stream: str = ""  # of the example
    source: str = ""
    note: str = ""


@functools.cache
def table(name: str) -> dict[str, dict[str, str]]:
    """The rows of a table by their first column; of several with the same, the first."""
    found: dict[str, dict[str, str]] = {}
    for row in rows(name):
        found.setdefault(next(iter(row.values())), row)
    return found


@functools.cache
def rows(name: str) -> tuple[dict[str, str], ...]:
    """A table as it stands."""
    with resources.files(HOME).joinpath("facts", f"{name}.csv").open(encoding="utf-8") as file:
        return tuple(csv.DictReader(file))


@functools.cache
def lines() -> tuple[Entry, ...]:
    """Every entry, in the order in which they are tried."""
    found: list[Entry] = []
    for path in sorted(resources.files(HOME).joinpath("facts").iterdir(), key=lambda it: it.name):
        if path.name.endswith(".toml"):
            found += _read(path.name, tomllib.loads(path.read_text(encoding="utf-8")))
    return tuple(found)


def _read(file: str, data: dict[str, Any]) -> Iterable[Entry]:
    defaults: dict[str, Any] = data.pop("default", {})
    for place, raw in enumerate(data.pop("line", []), 1):
        it = {"role": "cause", "where": "any", "has": (), **defaults, **raw}
        for key in ("has", "any", "no"):
            value = it.get(key, ())
            it[key] = tuple(word.lower() for word in ([value] if isinstance(value, str) else value))
        name = f"{file.removesuffix('.toml')}:{place}"
        unknown = it.keys() - {*Entry.__struct_fields__, "class"}
        missing = {"kind", "layer", "class"} - it.keys()
        if unknown or missing or not (it["has"] or it["any"]) or it["where"] not in WHERE:
            raise ValueError(f"catalogue entry {name}: unknown {sorted(unknown)}, missing {sorted(missing)}, {raw}")
        if it["class"] not in get_args(Class) or it["role"] not in get_args(Role):
            raise ValueError(f"catalogue entry {name}: class {it['class']!r}, role {it['role']!r}")
        yield Entry(number=name, class_=it.pop("class"), **it)
    if data:
        raise ValueError(f"catalogue file {file}: [default] and [[line]] expected, found {sorted(data)}")


@functools.cache
def pattern(source: str) -> re.Pattern[str]:
    """Compiled when first needed: most never are."""
    seen: dict[str, int] = {}

    def piece(it: re.Match[str]) -> str:
        seen[it[0]] = seen.get(it[0], 1) + 1
        again = "" if seen[it[0]] == 2 else str(seen[it[0]] - 1)
        return PIECES.get(it[0], it[0]).replace(it[0], f"<{it[0][1:-1]}{again}>")

    return re.compile(_NAMED.sub(piece, source), re.IGNORECASE | re.MULTILINE)


class _Clue(NamedTuple):
    """Where an entry stands in the index."""

    place: int
    entry: Entry
    literal: str  # this must stand in the text
    more: tuple[str, ...]  # and all of these
    either: tuple[str, ...]  # and, if there are any, one of these


@functools.cache
def _index() -> dict[str, tuple[_Clue, ...]]:
    """Word -> entries that one finds by it. Each entry stands under its rarest word, or under one of each of its alternatives."""
    entries = lines()
    often = Counter(word for entry in entries for literal in (*entry.has, *entry.any) for word in set(WORD.findall(literal)))

    def key(literal: str, number: str) -> tuple[bool, bool, int, int, str]:
        usable = WORD.findall(literal)
        if not usable:
            raise ValueError(f"catalogue entry {number}: no word of three letters in {literal!r}")
        # the last word of a literal may go on in a line ("uncorrect"); of the others the one that fewest entries have
        return max((word not in COMMON, not literal.endswith(word), -often[word], len(word), word) for word in usable)

    found: dict[str, list[_Clue]] = {}
    for place, entry in enumerate(entries):
        has = [key(literal, entry.number) for literal in entry.has if WORD.search(literal)]
        if entry.key or not entry.any or any(rare for rare, *_ in has):
            literal = entry.has[0] if entry.has else entry.key
            word = entry.key or max(has)[-1]
            found.setdefault(word, []).append(_Clue(place, entry, literal, entry.has[1:], entry.any))
        else:
            for literal in entry.any:
                found.setdefault(key(literal, entry.number)[-1], []).append(_Clue(place, entry, literal, entry.has, ()))
    return {word: tuple(clues) for word, clues in found.items()}


@functools.cache
def _keys() -> frozenset[str]:
    return frozenset(_index())


def candidates(low: str) -> list[Entry]:
    """Entries whose words stand in this lower-case text, in order; mostly none."""
    hit = _keys().intersection(WORD.findall(low))
    if not hit:
        return []
    index = _index()
    found: dict[int, Entry] = {}
    for word in hit:
        for place, entry, literal, more, either in index[word]:
            if literal not in low or place in found:
                continue
            for other in more:
                if other not in low:
                    break
            else:
                if not either or _one(either, low):
                    found[place] = entry
    return [found[place] for place in sorted(found)] if len(found) > 1 else list(found.values())


def _one(words: tuple[str, ...], low: str) -> bool:
    for word in words:  # noqa: SIM110 - any() with a generator takes three times as long
        if word in low:
            return True
    return False


def still(found: list[Entry], low: str) -> list[Entry]:
    """Of candidates for a text, those for a part of it."""
    return [entry for entry in found if all(map(low.__contains__, entry.has)) and (not entry.any or _one(entry.any, low))]


def quiet(entry: Entry) -> bool:
    """Whether an entry says no more than that a line is nothing: then nobody needs to look closer."""
    return entry.kind == "benign" and not (entry.re or entry.no or entry.device or entry.code or entry.by or entry.block or entry.clears)


def fits(entry: Entry, low: str, text: str) -> dict[str, str] | None:
    """For a candidate: the pieces that its pattern names (dev2 is another place of dev), if the entry fits; None if it does not."""
    if entry.no and any(word in low for word in entry.no):
        return None
    if not entry.re:
        return {}
    match = pattern(entry.re).search(text)
    return None if match is None else {key.rstrip("23456789"): value for key, value in match.groupdict().items() if value}
