"""Text: what a line, or a short block of lines, says is the matter.

Think of a night porter who has read the house's logs for twenty years: nearly all of it he lets pass without looking up; of the rest he
knows by heart what it means, whose fault it is, and which of it is only an echo of something that broke elsewhere.

Contract: `classify(text, stream)` gives exactly one finding for any text whatever and never raises; class "ignore" with kind "" where there
is nothing. Streams: "kmsg", "syslog", "stdout", "stderr". Only the kernel's own lines prove what the kernel is said to have seen: the same
words on a worker's stdout are kind "quoted", class "ignore". A traceback is judged by the exception it ends with, not by what it quotes.
Of a block the finding is the cause, if one line names it, and otherwise the first that says anything; a recovery after it clears it.
Numbers: at most BOUND letters and LINES lines are looked at, from both ends. An unremarkable line costs about 5 us, a fault about 35 us.
"""

from __future__ import annotations

import functools
import re
from typing import TYPE_CHECKING, Any, Final

import msgspec

from resilient.core.messages import Finding
from resilient_agents.diagnosis import catalogue, decode, traces
from resilient_agents.diagnosis.peel import Peeled, peel, plain

if TYPE_CHECKING:
    from collections.abc import Iterator

    from resilient_agents.diagnosis.catalogue import Entry

BOUND: Final = 65_536  # letters of a block; the ends say most
LINE: Final = 4_096  # letters of a line
SHORT: Final = 1_024  # letters of what is remembered
LINES: Final = 400
SHOWN: Final = 400  # letters of a finding's text
NOT_FAULTS: Final = frozenset({"ignore", "user"})
NODES: Final = frozenset({"gpu-reset", "replace", "cordon"})
PROOFS: Final = frozenset({"kernel", "daemon", "system"})  # whose words prove something only from their own mouth
REPEATS: Final = ("audit:", "audit(", "usb ", "input:", "hid-", "bluetooth:")  # the kernel says here what somebody else named so
GENERAL: Final = "device-fault"  # words that anybody may use: they do not make a quotation
NOTHING: Final = Finding(seq=0, kind="", class_="ignore", role="context", probe="text")

_NORMAL_PCI: Final = re.compile(r"([0-9a-f]{1,8}):([0-9a-f]{2}):([0-9a-f]{2})", re.IGNORECASE)
_FINDERS: Final = {  # where an entry's device names a piece that its own pattern does not
    "pci": re.compile(catalogue.PIECES["<pci>"], re.IGNORECASE),
    "rank": re.compile(r"\brank[ :=]{0,2}(?P<rank>\d{1,7})", re.IGNORECASE),
    "pid": re.compile(r"\bpid[ :=]{0,2}(?P<pid>\d{1,10})", re.IGNORECASE),
    "gpu": re.compile(r"\b(?:gpu|cuda|device)[ :=#]{0,2}(?P<gpu>\d{1,3})\b(?!:)", re.IGNORECASE),
    "npu": re.compile(r"\b(?:npu|device|deviceid|logicid|phyid)[ :=#\[]{0,3}(?P<npu>\d{1,4})\b", re.IGNORECASE),
    "cpu": re.compile(r"\bcpu[ #:=]{0,2}(?P<cpu>\d{1,5})\b", re.IGNORECASE),
    "peer": re.compile(r"(?P<peer>\b\d{1,3}\.\d{1,3}\.\d{1,3}\.\d{1,3}\b)"),
    "dev": re.compile(r"\((?:device )?(?P<dev>[a-z][\w-]{1,40})(?:: state \w+)?\)|\b(?P<name>(?:sd[a-z]{1,2}|nvme\d+n\d+|ata\d+)\b)"),
    "hca": re.compile(r"\b(?P<hca>mlx\d_(?:bond_)?\d{1,3}(?::\d{1,2})?)\b"),
}
# source code and commands are shown, not said
_SOURCE: Final = re.compile(r"""\s*(?:raise |assert |print\(|log(?:ger|ging)?\.\w+\(|File "|grep |[$#] |>>> |def |return |if |except )""")
_RAISED: Final = re.compile(r"(?:[a-z_]\w{0,60}\.){0,8}(?:_?[A-Z]\w{0,60}(?:Error|Exception)|Exception): ")
_NCCL: Final = re.compile(r"\S{1,64}:\d+:\d+ \[(\d{1,3})\] ")
_GLUED: Final = re.compile(r"\[rank(\d{1,7})\]|\bRank (\d{1,7})\]")
_PIECE: Final = re.compile(r"\{(\w+)\}")


def classify(text: str, stream: str) -> Finding:
    """The one finding that this text is worth."""
    return _known(text, stream) if len(text) <= SHORT else _classified(text, stream)


@functools.lru_cache(maxsize=4096)  # a machine in trouble repeats itself; at most 4 MB
def _known(text: str, stream: str) -> Finding:
    return _classified(text, stream)


def _classified(text: str, stream: str) -> Finding:
    if len(text) > BOUND:
        text = text[: BOUND // 2] + "\n" + text[-BOUND // 2 :]
    text = plain(text)
    found = catalogue.candidates(text.lower())
    if not found:
        return NOTHING if stream == "kmsg" or not _raises(text) else _single(text, stream, found)
    if catalogue.quiet(found[0]) and (len(found) == 1 or all(map(catalogue.quiet, found))):
        return _quiet(found[0].layer)
    return _single(text, stream, found) if "\n" not in text.strip("\n") else _block(text, stream, found)


@functools.cache
def _quiet(layer: str) -> Finding:
    return Finding(seq=0, kind="benign", layer=layer, class_="ignore", role="context", probe="text")


def relevant(line: str) -> bool:
    """Whether a line has a word that any entry is found by. Cheap; False is sure, True is not."""
    return bool(catalogue.candidates(line[:LINE].lower()))


def is_fault(finding: Finding) -> bool:
    """Whether infrastructure failed or a job needs recovery."""
    return finding.class_ not in NOT_FAULTS


def _raises(text: str) -> bool:
    return "Error: " in text or "Exception: " in text


def _single(text: str, stream: str, known: list[Entry]) -> Finding:
    line = _cut(text.strip("\n"))
    return _judge(line, peel(line), stream, known, message=False) or NOTHING


def _block(text: str, stream: str, known: list[Entry]) -> Finding:
    lines = [_cut(line) for line in text.split("\n")]
    if len(lines) > LINES:
        lines = lines[: LINES // 4] + lines[-LINES * 3 // 4 :]
    found = list(_findings(lines, stream, known))
    whole = "\n".join(lines)
    if any(entry.block for entry in known) and (
        over := _judge(whole, Peeled(whole, peel(lines[0]).tag), stream, known, message=False, block=True)
    ):
        found.insert(0, over)
    return best(found)


def _findings(lines: list[str], stream: str, known: list[Entry]) -> Iterator[Finding]:
    """Of a block, line by line; of tracebacks, each rank's own, what they end with."""
    if stream == "kmsg" or not any(traces.START in line.lower() for line in lines):
        for line in lines:
            if (catalogue.still(known, line.lower()) or _raises(line)) and (
                finding := _judge(line, peel(line), stream, known, message=False)
            ):
                yield finding
        return
    by_rank: dict[str, list[Peeled]] = {}
    before = ""
    for line in lines:
        peeled = peel(line)
        before = before or _before(peeled.text)
        if before and peeled.text.startswith(before):
            peeled = peeled._replace(text=peeled.text[len(before) :])
        by_rank.setdefault(peeled.rank, []).append(peeled)
    for rank, peeled_lines in by_rank.items():
        for line, message in traces.told([it.text for it in peeled_lines]):
            if line.strip() and (finding := _judge(line, Peeled(line, rank=rank), stream, known, message=message)):
                yield finding


def _before(text: str) -> str:
    """What a logger of its own kind puts before a traceback, and then before each of its lines."""
    place = text.lower().find(traces.START)
    before = text[:place] if 0 < place < 120 else ""
    return "" if before.strip().lower() == "original" else before


def _judge(line: str, peeled: Peeled, stream: str, known: list[Entry], *, message: bool, block: bool = False) -> Finding | None:
    """The first entry, of those known to have their words in the text, that fits and whose place this is."""
    if peeled.tag not in {"", "kernel"}:  # the program's name is one of the words
        peeled = peeled._replace(text=f"{peeled.tag}: {peeled.text}")
    if stream != "kmsg" and not block and _SOURCE.match(peeled.text):
        return None
    low = peeled.text.lower()
    kernel = (stream == "kmsg" or (stream == "syslog" and peeled.tag in {"", "kernel"})) and not low.startswith(REPEATS)
    user = stream != "kmsg" or peeled.tag not in {"", "kernel"}
    daemon = stream == "syslog" and peeled.tag != "kernel"
    speaks = {"any": True, "kernel": kernel, "daemon": daemon, "system": kernel or daemon, "user": user}
    first: Finding | None = None
    quoted: Finding | None = None
    for entry in catalogue.still(known, low):
        if entry.block != block or (first is not None and entry.where != "kernel"):
            continue
        found = catalogue.fits(entry, low, peeled.text)
        if found is None:
            continue
        if first is None and speaks[entry.where]:
            first = _finding(entry, found, line, peeled)
            if kernel or entry.where in PROOFS or first.class_ not in NODES:
                return first
        elif not (kernel or speaks[entry.where]) and entry.where in PROOFS and entry.class_ != "ignore" and entry.kind != GENERAL:
            seen = _finding(entry, found, line, peeled)
            quoted = msgspec.structs.replace(seen, kind="quoted", class_="ignore", role="context", clears=False)
            if first is not None or entry.where == "kernel":
                break  # a node is not to blame for what somebody says the kernel said
    if first is not None and quoted is None:
        return first
    message = message or (stream != "kmsg" and not block and first is None and bool(_RAISED.match(peeled.text)))
    if message and (named := traces.NAMED.match(peeled.text)):
        fields: dict[str, Any] = {"kind": "user-exc", "class_": "user", "role": "cause"} | decode.exception(named.groupdict())
        rank = f"rank:{peeled.rank}" if peeled.rank else ""
        return Finding(seq=0, layer="process", device=rank, text=_shown(line), probe="text", **fields)
    return quoted


def _finding(entry: Entry, found: dict[str, str], line: str, peeled: Peeled) -> Finding:
    """What the entry says, with the pieces of the line filled in and the tables' word on the number."""
    known: dict[str, Any] = decode.READERS[entry.by](found, peeled.text) if entry.by else {}
    code = known.pop("code", None)
    if code is None:
        code = _filled(entry.code, found, line, peeled) if entry.code else found.get("code", "")
    device = ",".join(dict.fromkeys(filled for part in entry.device.split(",") if (filled := _filled(part, found, line, peeled))))
    fields: dict[str, Any] = {
        "device": device,
        "kind": entry.kind,
        "layer": entry.layer,
        "class_": entry.class_,
        "role": entry.role,
        "clears": entry.clears,
    }
    return Finding(seq=0, code=code, text=_shown(line), probe="text", **(fields | known))


def _filled(template: str, found: dict[str, str], line: str, peeled: Peeled) -> str:
    """A template with its pieces; "" where one of them is not in the text. `a|b` takes the first that is."""
    for choice in template.split("|"):
        missing = False
        out = choice
        for name in _PIECE.findall(choice):
            value = found.get(name) or _piece(name, line, peeled)
            if value is None:
                missing = True
                break
            out = out.replace("{" + name + "}", pci(value) if name == "pci" else value)
        if not missing:
            return out
    return ""


def _piece(name: str, line: str, peeled: Peeled) -> str | None:
    if name == "rank" and peeled.rank:
        return peeled.rank
    if name == "rank" and (glued := _GLUED.search(line)):
        return glued[1] or glued[2]
    if name == "local" and (glued := _NCCL.match(peeled.text)):
        return glued[1]
    finder = _FINDERS.get(name)
    match = finder.search(peeled.text) if finder else None
    return next((it for it in match.groups() if it), None) if match else None


def pci(address: str) -> str:
    """As findings spell it: four digits of domain, lower case, no function."""
    if len(address) == 5:
        address = "0000:" + address
    match = _NORMAL_PCI.match(address)
    return f"{match[1][-4:].lower():0>4}:{match[2].lower()}:{match[3].lower()}" if match else address.lower()


def best(found: list[Finding]) -> Finding:
    """The one of a block: a cause of the machine's, else the first that speaks; what is cleared later on is over."""
    cleared = [
        it
        for place, it in enumerate(found)
        if not (is_fault(it) and any(later.clears and later.kind == it.kind for later in found[place + 1 :]))
    ]
    faults = [it for it in cleared if is_fault(it) and it.role == "cause"]
    speaking = [it for it in cleared if it.class_ != "ignore"]
    reasons = [it for it in speaking if it.kind != "exit"]  # that something ended is the least that can be said
    for group in (faults, reasons, speaking, [it for it in cleared if it.clears], [it for it in cleared if it.kind != "quoted"], cleared):
        if group:
            return group[0]
    return NOTHING


def _cut(line: str) -> str:
    return line if len(line) <= LINE else line[: LINE // 2] + " ... " + line[-LINE // 2 :]


def _shown(line: str) -> str:
    return line.strip()[:SHOWN]
