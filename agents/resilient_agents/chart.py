"""Chart: what an examination of a node has found: the rows, as a table, as JSON, as findings, and beside those of a healthy node.

Think of the chart at the foot of the bed: whoever comes by reads the same.

Contract: pure. A chart is sound if no row failed; warnings do not count. Its JSON is read back by `read` (--compare), whoever wrote it.
What a probe found is a finding as the probe gave it; a failed or doubtful reading is one of kind "doctor" with the check's name as its
code, and of class "ignore" if it is only doubtful.
"""

from __future__ import annotations

import re
from collections import Counter
from typing import TYPE_CHECKING, Final, Literal

import msgspec

from resilient.core.messages import Finding
from resilient.errors import ConfigError
from resilient_agents.check import Reading

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

KIND: Final = "doctor"
ENOUGH: Final = 0.8  # of what a healthy node reaches
_WORSE: Final = {"fail": 0, "warn": 1}  # what is to be read first
_COLOURS: Final = {"pass": "32", "warn": "33", "fail": "31", "absent": "2", "skipped": "2"}
_TEXT_MAX: Final = 300


class Row(Reading, frozen=True, kw_only=True):
    """A reading, and who gave it."""

    source: Literal["probe", "check"]
    name: str
    seconds: float = 0.0
    finding: Finding | None = None  # source="probe": as it gave it

    @property
    def shown(self) -> str:
        """Its value, for people."""
        return self.value or ("" if self.number is None else f"{self.number:.4g} {self.unit}".strip())

    @property
    def key(self) -> tuple[str, str, str]:
        """What the same row of another node has too. A device counts by its number: its address may be another there."""
        number = re.search(r"\b(gpu|cpu|npu):\d+", self.device)
        return self.name, self.what, number[0] if number else self.device


class Chart(msgspec.Struct, frozen=True, kw_only=True):
    """One examination of one node."""

    node: str
    at: float  # seconds since 1970
    quick: bool
    seconds: float
    rows: tuple[Row, ...]
    sound: bool = True
    findings: tuple[Finding, ...] = ()


def chart(node: str, at: float, seconds: float, rows: Iterable[Row], *, quick: bool) -> Chart:
    """Close an examination."""
    rows = tuple(rows)
    findings = tuple(finding for row in rows if (finding := finding_of(row)) is not None)
    sound = all(row.state != "fail" for row in rows)
    return Chart(node=node, at=at, quick=quick, seconds=round(seconds, 3), rows=rows, sound=sound, findings=findings)


def finding_of(row: Row) -> Finding | None:
    """None where there is nothing to tell."""
    if row.finding is not None:
        return row.finding
    if row.state not in {"warn", "fail"}:
        return None
    return Finding(
        seq=0,
        kind=KIND,
        probe=KIND,
        layer=row.layer,
        code=row.name,
        device=row.device,
        class_=row.class_ if row.state == "fail" else "ignore",
        text=summary(row),
    )


def summary(row: Row) -> str:
    """The row in one line."""
    about = " ".join(filter(None, [row.name, row.what, row.device]))
    found = f"{row.expected} expected, {row.shown or 'nothing'} found" if row.expected else row.shown
    return f"{about}: {'; '.join(filter(None, [found, row.text]))}"[:_TEXT_MAX]


# --------------------------------------------------------------------------- beside a healthy node


def compared(rows: Sequence[Row], healthy: Chart) -> list[Row]:
    """What is worse than there becomes a warning, and so does what is not here at all."""
    there = {row.key: row for row in healthy.rows if row.state == "pass"}
    found = [_beside(row, there.pop(row.key, None)) for row in rows]
    looked = {row.name for row in rows if row.state not in {"skipped", "absent"}}
    missing = [
        msgspec.structs.replace(
            row, state="warn", value="not here", number=None, expected=f"as on {healthy.node}: {row.shown}", seconds=0.0
        )
        for row in there.values()
        if row.source == "check" and row.device and row.name in looked
    ]
    return [*found, *missing]


def _beside(row: Row, there: Row | None) -> Row:
    if there is None or row.state != "pass" or None in (row.number, there.number) or not row.better or row.unit != there.unit:
        return row
    assert row.number is not None
    assert there.number is not None
    bound = there.number * ENOUGH if row.better == "more" else there.number / ENOUGH
    if (row.number >= bound) if row.better == "more" else (row.number <= bound):
        return row
    sign = ">=" if row.better == "more" else "<="
    return msgspec.structs.replace(row, state="warn", expected=f"{sign} {bound:.4g} {row.unit}", text="a healthy node does better")


def read(path: str) -> Chart:
    """The JSON of `resilient doctor`. Raises ConfigError."""
    try:
        with open(path, "rb") as file:
            return msgspec.json.decode(file.read(), type=Chart)
    except OSError as error:
        raise ConfigError(f"--compare {path}: cannot be read ({error.strerror})") from error
    except msgspec.MsgspecError as error:
        raise ConfigError(f"--compare {path}: the output of `resilient doctor --json` expected ({error})") from error


# --------------------------------------------------------------------------- for people


def table(chart: Chart, *, colours: bool = False) -> str:
    """The rows below each other, the worst ones first, and a last line that sums up."""
    head = ("", "check", "device", "value", "expected", "s")
    rows = sorted(chart.rows, key=lambda row: _WORSE.get(row.state, 2))
    cells = [(r.state, " ".join(filter(None, [r.name, r.what])), r.device, r.shown, r.expected, f"{r.seconds:.1f}") for r in rows]
    widths = [max(len(row[at]) for row in [head, *cells]) for at in range(len(head))]
    lines = [_line(head, widths)]
    for row, cell in zip(rows, cells, strict=True):
        line = _line(cell, widths)
        lines.append(f"\x1b[{_COLOURS[row.state]}m{line}\x1b[0m" if colours else line)
        if row.text:
            lines.append(f"{'':<{widths[0]}}    {row.text}")
    return "\n".join([*lines, "", verdict(chart), ""])


def verdict(chart: Chart) -> str:
    """One line."""
    counts: Counter[str] = Counter(row.state for row in chart.rows)
    told = ", ".join(f"{counts[state]} {state}" for state in _COLOURS if counts[state])
    return f"node {chart.node} is {'fit' if chart.sound else 'NOT fit'} for work: {told}; {chart.seconds:.1f} s"


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    *words, last = (f"{cell:<{width}}" for cell, width in zip(cells, widths, strict=True))
    return "  ".join([*words, f"{last.strip():>{widths[-1]}}"]).rstrip()
