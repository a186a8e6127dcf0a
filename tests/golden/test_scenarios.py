"""Every scenario comes out as it is written."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from play import play

FILES = sorted((Path(__file__).parent / "scenarios").glob("*.txt"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_scenario(path):
    head, expected, found = play(path)
    assert head.startswith("# "), "a scenario opens with its story"
    assert found == expected


def test_there_are_scenarios():
    assert len(FILES) >= 10
