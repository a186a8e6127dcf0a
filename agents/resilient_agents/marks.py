"""Marks: what a policy file changes of the numbers by which the built-in probes judge.

Think of the marks on a pressure gauge: they come printed on the glass, each with whose they are, and a works may paint its own beside them.

Contract: the table [probe] of a policy file. A value is a limit of probes/limits.py by its name (`flaps = 5`). A table changes one mark on
a device's gauge, or one counter of a port, by its name "probe/kind/code" ([probe."nvml-ecc/ecc/correctable"]): its `limit`, `window_s`,
`hold_s`, `times` or `class`. A name that nobody has is a ConfigError with the nearest one. `lay` is for the whole process and
comes before its probes are made: a prober, a daemon and a doctor are told once, and are asked by nobody else.
Rejected: a parameter through every probe to every pure function (thirty of them, for what is one constant per process).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from importlib import resources
from typing import Any, Final, get_args

import msgspec

from resilient import rulebook
from resilient.config import nearest
from resilient.core.messages import Class
from resilient.errors import ConfigError
from resilient_agents.probes import limits, rules
from resilient_agents.probes.rules import Mark
from resilient_agents.sightings import Marks

KEYS: Final = tuple(field.encode_name for field in msgspec.structs.fields(Mark))
COUNTER_KEYS: Final = ("limit", "window_s", "class")


def read(file: str) -> Marks:
    """Of a policy file ("" = none). Raises ConfigError."""
    table = rulebook.probe_table(file)
    known = {name.lower(): name for name, value in vars(limits).items() if isinstance(value, limits.Limit)}
    gauges = names()
    numbers: dict[str, float] = {}
    marks: dict[str, Mark] = {}
    for name, value in table.items():
        if isinstance(value, Mapping):
            _one_of(name, gauges, "unknown mark", f"{file} [probe]")
            marks[name] = _mark(value, COUNTER_KEYS if name in counters() else KEYS, f'{file} [probe."{name}"]')
        else:
            _one_of(name, known, "unknown limit", f"{file} [probe]")
            numbers[known[name]] = _number(name, value, f"{file} [probe]")
    return Marks(numbers=numbers, marks=marks)


def lay(marks: Marks) -> None:
    """Judge by these from now on."""
    of_ports = counters()
    vars(limits).update({name: limits.Limit(value, "policy file") for name, value in marks.numbers.items()})
    vars(limits).update(COUNTERS=tuple(_counted(row, marks.marks.get(name)) for name, row in of_ports.items()))
    rules.MARKS.update({name: mark for name, mark in marks.marks.items() if name not in of_ports})


def lookback_s() -> float:
    """How far who looks once looks back."""
    return limits.LOOKBACK_S.value


def names() -> set[str]:
    """Of all marks that there are."""
    files = [file.name for file in resources.files("resilient_agents.probes").iterdir() if file.name.endswith(".toml")]
    return {rule.name for file in files for rule in rules.load(file)} | set(counters())


def counters() -> dict[str, limits.Counter]:
    """Of InfiniBand and RoCE ports, by the names of their marks."""
    return {f"infiniband/ib-errors/{row.name.rpartition('/')[2]}": row for row in limits.COUNTERS}


def _counted(row: limits.Counter, mark: Mark | None) -> limits.Counter:
    if mark is None:
        return row
    above = row.above if mark.limit is None else int(mark.limit)
    window_s = row.window_s if mark.window_s is None else mark.window_s
    return row._replace(above=above, window_s=window_s, class_=mark.class_ or row.class_)


def _mark(table: Mapping[str, Any], keys: Iterable[str], where: str) -> Mark:
    changes: dict[str, Any] = {}
    for key, value in table.items():
        _one_of(key, keys, "unknown key", where)
        if key == "class":
            _one_of(value, [it for it in get_args(Class) if it], "unknown class", where)
            changes[key] = value
        else:
            changes[key] = _number(key, value, where)
    return msgspec.convert(changes, Mark)


def _number(name: str, value: Any, where: str) -> float:
    most = 1.0 if name.endswith("_share") else float("inf")
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= most:
        wanted = "a number from 0 to 1" if most == 1.0 else "a number of 0 or more"
        raise ConfigError(f"{where}: {name}: {wanted} expected, {value!r} found")
    return float(value)


def _one_of(word: Any, known: Iterable[str], subject: str, where: str) -> None:
    known = sorted(known)
    if word not in known:
        raise ConfigError(f"{where}: {subject} {word!r}; the nearest valid one is {nearest(str(word), known)!r}")
