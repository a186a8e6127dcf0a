"""Ckpt: `resilient ckpt`: looks at committed checkpoints, checks them, and hands them on.

    resilient ckpt ls URL                        committed steps: ranks, bytes, run
    resilient ckpt verify URL [--step N]         reads every byte and compares all digests
    resilient ckpt export URL DIR [--step N]     as a checkpoint that torch.distributed.checkpoint reads

Contract: any URL that fsspec opens; never imports torch; changes nothing under URL. Exit codes: 0 sound, 1 damaged or missing (the reason
in one line for each step), 2 wrong usage.
"""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

from resilient.checkpoint.disk import DiskTier
from resilient.checkpoint.export import export
from resilient.errors import CheckpointError, SnapshotMissing

if TYPE_CHECKING:
    import argparse


def add(commands: Any) -> None:
    """The sub-commands, for the parser of `resilient`."""
    ckpt = commands.add_parser("ckpt", help="look at checkpoints, check them, hand them on")
    verbs = ckpt.add_subparsers(required=True, metavar="VERB")
    for name, command, text in (
        ("ls", _ls, "committed steps"),
        ("verify", _verify, "read every byte and compare all digests"),
        ("export", _export, "write a checkpoint that torch.distributed.checkpoint reads"),
    ):
        verb = verbs.add_parser(name, help=text)
        verb.add_argument("url", metavar="URL", help="as given to resilient-run --checkpoint")
        if name == "export":
            verb.add_argument("directory", metavar="DIR", help="a path or URL that holds no checkpoint yet")
        if name != "ls":
            verb.add_argument("--step", type=int, default=None, metavar="N", help="this step; otherwise all (verify), the newest (export)")
        verb.add_argument("--json", action="store_true", help="one JSON object per line")
        verb.set_defaults(command=command)


def _ls(args: argparse.Namespace) -> int:
    return _each(args, DiskTier(args.url), lambda _tier, _step: {})


def _verify(args: argparse.Namespace) -> int:
    return _each(args, DiskTier(args.url), _read_all)


def _export(args: argparse.Namespace) -> int:
    tier = DiskTier(args.url)
    try:
        done = export(tier, _steps(tier, args.step)[-1], args.directory)
    except CheckpointError as error:
        sys.stderr.write(f"resilient: {error}\n")
        return 1
    _say(args, {"step": done.step, "tensors": done.tensors, "bytes": done.num_bytes, "to": args.directory})
    return 0


def _each(args: argparse.Namespace, tier: DiskTier, look: Any) -> int:
    """Tell of each step; 1 if one is not sound."""
    exit_code = 0
    try:
        steps = _steps(tier, getattr(args, "step", None))
    except CheckpointError as error:
        sys.stderr.write(f"resilient: {error}\n")
        return 1
    for step in steps:
        try:
            manifest = tier.manifest(step)
            facts = {"ranks": manifest.world_size, "bytes": sum(entry.bytes for entry in manifest.ranks), "run": manifest.run}
            _say(args, {"step": step, **facts, **look(tier, step)})
        except CheckpointError as error:
            exit_code = 1
            _say(args, {"step": step, "error": str(error)})
    return exit_code


def _steps(tier: DiskTier, step: int | None) -> tuple[int, ...]:
    steps = tier.steps()
    if not steps or (step is not None and step not in steps):
        msg = f"{tier.url}: {'no committed checkpoint' if step is None else f'step {step} is not committed'}; there: {list(steps)}"
        raise SnapshotMissing(msg)
    return steps if step is None else (step,)


def _read_all(tier: DiskTier, step: int) -> dict[str, Any]:
    tier.verify(step)
    return {"verified": True}


def _say(args: argparse.Namespace, facts: dict[str, Any]) -> None:
    line = json.dumps(facts) if args.json else "   ".join(f"{name} {value}" for name, value in facts.items())
    sys.stdout.write(line + "\n")
