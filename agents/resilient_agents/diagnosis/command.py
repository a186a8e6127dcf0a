"""Command: `resilient diagnose`: logs and dumps in, incidents out.

    resilient diagnose [FILE|DIR]...   what happened, whose fault it was, what to do; with --json for tools
    resilient diagnose --jsonl         one verdict for each object of standard input (jsonl.py)

Think of the coroner's desk: the boxes of a dead run come in, and one page goes out, with the cause first and the evidence below it.

Contract: reads, never writes anything but standard output and complaints. Without FILE it reads standard input as one log. Exit code: 0
nothing was found that a machine or a job is to be treated for, 1 something was, 2 a file could not be read. Never imports torch.
"""

from __future__ import annotations

import argparse
import datetime as dt
import json
import os
import sys
from typing import TYPE_CHECKING, Any, Final

import msgspec

from resilient_agents.diagnosis import jsonl, readings, recorder
from resilient_agents.diagnosis.grouping import WINDOW_S, Incident, Sighting, incidents
from resilient_agents.diagnosis.text import NOT_FAULTS

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

FILES: Final = 100_000
SIGHTINGS: Final = 1_000_000  # more are not kept: the first ones tell
ADVICE: Final = {
    "ignore": "nothing",
    "user": "the program is at fault: correct it; no machine is to blame",
    "app-restart": "restart the process on the same device",
    "gpu-reset": "reset the GPU, or reboot the node, before it is used again",
    "replace": "take a standby node now, look at this one later",
    "cordon": "give no new work to this node until somebody has looked at it",
}


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Give the command its place among those of `resilient`."""
    parser = commands.add_parser("diagnose", help="what went wrong, from logs and flight-recorder dumps")
    parser.add_argument(
        "files", nargs="*", metavar="FILE", help="logs, Flight Recorder dumps, directories of them (default: standard input)"
    )
    parser.add_argument("--json", action="store_true", help="print incidents and findings as JSON")
    parser.add_argument(
        "--jsonl", action="store_true", help='read {"id","text","stream"} per line from standard input, print a verdict for each'
    )
    parser.add_argument("--stream", choices=sorted(jsonl.STREAMS), default="", help="whose lines these are (default: by name and content)")
    parser.add_argument("--window-s", type=float, default=WINDOW_S, help="what is further apart is another incident (default: %(default)s)")
    parser.set_defaults(command=run)


def run(args: argparse.Namespace) -> int:
    """Diagnose; gives the exit code."""
    if args.jsonl:
        return _answered()
    paths = list(_walked(args.files)) or ["/dev/stdin"]
    seen: list[Sighting] = []
    dumps: dict[int, recorder.Dump] = {}
    unread: list[str] = []
    for number, path in enumerate(paths):
        try:
            _read(path, number, args.stream, seen, dumps)
        except (OSError, recorder.DumpError) as error:
            unread.append(path)
            _complain(f"{path}: {getattr(error, 'strerror', None) or error}")
    for place, finding in enumerate(recorder.missing_and_mismatched(dumps)):
        seen.append(Sighting(finding=finding, place=place, source=f"{len(dumps)} flight-recorder dumps"))
    found = incidents(seen, args.window_s)
    if args.json:
        _print(
            json.dumps({"files": len(paths), "unread": unread, "findings": len(seen), "incidents": [_plain(it) for it in found]}, indent=1)
        )
    else:
        dumped = f", {len(dumps)} of them flight-recorder dumps" if dumps else ""
        _print(f"{len(paths)} file(s){dumped}; {len(seen)} findings, {len(found)} incident(s)")
        for number, incident in enumerate(found, 1):
            _print("\n" + "\n".join(_told(number, incident)))
    if unread:
        return 2
    return int(any(it.verdict not in NOT_FAULTS for it in found))


def _answered() -> int:
    """From standard input to standard output."""
    try:
        return jsonl.run(0, 1)
    except BrokenPipeError:
        raise  # `| head`
    except OSError as error:
        _complain(f"--jsonl: standard input and output expected, {error.strerror}")
        return 2


def _complain(text: str) -> None:
    sys.stderr.write(f"resilient: {_shown(text)}\n")


def _read(path: str, number: int, stream: str, seen: list[Sighting], dumps: dict[int, recorder.Dump]) -> None:
    if path != "/dev/stdin" and (dump := readings.dump(path)) is not None:
        rank = readings.rank_of(path)
        if rank is None or rank in dumps:
            raise recorder.DumpError("a Flight Recorder dump whose name ends with its rank expected, and one of each rank")
        dumps[rank] = dump
        return
    node = os.path.basename(os.path.dirname(os.path.abspath(path)))
    for it in readings.sightings(path, node if _names_a_node(node) else "", stream, place=number << 32):
        if len(seen) >= SIGHTINGS:
            return
        seen.append(it)


def _names_a_node(directory: str) -> bool:
    return (
        any(c.isdigit() for c in directory)
        and any(c.isalpha() for c in directory)
        and not directory.startswith(("attempt", "rank", "round"))
    )


def _walked(paths: Sequence[str]) -> Iterator[str]:
    for path in paths:
        if not os.path.isdir(path):
            yield path
            continue
        for directory, inner, names in os.walk(path):
            inner.sort()
            found = (os.path.join(directory, name) for name in sorted(names)[:FILES])
            yield from (path for path in found if os.path.isfile(path))  # a FIFO or a device would never end


def _plain(incident: Incident) -> Any:
    return msgspec.to_builtins(incident)


def _told(number: int, it: Incident) -> Iterator[str]:
    """An incident for people."""
    finding = it.cause.finding
    when = f"  {_when(it.begin, it.clock)} .. {_when(it.end, it.clock)}" if it.begin is not None and it.end is not None else ""
    yield f"incident {number}{when}"
    place = " ".join(part for part in (finding.device, f"on {it.cause.node}" if it.cause.node else "") if part)
    yield f"  cause     {finding.kind} {finding.code}".rstrip() + (f", {place}" if place else "") + f"  ({finding.layer}, {finding.role})"
    yield f"  verdict   {it.verdict}: {ADVICE[it.verdict]}"
    if it.shared:
        yield f"  culprit   none: the same on {len(it.shared)} nodes, look at what they share ({', '.join(it.shared[:8])})"
    elif it.verdict == "user":
        yield "  culprit   the program"
    else:
        yield f"  culprit   {it.culprit or 'not named'}"
    for other in it.also:
        yield f"  also      {other.finding.kind} {other.finding.code} {other.finding.device} {other.node}".rstrip()
    if it.consequences:
        yield "  then      " + ", ".join(f"{kind} x {count}" for kind, count in it.consequences)
    for line in it.evidence:
        yield f"  evidence  {line.source}: {_line(line.finding.text)}"


def _when(t: float | None, clock: str) -> str:
    if t is None:
        return "?"
    if clock != "wall":
        return f"{t:.3f} s after boot"
    date = dt.datetime.fromtimestamp(t, dt.UTC)
    return date.strftime("%b %d %H:%M:%S" if date.year == 1970 else "%Y-%m-%d %H:%M:%S UTC")


def _line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return lines[-1].strip()[:200] if lines else ""


def _print(text: str) -> None:
    sys.stdout.write("\n".join(map(_shown, text.split("\n"))) + "\n")


def _shown(text: str) -> str:
    """What is in a log, or is a file's name, is not to move a terminal's cursor, nor to be too much for its coding."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\t" else c.encode("unicode_escape", "surrogatepass").decode() for c in text)
