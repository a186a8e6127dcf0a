"""Doctor: `resilient doctor`: whether this node is fit for work, before work is given to it.

    resilient doctor                       all probes once, then the active checks; a table
    resilient doctor --quick               the same in seconds: small sizes
    resilient doctor --json > healthy.json
    resilient doctor --compare healthy.json   also tells what is worse than there

Contract: exit code 0: no check failed (warnings may have been given); 1: one did, or did not come to its end in time; 2: wrong usage.
Probes are those of the entry-point group `resilient.probes`, checks those of `resilient.checks`, ours too. Never imports torch; changes
nothing but files and memory of its own, which are gone afterwards. Ends within --timeout-s and some seconds, whatever hangs.
"""

from __future__ import annotations

import argparse
import os
import socket
import sys
import time
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Final

import msgspec

from resilient import rulebook
from resilient.config import Options, nearest
from resilient.errors import ConfigError
from resilient_agents import check, marks, probe
from resilient_agents.chart import Chart, chart, compared, read, table
from resilient_agents.check import Patient
from resilient_agents.examination import Subject, examine

if TYPE_CHECKING:
    from collections.abc import Iterable
    from importlib.metadata import EntryPoint

    from resilient_agents.chart import Row

TIMEOUT_S: Final = 120.0  # eight GPUs, and torch from a slow disk
PROBES, CHECKS = "probes", "checks"  # words for all of them


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add `doctor` to the commands of `resilient`."""
    parser = commands.add_parser("doctor", help="whether this node is fit for work: all probes once, then active checks")
    add_arguments(parser)
    parser.set_defaults(command=command)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What an examination can be told."""
    parser.add_argument("--quick", action="store_true", help="small sizes: seconds instead of a minute")
    parser.add_argument("--json", action="store_true", help="one JSON object: rows, and what was found as findings")
    parser.add_argument(
        "--only", action="append", metavar="NAME", help="these only (several: again, or with commas); also 'probes', 'checks'"
    )
    parser.add_argument("--skip", action="append", metavar="NAME", help="not these; also 'probes', 'checks'")
    parser.add_argument("--timeout-s", type=float, default=TIMEOUT_S, help="for all together (default: %(default)s)")
    parser.add_argument("--compare", metavar="FILE", help="JSON of a healthy node: less than 0.8 of what it reached is a warning")
    parser.add_argument("--run-dir", default="", metavar="DIR", help="where runs will write; it is written to and read back")
    parser.add_argument("--checkpoint", default="", metavar="DIR", help="where checkpoints will go, likewise")
    parser.add_argument(
        "--memory-dir", default=Options().memory_dir, metavar="DIR", help="of the shared-memory segments (default: %(default)s)"
    )
    parser.add_argument("--root", default="/", metavar="DIR", help="where this node's /proc, /sys and /dev are (default: %(default)s)")
    parser.add_argument("--policy", default="", metavar="FILE", help="TOML file with other limits for the probes, as of resilient-run")
    parser.add_argument("--devices", metavar="N,N", help="these CUDA devices only, and not the processor ('' = none)")


def main() -> int:
    """What `preflight` starts: the command alone."""
    parser = argparse.ArgumentParser(prog="resilient doctor")
    add_arguments(parser)
    return command(parser.parse_args())


def command(args: argparse.Namespace) -> int:
    """Examine this node; gives the exit code."""
    try:
        if args.timeout_s <= 0:
            raise ConfigError(f"--timeout-s: more than 0 seconds expected, {args.timeout_s:g} found")
        healthy = read(args.compare) if args.compare else None
        if healthy is not None and healthy.quick != args.quick:
            kind = "with" if healthy.quick else "without"
            raise ConfigError(f"--compare {args.compare}: a chart of the same kind expected, one {kind} --quick found")
        subjects = chosen(registered(), _names(args.only), _names(args.skip))
        patient = _patient(args)
        rulebook.load(args.policy)
        marks.lay(marks.read(args.policy))
    except ConfigError as error:
        sys.stderr.write(f"resilient doctor: {error}\n")
        return 2
    found = _examined(subjects, patient, args.timeout_s, healthy)
    if args.json:
        sys.stdout.write(msgspec.json.encode(found).decode() + "\n")
    else:
        sys.stdout.write(table(found, colours=sys.stdout.isatty() and "NO_COLOR" not in os.environ))
    return 0 if found.sound else 1


def registered() -> list[Subject]:
    """Everything that could be done, probes first. Raises ConfigError if nothing is registered."""
    found = [Subject("probe", entry.name, entry.load) for entry in _sorted(probe.GROUP)]
    checks = [Subject("check", entry.name, entry.load) for entry in _sorted(check.GROUP)]
    if not checks:
        raise ConfigError(
            f"no checks are registered as {check.GROUP!r}: a package that is installed expected (pip install -e . after an update)"
        )
    return found + checks


def _sorted(group: str) -> list[EntryPoint]:
    return sorted(entry_points(group=group), key=lambda entry: entry.name)


def chosen(subjects: Iterable[Subject], only: Iterable[str], skip: Iterable[str]) -> list[Subject]:
    """Those that are wanted. Raises ConfigError for a name that nobody has."""
    subjects, only, skip = list(subjects), set(only), set(skip)
    known = {subject.name for subject in subjects} | {PROBES, CHECKS}
    for name in sorted((only | skip) - known):
        raise ConfigError(f"{name!r}: the name of a probe or check expected; the nearest is {nearest(name, known)!r}")
    left = [it for it in subjects if (not only or _names_of(it) & only) and not _names_of(it) & skip]
    if not left:
        raise ConfigError("--only and --skip leave nothing to be done")
    return left


def _examined(subjects: list[Subject], patient: Patient, timeout_s: float, healthy: Chart | None) -> Chart:
    at, began = time.time(), time.monotonic()
    rows: list[Row] = examine(subjects, patient, timeout_s)
    if healthy is not None:
        rows = compared(rows, healthy)
    return chart(socket.gethostname(), at, time.monotonic() - began, rows, quick=patient.quick)


def _patient(args: argparse.Namespace) -> Patient:
    places = [("run", args.run_dir), ("checkpoint", args.checkpoint.removeprefix("file://")), ("tmp", os.environ.get("TMPDIR", "/tmp"))]  # noqa: S108
    return Patient(
        quick=args.quick,
        root=args.root,
        places=tuple((name, path) for name, path in places if path),
        memory_dir=args.memory_dir,
        devices=_devices(args.devices),
        cpu=args.devices is None,
    )


def _devices(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        return tuple(int(word) for word in text.split(",") if word)
    except ValueError:
        raise ConfigError(f"--devices: numbers with commas between them expected, {text!r} found") from None


def _names(given: list[str] | None) -> list[str]:
    return [name for text in given or () for name in text.split(",") if name]


def _names_of(subject: Subject) -> set[str]:
    return {subject.name, PROBES if subject.source == "probe" else CHECKS}
