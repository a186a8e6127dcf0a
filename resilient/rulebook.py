"""Rulebook: reads the policy's rules from resilient/policy.toml, and a user's own over them.

Think of a printed form with a sheet of tracing paper on top: what is written on the paper counts, what is not shows through, and a word
that fits no box of the form is handed back with the box that was probably meant.

Contract: `shipped()` and `load(file)` do all the reading; `lay` is pure. Every error is a ConfigError that names the file, the key, the
value and the nearest valid one. What comes out is `core.rules.Rules`: the machines never see a file.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final, get_args

import msgspec

from resilient.config import nearest
from resilient.core.messages import Class, VerdictName
from resilient.core.policy import OPEN
from resilient.core.rules import HARMLESS, Limits, Rule, Rules
from resilient.errors import ConfigError

SHIPPED: Final = Path(__file__).with_name("policy.toml")
CLASSES: Final = tuple(c for c in get_args(Class) if c)
VERDICTS: Final = get_args(VerdictName)
TOP: Final = ("classes", "limits", "rule", "kinds", "proof", "hearsay", "probe")
FIT: Final = ("kind", "layer", "codes", "probe", "given")
KEYS: Final = tuple(f.encode_name for f in msgspec.structs.fields(Rule) if f.name != "name")


def shipped() -> Rules:
    """The rules that come with the package."""
    return lay(Rules(), _read(SHIPPED), SHIPPED.name)


def load(file: str) -> Rules:
    """Those, and a user's file over them ("" = none)."""
    return lay(shipped(), _read(Path(file)), file) if file else shipped()


def probe_table(file: str) -> Mapping[str, Any]:
    """What a user's file says of probes' own numbers; resilient_agents/marks.py knows what there is."""
    return _table(_read(Path(file)), "probe", file) if file else {}


def _read(file: Path) -> Mapping[str, Any]:
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"policy file {file}: cannot be read ({error.strerror})") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"policy file {file}: TOML expected ({error})") from error


def lay(below: Rules, table: Mapping[str, Any], file: str) -> Rules:
    """`table` over `below`. Lists of names are added to, the rest is replaced key by key."""
    for key in table:
        _one_of(key, TOP, "unknown key", file)
    classes: dict[Any, Any] = dict(below.classes)
    for name, verdict in _table(table, "classes", file).items():
        _one_of(name, CLASSES, "unknown class", f"{file} [classes]")
        _one_of(verdict, VERDICTS, f"class {name!r}: unknown verdict", file)
        _harmless(name, verdict, f"class {name!r}", file)
        classes[name] = verdict
    limits = _table(table, "limits", file)
    for name in limits:
        _one_of(name, [f.name for f in msgspec.structs.fields(Limits)], "unknown limit", f"{file} [limits]")
    names = {key: _names(table, key, file) for key in ("kinds", "proof", "hearsay")}
    kinds = tuple(dict.fromkeys((*below.kinds, *names["kinds"])))
    rules = {rule.name: rule for rule in below.rules}
    for name, given in _table(table, "rule", file).items():
        rules[name] = _rule(rules.get(name), name, given, (*kinds, *OPEN), file)
    return Rules(
        classes=classes,
        limits=_convert({**msgspec.to_builtins(below.limits), **limits}, Limits, f"{file} [limits]"),
        rules=tuple(rules.values()),
        kinds=kinds,
        proof=tuple(n for n in dict.fromkeys((*below.proof, *names["proof"])) if n not in names["hearsay"]),
        hearsay=tuple(n for n in dict.fromkeys((*below.hearsay, *names["hearsay"])) if n not in names["proof"]),
    )


def _rule(before: Rule | None, name: str, given: Any, kinds: Iterable[str], file: str) -> Rule:
    where = f"{file} [rule.{name}]"
    if not isinstance(given, dict):
        raise ConfigError(f"{where}: a table expected, found {given!r}")
    for key in given:
        _one_of(key, KEYS, "unknown key", where)
    kinds = tuple(kinds)
    if kind := given.get("kind"):
        _one_of(kind, kinds, "unknown kind", f"{where} (kinds of your own probes go into `kinds`)")
    for key in ("class", "given", "repeated"):
        if given.get(key):
            _one_of(given[key], CLASSES, f"{key}: unknown class", where)
    if given.get("verdict") is not None:
        _one_of(given["verdict"], VERDICTS, "unknown verdict", where)
    fields = {**(msgspec.to_builtins(before) if before is not None else {}), **given, "name": name}
    rule: Rule = _convert(fields, Rule, where)
    if not any(fields.get(key) for key in FIT):
        raise ConfigError(f"{where}: it fits every finding; one of {', '.join(FIT)} expected")
    if rule.threshold < 1 or min(rule.window_s, rule.hold_s, rule.repeats, rule.repeats_s, rule.jobs, rule.jobs_s) < 0:
        raise ConfigError(f"{where}: threshold has to be 1 or more, and no number may be negative")
    _harmless(rule.class_ or rule.given, rule.verdict or "watch", f"rule {name!r}", file)
    if rule.kind in OPEN and rule.verdict not in (None, *HARMLESS):
        raise ConfigError(f"{where}: verdict {rule.verdict!r} for {rule.kind!r}; one of {', '.join(HARMLESS)} expected")
    return rule


def _harmless(class_: str, verdict: str, subject: str, file: str) -> None:
    if class_ in ("user", "ignore") and verdict not in HARMLESS:
        raise ConfigError(
            f"{file}: {subject}: verdict {verdict!r} for class {class_!r}: no node is touched for it; one of {', '.join(HARMLESS)} expected"
        )


def _one_of(word: Any, known: Iterable[str], subject: str, where: str) -> None:
    known = tuple(known)
    if word not in known:
        raise ConfigError(f"{where}: {subject} {word!r}; the nearest valid one is {nearest(str(word), known)!r}")


def _table(table: Mapping[str, Any], key: str, file: str) -> Mapping[str, Any]:
    found = table.get(key, {})
    if not isinstance(found, dict):
        raise ConfigError(f"{file}: {key}: a table expected, found {found!r}")
    return found


def _names(table: Mapping[str, Any], key: str, file: str) -> tuple[str, ...]:
    return tuple(_convert(table.get(key, []), list[str], f"{file}: {key}"))


def _convert(value: Any, kind: Any, where: str) -> Any:
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{where}: {error}") from None
