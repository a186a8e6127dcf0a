"""Ckpt: `resilient ckpt`: looks at committed checkpoints, checks them, compares them, and carries them to and fro.

    resilient ckpt ls URL                        committed steps: ranks, bytes, run
    resilient ckpt show URL [--step N]           one step: files, tensors and how they are split, own state
    resilient ckpt verify URL [--step N]         reads every byte and compares all digests
    resilient ckpt diff A B                      two steps, tensor by tensor: each a URL (its newest step), or URL/step-00000100
    resilient ckpt export URL DIR [--step N]     as a checkpoint that torch.distributed.checkpoint reads, or as safetensors
    resilient ckpt import SOURCE URL [--step N]  safetensors become a committed step, from which a run of any size starts
    resilient ckpt prune URL                     removes old steps, never the newest sound one

Contract: any URL that fsspec opens; never imports torch; only `export`, `import` and `prune` write. `--json`: one object per line. Exit
codes: 0 sound or equal; 1 damaged, missing, different or refused (the reason in one line); 2 wrong usage. On a terminal long work shows a
bar.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Final

from resilient.checkpoint import codec, compare, numbers
from resilient.checkpoint.disk import DiskTier
from resilient.checkpoint.export import Exported, export, export_safetensors
from resilient.checkpoint.intake import Weights, intake
from resilient.checkpoint.rankfile import Item
from resilient.checkpoint.retention import KEEP, Keep
from resilient.checkpoint.snapshot import own_of
from resilient.checkpoint.tensors import Tensors
from resilient.errors import CheckpointError, SnapshotCorrupt, SnapshotMissing
from resilient.progress import Bar, Watched, size

Facts = dict[str, Any]
_STEP: Final = re.compile(r"(.*)/step-(\d{8,})/?")
_UNITS: Final = {
    "": 1,
    **{unit: 1000**power for power, unit in enumerate("KMGT", 1)},
    **{unit + "I": 1024**power for power, unit in enumerate("KMGT", 1)},
}
_RANDOM: Final = {" rng": "random numbers", " grads": "gradients", " canary": "canary"}  # train/state.py


def add(commands: Any) -> None:
    """The sub-commands, for the parser of `resilient`."""
    ckpt = commands.add_parser("ckpt", help="look at checkpoints, check them, compare them, carry them to and fro")
    verbs = ckpt.add_subparsers(required=True, metavar="VERB")

    def verb(name: str, command: Callable[[argparse.Namespace, Bar], int], text: str, *places: str) -> argparse.ArgumentParser:
        parser: argparse.ArgumentParser = verbs.add_parser(name, help=text)
        for place in places:
            parser.add_argument(place.lower(), metavar=place, help=_PLACES[place])
        parser.add_argument("--json", action="store_true", help="one JSON object per line")
        parser.set_defaults(command=lambda args: _run(command, args))
        return parser

    verb("ls", _ls, "committed steps", "URL")
    show = verb("show", _show, "one step: files, tensors, own state", "URL")
    verify = verb("verify", _verify, "read every byte and compare all digests", "URL")
    verb("diff", _diff, "in what two steps differ, tensor by tensor", "A", "B")
    out = verb("export", _export, "write a step for others to read", "URL", "DIR")
    into = verb("import", _import, "make a committed step of safetensors files", "SOURCE", "URL")
    prune = verb("prune", _prune, "remove old steps, never the newest sound one", "URL")

    for parser, text in ((show, "the newest"), (verify, "all"), (out, "the newest")):
        parser.add_argument("--step", type=int, default=None, metavar="N", help=f"this step; otherwise {text}")
    out.add_argument(
        "--format", choices=("dcp", "safetensors"), default="dcp", help="dcp: as torch.distributed.checkpoint reads it (default)"
    )
    out.add_argument("--name", default="model", metavar="NAME", help="safetensors: the module tracked as NAME (default: model)")
    out.add_argument("--max-shard-size", type=_bytes, default="5GB", metavar="SIZE", help="safetensors: bytes of a file (default: 5GB)")
    into.add_argument("--step", type=_positive, default=1, metavar="N", help="a run that starts from it begins at step N (default: 1)")
    into.add_argument("--name", default="model", metavar="NAME", help="it is the module that runs track as NAME (default: model)")
    into.add_argument("--dtype", choices=numbers.FLOATS, default="", help="turn floating numbers into this")
    prune.add_argument(
        "--keep-last", type=_positive, default=KEEP.last, metavar="N", help=f"the newest N sound steps stay (default: {KEEP.last})"
    )
    prune.add_argument("--keep-every", type=_positive, default=0, metavar="M", help="steps that are a multiple of M stay, too")
    prune.add_argument("--dry-run", action="store_true", help="only say what would go")


_PLACES: Final = {
    "URL": "as given to resilient-run --checkpoint",
    "DIR": "a path or URL that holds no checkpoint yet",
    "SOURCE": "a .safetensors file, or a directory with one or with shards and their index",
    "A": "a URL (its newest step), or one step of it: URL/step-00000100",
    "B": "the same, or the number of another step of A's URL",
}


def _run(command: Callable[[argparse.Namespace, Bar], int], args: argparse.Namespace) -> int:
    with Bar() as bar:
        try:
            return command(args, bar)
        except CheckpointError as error:
            sys.stderr.write(f"resilient: {error}\n")
            return 1


# --------------------------------------------------------------------------- looking


def _ls(args: argparse.Namespace, bar: Bar) -> int:
    tier = _tier(args.url, bar)

    def there(step: int) -> Facts:
        tier.check_sizes(tier.manifest(step))
        return {}

    return _each(args, bar, tier, there)


def _verify(args: argparse.Namespace, bar: Bar) -> int:
    tier = _tier(args.url, bar)

    def read_all(step: int) -> Facts:
        _check(tier, step, bar)
        return {"verified": True}

    return _each(args, bar, tier, read_all)


def _show(args: argparse.Namespace, bar: Bar) -> int:
    tier = _tier(args.url, bar)
    tensors = Tensors(tier.checkpoint(_steps(tier, args.step)[-1]))
    for facts in _described(tensors):
        _say(args, bar, facts)
    return 0


def _described(tensors: Tensors) -> Iterator[Facts]:
    """All that is known of a step without reading its tensors."""
    whole, manifest = tensors.whole, tensors.whole.manifest
    tails = [whole.tail(rank) for rank in range(manifest.world_size)]
    items = [item for tail, _ in tails for item in tail.items]
    raw = sum(layout.rows[item.row].num_bytes for tail, layout in tails for item in tail.items)
    twins = max(layout.twins.count for _, layout in tails)
    yield {
        "step": manifest.step,
        "ranks": manifest.world_size,
        "replicas": twins,
        "bytes": sum(entry.bytes for entry in manifest.ranks),
        "tensor_bytes": raw,
        "compression": next((item.codec for item in items if item.codec), "none"),
        "run": manifest.run,
        **({"origin": manifest.origin} if manifest.origin else {}),
    }
    for entry, (tail, _) in zip(manifest.ranks, tails, strict=True):
        yield {"file": entry.file, "rank": entry.rank, "bytes": entry.bytes, "tensors": len(tail.items), "own_state": _own_keys(tail.head)}
    for key, tensor in tensors.entries.items():
        stored = sum(part.place.length for part in tensor.parts if isinstance(part.place, Item))
        packed = {"stored": stored} if any(isinstance(part.place, Item) and part.place.codec for part in tensor.parts) else {}
        shown = {"dtype": tensor.dtype, "shape": list(tensor.shape), "split": tensor.split or "whole", "bytes": tensor.num_bytes}
        yield {"tensor": key, **shown, "ranks": sorted({part.rank for part in tensor.parts}), **packed}
    for alias, key in sorted(tails[0][1].tied.items()):
        yield {"tied": alias, "to": key}
    for key, extra in tensors.values.items():
        yield {"value": key, "bytes": extra.length}


def _own_keys(head: bytes) -> list[str]:
    tree = codec.decode(own_of(head), leaf=lambda *_: None)
    return [_RANDOM.get(name, name) for name in tree]


def _diff(args: argparse.Namespace, bar: Bar) -> int:
    url, step = _place(args.a)
    other = (url, int(args.b)) if args.b.isdecimal() else _place(args.b)
    sides = []
    for where, wanted in ((url, step), other):
        tier = _tier(where, bar)
        sides.append(Tensors(tier.checkpoint(_steps(tier, wanted)[-1])))
    a, b = sides
    found, doubts, equal = compare.by_digest(a, b)
    for difference in found:
        _say(args, bar, _told(difference))
    bar.begin("compare", sum(2 * doubt.a.num_bytes for doubt in doubts))
    count = len(found)
    for doubt in doubts:
        if (apart := compare.by_reading(a, b, doubt)) is None:
            equal += 1
        else:
            count += 1
            _say(args, bar, _told(apart))
    _say(args, bar, {"steps": [a.whole.manifest.step, b.whole.manifest.step], "tensors_equal": equal, "differences": count})
    return 1 if count else 0


def _told(difference: compare.Difference) -> Facts:
    facts: Facts = {"name": difference.key, "differs": difference.what, "a": difference.a, "b": difference.b}
    if difference.elements:
        finite = difference.max_abs is None or math.isfinite(difference.max_abs)  # JSON has no infinity
        facts |= {"elements": difference.elements, "max_abs": difference.max_abs if finite else str(difference.max_abs)}
    return {key: value for key, value in facts.items() if value != ""}


# --------------------------------------------------------------------------- carrying


def _export(args: argparse.Namespace, bar: Bar) -> int:
    tier = _tier(args.url, bar)
    step = _steps(tier, args.step)[-1]
    total = sum(entry.bytes for entry in tier.manifest(step).ranks)
    if args.format == "safetensors":
        bar.begin(f"export step {step}", total)
        done: Exported = export_safetensors(tier, step, args.dir, name=args.name, shard_bytes_max=args.max_shard_size)
    else:
        bar.begin(f"export step {step}", 2 * total)
        done = export(tier, step, args.dir)
    _say(args, bar, {"step": done.step, "tensors": done.tensors, "bytes": done.num_bytes, "files": done.files, "to": args.dir})
    return 0


def _import(args: argparse.Namespace, bar: Bar) -> int:
    weights = Weights(args.source, lambda url: Watched(url, bar))
    bar.begin(f"import step {args.step}", sum(place.num_bytes for _, place in weights.places.values()))
    done = intake(weights, DiskTier(args.url), args.step, name=args.name, dtype=args.dtype)
    _say(args, bar, {"step": done.step, "tensors": done.tensors, "bytes": done.num_bytes, "from": args.source})
    return 0


def _prune(args: argparse.Namespace, bar: Bar) -> int:
    """The newest step whose every byte is right stays, whatever else is asked for: so it is looked for first."""
    tier = _tier(args.url, bar)
    distrusted: set[int] = set()
    for step in reversed(_steps(tier, None)):
        try:
            _check(tier, step, bar)
            break
        except (SnapshotCorrupt, SnapshotMissing) as error:
            distrusted.add(step)
            _say(args, bar, {"step": step, "error": str(error)})
    else:
        raise SnapshotCorrupt(f"{tier.url}: one sound step expected, none found: nothing is removed")
    keep = Keep(args.keep_last, args.keep_every)
    gone = tier.outdated(keep, distrusted=distrusted) if args.dry_run else tier.prune(keep, distrusted=distrusted)
    for step in gone:
        _say(args, bar, {"step": step, "would_remove" if args.dry_run else "removed": True})
    return 1 if distrusted else 0


# --------------------------------------------------------------------------- what they share


def _tier(url: str, bar: Bar) -> DiskTier:
    return DiskTier(url, storage=Watched(url, bar))


def _place(text: str) -> tuple[str, int | None]:
    """URL, or URL/step-00000100."""
    match = _STEP.fullmatch(text)
    return (match[1], int(match[2])) if match else (text, None)


def _check(tier: DiskTier, step: int, bar: Bar) -> None:
    """Verify, with a bar. Raises as DiskTier.verify."""
    whole = tier.checkpoint(step)
    twice = any(item.codec for item in whole.tail(0)[0].items)  # a frame's bytes are compared, and what is in it
    bar.begin(f"verify step {step}", sum(entry.bytes for entry in whole.manifest.ranks) * (1 + twice))
    tier.verify(step)


def _each(args: argparse.Namespace, bar: Bar, tier: DiskTier, look: Callable[[int], Facts]) -> int:
    """Tell of each step; 1 if one is not sound."""
    exit_code = 0
    for step in _steps(tier, getattr(args, "step", None)):
        try:
            manifest = tier.manifest(step)
            facts = {"ranks": manifest.world_size, "bytes": sum(entry.bytes for entry in manifest.ranks), "run": manifest.run}
            _say(args, bar, {"step": step, **facts, **({"origin": manifest.origin} if manifest.origin else {}), **look(step)})
        except CheckpointError as error:
            exit_code = 1
            _say(args, bar, {"step": step, "error": str(error)})
    return exit_code


def _steps(tier: DiskTier, step: int | None) -> tuple[int, ...]:
    steps = tier.steps()
    if not steps or (step is not None and step not in steps):
        msg = f"{tier.url}: {'no committed checkpoint' if step is None else f'step {step} is not committed'}; there: {list(steps)}"
        raise SnapshotMissing(msg)
    return steps if step is None else (step,)


def _say(args: argparse.Namespace, bar: Bar, facts: Facts) -> None:
    line = json.dumps(facts) if args.json else "   ".join(_words(facts))
    bar.hide()
    sys.stdout.write(line + "\n")


def _words(facts: Facts) -> Iterable[str]:
    for name, value in facts.items():
        if name in {"bytes", "tensor_bytes", "stored"}:
            yield f"{name} {size(value)}"
        elif isinstance(value, list) and name != "shape":
            yield f"{name} {', '.join(map(str, value))}"
        elif isinstance(value, float):
            yield f"{name} {value:.4g}"
        else:
            yield f"{name} {value}"


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"a number, 1 or more, expected, {text!r} found")
    return int(text)


def _bytes(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]I?)?B?", text.upper())
    count = int(float(match[1]) * _UNITS[match[2] or ""]) if match else 0
    if count < 1:
        raise argparse.ArgumentTypeError(f"a size such as 5GB or 512MiB expected, {text!r} found")
    return count
