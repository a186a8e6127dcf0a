"""Page: the catalogue as a page for people: `python -m resilient_agents.diagnosis.page > docs/catalogue.md`.

Think of the printed timetable: the trains run by the data, the page is only printed from it, and a test sees to it that the two agree.

Contract: the text depends on the data files alone.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Final

from resilient_agents.diagnosis import catalogue

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

TABLES: Final = (
    ("xid", "Xid: errors of NVIDIA's driver", ("number", "name", "meaning", "class", "class_alt", "nvidia_immediate")),
    ("nvlink5", "Xid 144 to 150: NVLink 5", ("xid", "unit", "intrinfo_bits_v2", "error_status", "nvidia_resolution", "severity")),
    ("sxid", "SXid: errors of NVSwitch", ("number", "name", "fatal", "class")),
    ("cuda", "CUDA errors", ("code", "name", "text", "origin", "class")),
    ("wc", "InfiniBand work completions", ("status", "name", "reading", "role", "class")),
    ("exits", "How processes end", ("python_returncode", "shell_code", "name", "usual_cause", "class")),
    ("ascend", "Ascend codes", ("code", "meaning", "mindcluster_level", "class")),
)
HEAD: Final = """# Catalogue

What is known of lines and numbers. Printed from the data files in `agents/resilient_agents/diagnosis/facts`
(`python -m resilient_agents.diagnosis.page > docs/catalogue.md`); change those, not this page.

Classes: `ignore` nothing, `user` the program is at fault, `app-restart` restart the process on the same device, `gpu-reset` reset the
GPU or reboot the node, `replace` take a standby node now, `cordon` no new work until somebody has looked. "by ..." means that a table
below, or a word of the line, decides.
Whose lines count: `kernel` the kernel's alone, `daemon` those of programs in syslog, `system` either, `user` everybody's but the
kernel's, `any`.
"""


def page() -> str:
    """The whole page."""
    parts = [HEAD]
    files: dict[str, list[catalogue.Entry]] = {}
    for entry in catalogue.lines():
        files.setdefault(entry.number.partition(":")[0], []).append(entry)
    for name, entries in files.items():
        parts.append(f"\n## Lines: {name.partition('-')[2]}\n\n")
        rows = [
            (it.kind, it.layer, f"by {it.by}" if it.by else it.class_, it.role, it.where, _code(it.example), it.source) for it in entries
        ]
        parts.append(_table(("kind", "layer", "class", "role", "whose", "for example", "source"), rows))
    for name, title, columns in TABLES:
        parts.append(f"\n## {title}\n\n")
        parts.append(_table(columns, ([row[column] or "" for column in columns] for row in catalogue.rows(name))))
        sources = sorted({row["source"] for row in catalogue.rows(name)})
        parts.append(f"\nSource: {'; '.join(sources)}.\n")
    return "".join(parts)


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join("| " + " | ".join(_cell(cell) for cell in line) + " |\n" for line in lines)


def _cell(text: str) -> str:
    return text.replace("\n", " ⏎ ").replace("|", "\\|")


def _code(text: str) -> str:
    short = text.replace("\n", " ⏎ ")
    short = short if len(short) <= 160 else short[:157] + "..."
    return f"`{short.replace('`', chr(39))}`"


if __name__ == "__main__":
    sys.stdout.write(page())
