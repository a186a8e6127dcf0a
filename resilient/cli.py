"""Cli: the console script `resilient`: looks at a run from outside, and tidies up after dead ones.

    resilient status RUN_DIR              who sits where, and how far they are
    resilient events RUN_DIR [--follow]   what happened, one line each
    resilient snapshot RUN_DIR            have a checkpoint made now, and wait for it
    resilient clean [--memory-dir DIR]    remove shared memory that dead runs left
    resilient ckpt VERB URL               checkpoints (ckpt.py)
    resilient doctor                      whether this node is fit for work (resilient_agents/doctor.py)
    resilient diagnose [FILES]            what went wrong, from logs and flight-recorder dumps (resilient_agents/diagnosis)

Contract: `status`, `events` and `snapshot` know the run directory's files (host/journal.py) and nothing else. Never imports torch; changes
nothing but in `clean` and `snapshot`, and what `ckpt` is told to write.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from resilient_agents import doctor
from resilient_agents.diagnosis import command as diagnose

from resilient import ckpt
from resilient.checkpoint import memory
from resilient.config import Options
from resilient.host.journal import WISH

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

FOLLOW_S: Final = 0.2
STALE_S: Final = 5.0  # status.json is written each second


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; gives the exit code."""
    args = _parser().parse_args(argv)
    try:
        exit_code: int = args.command(args)
    except FileNotFoundError as error:
        sys.stderr.write(f"resilient: {error.filename}: no such file (is this a run directory?)\n")
        return 2
    except BrokenPipeError:  # `| head`
        sys.stderr.close()
        return 0
    except KeyboardInterrupt:
        return 130
    return exit_code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="resilient", description="Look at a run of resilient-run, and tidy up after dead ones.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    status = commands.add_parser("status", help="who sits where, and how far they are")
    status.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    status.add_argument("--json", action="store_true", help="print status.json as it is")
    status.set_defaults(command=_status)
    events = commands.add_parser("events", help="what happened, one line each")
    events.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    events.add_argument("-f", "--follow", action="store_true", help="go on until the run has finished")
    events.add_argument("--json", action="store_true", help="print the lines of events.jsonl as they are")
    events.set_defaults(command=_events)
    snapshot = commands.add_parser("snapshot", help="have a checkpoint made now, and wait for it")
    snapshot.add_argument("run_dir", type=Path, metavar="RUN_DIR")
    snapshot.add_argument("--timeout-s", type=float, default=120.0, help="how long to wait for its commit (default: %(default)s)")
    snapshot.set_defaults(command=_snapshot)
    clean = commands.add_parser("clean", help="remove shared memory that dead runs left")
    clean.add_argument("--memory-dir", default=Options().memory_dir, metavar="DIR")
    clean.set_defaults(command=_clean)
    ckpt.add(commands)
    doctor.add(commands)
    diagnose.add(commands)
    return parser


def _status(args: argparse.Namespace) -> int:
    text = (args.run_dir / "status.json").read_text(encoding="utf-8")
    if args.json:
        sys.stdout.write(text)
        return 0
    status = json.loads(text)
    age = abs(time.time() - status["updated_at"])  # a clock may have been set back since
    note = f", not written for {age:.0f} s: is resilient-run alive?" if status["state"] in {"forming", "running"} and age > STALE_S else ""
    print(f"run {status['run_id']}: {status['state']}, round {status['round']}, {status['world_size']} ranks{note}")
    for rank in status["ranks"]:
        where = f"{rank['node']}/{rank['local_rank']:<3} pid {rank['pid']:<8} step {rank['step']}"
        print(f"  rank {rank['rank']:<4} {where}{_waits(rank)}")
    for standby in status["standbys"]:
        ready = "ready" if standby["ready"] else "warming up"
        print(f"  standby for rank {standby['shadow']:<4} {standby['node']} pid {standby['pid']:<8} {ready}")
    if checkpoint := status.get("checkpoint"):
        print(f"  checkpoint {_cadence(checkpoint)}")
    if replicas := status.get("replicas"):
        print(f"  replicas {_equality(replicas)}")
    return 0


def _waits(it: dict[str, Any]) -> str:
    """How long it waits for the others, and they for it."""
    if it.get("waits") is None:
        return ""
    slower = it.get("slower") or 0.0
    return f"  waits {it['waits']:.0%} of a step" + (f", the others {slower:.0%} longer" if slower >= 0.1 else "")


def _equality(it: dict[str, Any]) -> str:
    """Whether they are equal, and as of when."""
    looked = f"{it['audits']} steps compared, step {it['step']} last"
    if not it["differ"]:
        return f"equal; {looked}"
    return f"DIFFER on ranks {', '.join(map(str, it['differ']))} since step {it['since']} (resilient events says where); {looked}"


def _cadence(it: dict[str, Any]) -> str:
    """How often, why, and how far."""
    newest = f"step {it['committed']}" if it["committed"] >= 0 else "none yet"
    often = f"every {it['every']} steps" if it["every"] else "when asked for" if not it["auto"] else "interval not known yet"
    chosen = f" (chosen: {it['failures_per_day']:.3g} failures a day expected, {it['failures']} seen)" if it["auto"] else ""
    cost = (
        ""
        if it["cost_s"] is None
        else f", costs {it['cost_s']:.3f} s ({it['stall_s']:.3f} s of it a stall; a step takes {it['step_s']:.3f} s)"
    )
    coming = f", next at step {it['next']}" if it["next"] > max(it["committed"], 0) else ""
    return f"{newest}; {often}{chosen}{cost}{coming}"


def _snapshot(args: argparse.Namespace) -> int:
    status = json.loads((args.run_dir / "status.json").read_text(encoding="utf-8"))
    if status["state"] not in {"forming", "running"} or abs(time.time() - status["updated_at"]) > STALE_S:
        sys.stderr.write(f"resilient: {args.run_dir}: a run that is under way expected, one found that is not ({status['state']})\n")
        return 1
    if not status.get("checkpoint"):
        sys.stderr.write(f"resilient: {args.run_dir}: the run was started without --checkpoint\n")
        return 2
    step = max((rank["step"] for rank in status["ranks"]), default=0)
    (args.run_dir / WISH).touch()
    until = time.monotonic() + args.timeout_s
    while time.monotonic() < until:
        for event in map(json.loads, _lines(args.run_dir / "events.jsonl", follow=False)):
            if event["event"] == "checkpoint_committed" and event["step"] > step:
                print(f"checkpoint of step {event['step']} is committed")
                return 0
            if event["event"] == "run_finished":
                break
        else:
            time.sleep(FOLLOW_S)
            continue
        break
    sys.stderr.write(f"resilient: {args.run_dir}: no checkpoint after step {step} within {args.timeout_s:g} s, or before the run ended\n")
    return 1


def _events(args: argparse.Namespace) -> int:
    first: float | None = None
    for line in _lines(args.run_dir / "events.jsonl", follow=args.follow):
        if args.json:
            print(line, flush=args.follow)
            continue
        event = json.loads(line)
        t, name = event.pop("t"), event.pop("event")
        first = t if first is None else first
        print(f"{t - first:9.3f} s  {name:<22} {_words(event)}", flush=args.follow)
    return 0


def _words(event: dict[str, Any]) -> str:
    shown = {key: value for key, value in event.items() if value not in (None, "", [], {})}
    return "  ".join(f"{key}={_short(value)}" for key, value in shown.items())


def _short(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value).strip().rpartition("\n")[2]  # of a traceback: its last line


def _lines(path: Path, *, follow: bool) -> Iterator[str]:
    """Whole lines; with `follow`, until the run's last one."""
    with path.open(encoding="utf-8", errors="replace") as file:
        rest = ""
        while True:
            piece = file.readline()
            rest += piece
            if rest.endswith("\n"):
                yield rest.rstrip("\n")
                if follow and '"event":"run_finished"' in rest:
                    return
                rest = ""
            elif not follow:
                return
            else:
                time.sleep(FOLLOW_S)


def _clean(args: argparse.Namespace) -> int:
    removed = memory.clean_stale(args.memory_dir)
    for path in removed:
        print(f"removed {path}")
    print(f"{len(removed)} stale segment(s) in {args.memory_dir}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
