"""Prints the fault matrix (tally.py) when the tests are over, whether they passed or not."""

from __future__ import annotations

from typing import Any

import tally


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if lines := tally.table():
        terminalreporter.section("fault matrix")
        for line in lines:
            terminalreporter.write_line(line)
