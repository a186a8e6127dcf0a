"""Recorder: what the Flight Recorder dumps of all ranks say: who did not come, and who came for something else.

Think of the attendance lists of many meetings: laid side by side they show at which meeting somebody was missing, and who had brought the
agenda of another one.

Contract: `read(data)` takes a dump as torch writes it, pickled or JSON (versions 2.x), and never runs what is in it: of classes, only
torch's own list makers are known, as plain lists; anything else is an error. `missing_and_mismatched(dumps)` is pure and gives a finding
per process group and fault: ranks that did not enter the oldest unfinished collective (role cause), a rank without a dump, collectives that
differ in kind or size at the same number (class user), or, if all have entered, that it does not end (role symptom).
Limits: LARGEST bytes a dump, COPIED values that lists are made of; the pure-Python unpickler, for the one in C lets a file of ten bytes ask
for gigabytes of memo. Lists that hold each other a thousand times over are no dump.
"""

from __future__ import annotations

import json
import pickle
import struct
from collections import Counter
from io import BytesIO
from itertools import islice
from typing import TYPE_CHECKING, Any, ClassVar, Final

from resilient.core.messages import Finding, Msg
from resilient.errors import ResilientError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

LARGEST: Final = 256 << 20
COPIED: Final = 10_000_000
NUMBERS: Final = 64  # of the sizes of one collective
EQUAL_SIZES: Final = (
    "all_reduce",
    "allreduce",
    "_all_gather_base",
    "all_gather_into",
    "_reduce_scatter_base",
    "reduce_scatter_tensor",
    "broadcast",
)
DONE: Final = "completed"
RETIRED: Final = "retired"  # gloo's are never seen to start or to complete: they are over, one way or the other
SHOWN: Final = 8


OPCODES: Final = (  # those that containers and plain values are made of
    *("\x80", "\x95", ".", "(", "}", "]", ")", "t", "\x85", "\x86", "\x87", "a", "e", "s", "u", "d", "l", "q", "r", "h", "j", "\x94"),
    *("X", "\x8c", "U", "T", "J", "K", "M", "\x8a", "G", "N", "\x88", "\x89", "c", "\x93", "R"),
)


class DumpError(ResilientError):
    """A file that is no Flight Recorder dump."""


class Entry(Msg):
    """One collective of one rank."""

    seq: int
    name: str
    state: str
    sizes: tuple[int, ...] = ()


class Dump(Msg):
    """What one rank has recorded: group -> entries by number."""

    groups: dict[str, dict[int, Entry]]
    members: dict[str, tuple[int, ...]]
    described: dict[str, str] = {}


class Unpickler(pickle._Unpickler):  # noqa: SLF001 - the one in Python, see the head of this file
    """Containers and plain values, nothing else."""

    _copied = 0
    dispatch: ClassVar[dict[int, Any]] = {ord(code): pickle._Unpickler.dispatch[ord(code)] for code in OPCODES}  # noqa: SLF001

    def find_class(self, module: str, name: str) -> Callable[..., Any]:
        """Torch's list makers, without torch."""
        if module == "torch.jit._pickle":
            if name in {"build_intlist", "build_doublelist", "build_boollist"}:
                return self._listed
            if name == "restore_type_tag":
                return _untagged
        raise DumpError(f"plain values expected in a dump, found {module}.{name}")

    def _listed(self, values: list[Any]) -> list[Any]:
        self._copied += len(values)
        if self._copied > COPIED:
            raise DumpError(f"lists of at most {COPIED} values expected in a dump")
        return list(values)

    def persistent_load(self, pid: object) -> Any:
        """No tensors."""
        raise DumpError(f"plain values expected in a dump, found a persistent id {pid!r:.40}")


def _untagged(value: Any, _tag: object = None) -> Any:
    return value


def read(data: bytes) -> Dump:
    """A dump from its bytes."""
    if len(data) > LARGEST:
        raise DumpError(f"at most {LARGEST} bytes expected, found {len(data)}")
    try:
        raw = json.loads(data) if data[:1] in {b"{", b" ", b"\n"} else Unpickler(BytesIO(data)).load()
    except DumpError:
        raise
    except (
        pickle.UnpicklingError,
        struct.error,
        ValueError,
        EOFError,
        IndexError,
        KeyError,
        AttributeError,
        TypeError,
        RecursionError,
        OverflowError,
        MemoryError,
    ) as error:
        raise DumpError(f"a Flight Recorder dump expected: {type(error).__name__}: {error}") from None
    if not isinstance(raw, dict) or not isinstance(raw.get("entries"), list):
        raise DumpError(f"a dictionary with entries expected, found {type(raw).__name__}")
    try:
        return _dump(raw)
    except (ValueError, TypeError, AttributeError, IndexError, KeyError, OverflowError, RecursionError) as error:
        raise DumpError(f"a Flight Recorder dump expected: {type(error).__name__}: {error}") from None


def _dump(raw: dict[str, Any]) -> Dump:
    members: dict[str, tuple[int, ...]] = {}
    described: dict[str, str] = {}
    for name, config in (raw.get("pg_config") or {}).items():
        ranks = config.get("ranks", "[]")
        ranks = json.loads(ranks) if isinstance(ranks, str) else ranks
        members[_word(name)] = tuple(sorted(int(rank) for rank in ranks))
        described[_word(name)] = _word(config.get("desc", ""))
    groups: dict[str, dict[int, Entry]] = {}
    for it in raw["entries"]:
        if it.get("is_p2p"):
            continue
        group = it.get("process_group") or it.get("pg_id", "")
        name = _word(group[0] if isinstance(group, (list, tuple)) else group)
        seq = int(it.get("collective_seq_id", it.get("seq_id", -1)))
        sizes = tuple(islice(_numbers(it.get("input_sizes")), NUMBERS))
        operation, state = _word(it.get("profiling_name", "")), _word(it.get("state", ""))
        if it.get("retired") and operation.startswith("gloo:") and state != DONE:
            state = RETIRED
        entry = Entry(seq=seq, name=operation, state=state, sizes=sizes)
        if seq >= 0 and "coalesced" not in entry.name:
            groups.setdefault(name, {})[seq] = entry
    return Dump(groups=groups, members=members, described=described)


def _word(value: Any) -> str:
    if not isinstance(value, (str, int, type(None))):
        raise TypeError(f"a word expected, found a {type(value).__name__}")
    return str(value)


def _numbers(sizes: Any) -> Iterator[int]:
    """Of the sizes of tensors, which are a list of lists, or one list."""
    for size in islice(sizes or (), NUMBERS):
        if isinstance(size, (list, tuple)):
            yield from (number for number in islice(size, NUMBERS) if isinstance(number, int))
        elif isinstance(size, int):
            yield size


def missing_and_mismatched(dumps: Mapping[int, Dump]) -> list[Finding]:
    """All ranks' dumps laid side by side."""
    found: list[Finding] = []
    for group in sorted({name for dump in dumps.values() for name in dump.groups}):
        members = sorted({rank for dump in dumps.values() for rank in _members(dump, group)})
        members = members or sorted(rank for rank, dump in dumps.items() if group in dump.groups)
        described = next((d for dump in dumps.values() if (d := dump.described.get(group))), "")
        label = f"group {group}" + (f" ({described})" if described else "")
        found += _of_group(label, {rank: dumps[rank].groups.get(group, {}) for rank in members if rank in dumps}, members)
    return found


def _members(dump: Dump, group: str) -> tuple[int, ...]:
    """Who belongs to a group; gloo gives its first one no name."""
    if group not in dump.members and set(dump.members) == {""} and len(dump.groups) == 1:
        return dump.members[""]
    return dump.members.get(group, ())


def _of_group(label: str, entries: dict[int, dict[int, Entry]], members: list[int]) -> list[Finding]:
    silent = [rank for rank in members if rank not in entries]
    newest = {rank: max(of_rank, default=-1) for rank, of_rank in entries.items()}
    for seq in sorted({seq for of_rank in entries.values() for seq in of_rank}):
        at = {rank: of_rank[seq] for rank, of_rank in entries.items() if seq in of_rank}
        absent = [rank for rank, last in newest.items() if seq > last]  # older ones fell out of its ring
        if differing := _differing(at):
            return [_finding("collective-mismatch", "user", "cause", differing[0], f"{label}, collective {seq}: {differing[1]}")]
        stuck = [rank for rank, entry in at.items() if entry.state not in {DONE, RETIRED}]
        if not stuck and not (absent and any(entry.state == RETIRED for entry in at.values())):
            continue
        name = next(iter(at.values())).name
        if absent or silent:
            text = f"{label}, collective {seq} ({name}): {len(at)} of {len(members)} ranks entered"
            out = []
            if absent:
                out.append(_finding("collective-missing", "replace", "cause", absent, f"{text}; {_ranks(absent)} did not"))
            if silent:
                role = "cause" if not absent else "context"
                out.append(_finding("collective-missing", "replace", role, silent, f"{text}; no dump of {_ranks(silent)}"))
            return out
        waiting = [rank for rank in stuck if at[rank].state == "scheduled"]
        if waiting and len(waiting) < len(at):
            text = f"{label}, collective {seq} ({name}): all entered; on {_ranks(waiting)} the device has not begun it"
            return [_finding("collective-missing", "replace", "cause", waiting, text)]
        text = f"{label}, collective {seq} ({name}): all {len(members)} ranks entered, it does not end"
        return [_finding("nccl-timeout", "app-restart", "symptom", [], text)]
    return []


def _differing(at: dict[int, Entry]) -> tuple[list[int], str] | None:
    """The ranks that came for something else, if the others agree."""
    if len(at) < 2:
        return None
    for what, of in (("operations", _name), ("sizes", _sizes)):
        votes = Counter(of(entry) for entry in at.values())
        if len(votes) > 1:
            usual = votes.most_common(1)[0][0]
            odd = sorted(rank for rank, entry in at.items() if of(entry) != usual)
            return odd, f"different {what}: {_ranks(odd)} {of(at[odd[0]])}, the others {usual}"
    return None


def _name(entry: Entry) -> str:
    return entry.name.rpartition(":")[2]


def _sizes(entry: Entry) -> str:
    return str(list(entry.sizes)) if _name(entry).startswith(EQUAL_SIZES) else ""


def _ranks(ranks: list[int]) -> str:
    more = f" and {len(ranks) - SHOWN} more" if len(ranks) > SHOWN else ""
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks[:SHOWN]))}{more}"


def _finding(kind: str, class_: Any, role: Any, ranks: list[int], text: str) -> Finding:
    device = ",".join(f"rank:{rank}" for rank in ranks[:SHOWN])
    return Finding(seq=0, kind=kind, layer="torch", class_=class_, role=role, device=device, text=text, probe="flight-recorder")
