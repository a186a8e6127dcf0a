"""docs/probes/rules.md is what the data says; after a change of a rule run this file: it writes the tables anew."""

from __future__ import annotations

import sys
from pathlib import Path

from resilient_agents.probes.rules import Rule, load

TOLD = Path(__file__).parents[2] / "docs" / "probes" / "rules.md"
HEAD = """# Rules of the device probes

Written by `tests/golden/test_rule_tables.py` from the data beside the probes (`agents/resilient_agents/probes/*.toml`); tests and
their fields are told in `rules.py` there. Class "ignore" is counted, and asks for nothing.
"""


def condition(rule: Rule) -> str:
    match rule.test:
        case "is":
            return f"= {rule.limit:g}"
        case "above":
            return f"> {rule.limit:g}" + (f" for {rule.hold_s:g} s" if rule.hold_s else "")
        case "grows":
            return f"grows by > {rule.limit:g} in {rule.window_s:g} s"
        case "fewer":
            return f"less than all others, which agree and are >= {rule.limit:g}"
        case "odd":
            return f"grows by > {rule.limit:g} in {rule.window_s:g} s, {rule.times:g} times its peers"
        case "often":
            what = "grown" if rule.of == "growth" else "seen"
            return f"{what} in > {rule.limit:g} of {rule.window_s / rule.part_s:g} parts of {rule.part_s:g} s"


def table(columns: list[str], rows: list[list[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)


def written() -> str:
    parts = [HEAD]
    for name in ("nvml.toml", "ascend.toml", "amd.toml"):
        rows = [[r.probe, r.read, condition(r), r.class_, f"{r.layer} / {r.kind} / {r.code}", r.source] for r in load(name)]
        parts.append(f"## {name}\n\n" + table(["probe", "reading", "when", "class", "layer / kind / code", "source"], rows))
    return "\n".join(parts)


def test_the_tables_are_those_of_the_data():
    assert TOLD.read_text() == written(), f"run {Path(__file__).name} to write the tables anew"


if __name__ == "__main__":
    TOLD.write_text(written())
    sys.stdout.write(f"{TOLD}\n")
