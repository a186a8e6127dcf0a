"""Prints the fault matrix (tally.py) when the tests are over, whether they passed or not, and what files without a tally had to show."""

from __future__ import annotations

from collections import Counter
from typing import Any

import tally


def pytest_terminal_summary(terminalreporter: Any) -> None:
    lines = tally.table()
    if not lines:
        return
    terminalreporter.section("fault matrix")
    for line in lines:
        terminalreporter.write_line(line)
    others: Counter[tuple[str, str]] = Counter()
    for outcome in ("passed", "failed", "skipped"):
        for report in terminalreporter.stats.get(outcome, ()):
            file = report.nodeid.partition("::")[0]
            if not file.startswith("tests/chaos/"):
                others[file, outcome] += 1
    for (file, outcome), count in sorted(others.items()):
        terminalreporter.write_line(f"{file}: {count} cases {outcome}")
