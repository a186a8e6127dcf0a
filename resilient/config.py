"""Configuration: our own options, from flags, environment, a file, and defaults.

Think of four transparent sheets laid on top of each other: flags on RESILIENT_* variables on the TOML file on the defaults. You read
the topmost ink. A word on any sheet that is not on the form is an error that names the nearest word that is.

Contract: `Options` is the only list of options: flags, variables, keys, types, defaults and help all come from it. `resolve` is
pure; whoever calls it reads the files and the environment. torchrun's own flags are not here: they keep torchrun's meaning and
torchrun's variables (PET_*).
Used by the launcher alone: it is read once, and what others need is handed to them.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, get_args, get_origin, get_type_hints

import msgspec

from resilient.errors import ConfigError

if TYPE_CHECKING:
    import argparse

PREFIX: Final = "RESILIENT_"
# set for workers, not by users: seen when resilient-run is started by a script that is itself a worker
NOT_OURS: Final = frozenset(
    {"TOKEN", "SOCKET", "WORKER", "ROLE", "PAGE", "RUN_ID", "STACKS", "CONFIG", "CACHE"},
)

NonNegative = Annotated[int, msgspec.Meta(ge=0)]
Positive = Annotated[int, msgspec.Meta(ge=1)]
ZstdLevel = Annotated[int, msgspec.Meta(ge=0, le=22)]
Seconds = Annotated[float, msgspec.Meta(gt=0)]
BytesPerS = Annotated[int, msgspec.Meta(ge=0, description="text may end in KB, MB, GB, KiB, MiB, GiB")]
_UNITS: Final = {"": 1, "K": 1000, "M": 1000**2, "G": 1000**3, "KI": 1 << 10, "MI": 1 << 20, "GI": 1 << 30}
SecondsOrNone = Annotated[float, msgspec.Meta(ge=0)]
Share = Annotated[float, msgspec.Meta(gt=0, le=1)]


class Options(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything that can be set, beside torchrun's own flags."""

    standbys: NonNegative = 0
    shadows: Literal["none", "all"] = "none"
    run_dir: str = ""
    checkpoint: str = ""
    checkpoint_every: NonNegative | Literal["auto"] = "auto"  # docs/decisions/0011-cadence.md
    checkpoint_budget: Share = 0.01  # what nobody notices; ten times less often than the step time of most runs changes by itself
    snapshot_every: Positive | Literal["auto"] = "auto"  # docs/decisions/0018-snapshots.md
    audit_every_s: SecondsOrNone = 60.0  # docs/decisions/0019-audits.md
    grace_s: SecondsOrNone = 25.0  # Kubernetes and Slurm give 30; five are for ending what is left
    checkpoint_keep: Positive = 3  # why: checkpoint/disk.py, Keep
    checkpoint_keep_every: NonNegative = 0
    checkpoint_zstd: ZstdLevel = 0  # a disk is faster than zstd, and training state shrinks by a tenth only
    memory_dir: str = "/dev/shm"  # noqa: S108 - shared memory is the point
    memory_keep_s: SecondsOrNone | Literal["auto"] = "auto"  # docs/decisions/0015-adoption.md
    copies: NonNegative = 1
    parity: NonNegative = 0
    failure_domain: str = ""
    data_interface: str = ""
    data_rate: BytesPerS = 0
    data_transport: str = "tcp"
    token_file: str = ""
    policy: str = ""
    lease_s: Seconds = 10.0  # ten missed reports; twice the longest pause in tests/bench
    first_step_timeout_s: Seconds = 600.0  # compilation of a large model takes minutes
    probes: str = "auto"
    probe_root: str = "/"
    probe_socket: str = "/run/resilient/agent.sock"
    preflight: Literal["off", "quick", "full"] = "off"  # a start would be seconds later, and a restart is a start: docs/probes.md
    preflight_timeout_s: Seconds = 120.0  # as of `resilient doctor`
    hang: Literal["act", "report", "off"] = "act"
    log_level: Literal["debug", "info", "warning", "error"] = "warning"


HELP: Final[dict[str, str]] = {
    "standbys": "Warm standby workers to keep on this node; each shadows one of its ranks.",
    "shadows": "'all' keeps one parked standby for every rank of this node (wins over --standbys).",
    "run_dir": "Directory of status.json, events.jsonl, logs and evidence (default: runs/<run id>).",
    "checkpoint": "URL or directory of the persistent checkpoints (anything fsspec opens); without it none are written.",
    "checkpoint_every": "Steps between two persistent checkpoints, or 'auto': as often as is worth it.",
    "checkpoint_budget": "With 'auto': the share of the time that checkpoints may cost.",
    "snapshot_every": "Steps between two snapshots in memory of sharded state, or 'auto': as often as takes a hundredth of the time.",
    "audit_every_s": "Seconds between two comparisons of data-parallel replicas (0: only when a checkpoint is committed).",
    "grace_s": "With --checkpoint: seconds from SIGTERM to the end; the newest state in memory is checkpointed first (0: not).",
    "checkpoint_keep": "Persistent checkpoints that are kept: the newest so many.",
    "checkpoint_keep_every": "Also kept, for good: those whose step is a multiple of this (0: none).",
    "checkpoint_zstd": "Level of zstandard by which checkpoints are compressed, 1 to 22 (0: not at all).",
    "memory_dir": "Directory of the shared-memory segments.",
    "memory_keep_s": "Seconds that state in memory waits for a killed run's restart ('auto': 3600 with --rdzv-id and --checkpoint).",
    "copies": "On how many other nodes the copies of each node's ranks are kept (that of the node with the coordinator counts).",
    "parity": "So many nodes keep XOR parity of their snapshots together, in place of whole copies: one of them may be lost (0: copies).",
    "failure_domain": "What this node shares with others that would be lost with it (a rack, a switch): copies go to other domains.",
    "data_interface": "Interface (eth1), address or network (10.1.0.0/16) through which copies of state go between the nodes.",
    "data_rate": "Bytes per second that this node sends to keep copies elsewhere, such as 500MB; 0 = as fast as it goes.",
    "data_transport": "How copies of state go from memory to memory: 'tcp', or what a package has registered (resilient.transports).",
    "token_file": "File with the secret that the nodes of a run share (or set RESILIENT_TOKEN).",
    "policy": "TOML file over the rules by which findings of probes are judged (resilient/policy.toml).",
    "lease_s": "Seconds of silence after which a node counts as lost.",
    "first_step_timeout_s": "Seconds the first step may take (compilation, data loading) before it counts as a hang.",
    "probes": "'auto', 'off', the names of those to use, or of those not to use with 'no-' before each ('no-nvml,no-disk').",
    "probe_root": "Where the probes find this node's /proc, /sys and /dev (for recorded machines, and in containers).",
    "probe_socket": "Socket of the node's resilient-agent, used where there is one ('' = never).",
    "preflight": "Examine this node (resilient doctor) before it takes part; one that fails ends with exit code 3.",
    "preflight_timeout_s": "Seconds the preflight may take; a node whose preflight takes longer does not take part.",
    "hang": "What is done about ranks that do not move: 'act' replaces the culprit, 'report' only tells of it, 'off' does not look.",
    "log_level": "How much resilient-run itself says on stderr.",
}


def flags_of(name: str) -> tuple[str, ...]:
    """The spellings of one option: with dashes, with underscores, and without the unit."""
    dashed = "--" + name.replace("_", "-")
    spellings = [dashed, "--" + name]
    if name.endswith("_s"):
        spellings.append(dashed[:-2])
    return tuple(dict.fromkeys(spellings))


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add one flag per option, and --config. A flag that is not given does not appear in the namespace's `ours` values (None)."""
    group = parser.add_argument_group("resilience options", "also RESILIENT_<NAME> in the environment, or <name> in the --config file")
    group.add_argument("--config", default=None, metavar="FILE", help="TOML file with any of the options below.")
    for field in msgspec.structs.fields(Options):
        default = f" (default: {field.default})" if field.default not in {"", None} else ""
        choices = get_args(_bare(field.type)) if get_origin(_bare(field.type)) is Literal else None
        group.add_argument(
            *flags_of(field.name),
            dest=f"ours_{field.name}",
            default=None,
            choices=choices,
            metavar=None if choices else field.name.upper(),
            help=HELP[field.name] + default,
        )


def given_flags(namespace: Mapping[str, Any]) -> dict[str, str]:
    """Our flags that were given, by option name."""
    pairs = ((name.removeprefix("ours_"), value) for name, value in namespace.items() if name.startswith("ours_"))
    return {name: value for name, value in pairs if value is not None}


def resolve(flags: Mapping[str, str], environment: Mapping[str, str], file: str | None) -> Options:
    """Lay the sheets on top of each other. Raises ConfigError that names the key, the value and where it stands."""
    values: dict[str, Any] = {}
    source: dict[str, str] = {}
    layers: list[tuple[str, Mapping[str, Any]]] = []
    if file is not None:
        layers.append((f"in {file}", _read_toml(file)))
    layers.append(("in the environment", _from_environment(environment)))
    layers.append(("on the command line", flags))
    for where, layer in layers:
        for key, value in layer.items():
            values[_known(key, where)] = value
            source[key] = where
    hints = get_type_hints(Options, include_extras=True)
    clean = {key: _typed(key, value, hints[key], source[key]) for key, value in values.items()}
    return Options(**clean)


def _read_toml(file: str) -> Mapping[str, Any]:
    try:
        return tomllib.loads(Path(file).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"config file {file}: cannot be read ({error.strerror})") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"config file {file}: TOML expected ({error})") from error


def _from_environment(environment: Mapping[str, str]) -> dict[str, str]:
    names = (name.removeprefix(PREFIX) for name in environment if name.startswith(PREFIX))
    return {name.lower(): environment[PREFIX + name] for name in names if name not in NOT_OURS}


def _known(key: str, where: str) -> str:
    fields = [field.name for field in msgspec.structs.fields(Options)]
    if key in fields:
        return key
    near = nearest(key, fields)
    shown = PREFIX + key.upper() if where == "in the environment" else key
    shown_near = PREFIX + near.upper() if where == "in the environment" else near
    raise ConfigError(f"unknown option {shown!r} {where}; the nearest valid one is {shown_near!r}")


def nearest(word: str, known: Iterable[str]) -> str:
    """The known word that looks most like `word`; always one."""
    return max(sorted(known), key=lambda candidate: difflib.SequenceMatcher(None, word, candidate).ratio())


def _typed(key: str, value: Any, kind: Any, where: str) -> Any:
    if kind == BytesPerS and isinstance(value, str):
        value = _number_of_bytes(key, value, where)
    lax = isinstance(value, str) and _bare(kind) is not str  # text from a flag or variable is read as a number
    try:
        return msgspec.convert(value, kind, strict=not lax)
    except msgspec.ValidationError as error:
        raise ConfigError(f"option {key!r} {where}: {error}, found {value!r}") from None


def _number_of_bytes(key: str, text: str, where: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]I?)?B?(?:/S)?", text.strip().upper())
    if match is None:
        raise ConfigError(f"option {key!r} {where}: bytes expected, such as 500MB or 2GiB, found {text!r}")
    return int(float(match[1]) * _UNITS[match[2] or ""])


def _bare(kind: Any) -> Any:
    """The type without its Annotated wrapper."""
    return get_args(kind)[0] if get_origin(kind) is Annotated else kind
