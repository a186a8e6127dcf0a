"""Fixtures of the tests that start real processes. Whatever a test does, its processes are ended, each by its own pid."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # what the tests here share lies beside them

from disks import small_disk
from outside import Run, environment

Start = Callable[..., Run]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start `resilient-run` with these arguments; `module` for another launcher."""
    runs: list[Run] = []

    def starter(*arguments: str | Path, module: str = "resilient.run", run_dir: Path | None = None, **env: str) -> Run:
        directory = run_dir or tmp_path / f"run{len(runs)}"
        ours = ["--run-dir", str(directory)] if module == "resilient.run" else []
        command = [sys.executable, "-m", module, *ours, *map(str, arguments)]
        run = Run(command, directory, tmp_path, environment(**env))
        runs.append(run)
        return run

    yield starter
    for run in runs:
        run.end()


@pytest.fixture
def script(tmp_path: Path) -> Callable[..., Path]:
    """Write a script and give its path."""

    def writer(text: str, name: str = "script.py") -> Path:
        path = tmp_path / name
        path.write_text(text)
        return path

    return writer


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MiB in memory."""
    with small_disk(tmp_path / "small") as directory:
        yield directory
