"""Packages that are installed for one test: their metadata in a directory that is on sys.path, as pip would write it.

Ours is among them, with what pyproject.toml says now: the entry points of an editable install are those of the day when it was installed.
"""

from __future__ import annotations

import os
import pathlib
import tomllib

ROOT = pathlib.Path(__file__).parents[2]
GROUP = "resilient.probes"


def ours() -> dict[str, str]:
    """The entry points of this checkout."""
    probes: dict[str, str] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"][GROUP]
    return probes


def install(where: pathlib.Path, name: str, probes: dict[str, str], sources: dict[str, str] | None = None) -> pathlib.Path:
    """Write one package: its metadata, and its modules (name -> text)."""
    info = where / f"{name.replace('-', '_')}-0.1.0.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.1.0\n")
    (info / "entry_points.txt").write_text(f"[{GROUP}]\n" + "".join(f"{key} = {value}\n" for key, value in probes.items()))
    for module, text in (sources or {}).items():
        (where / f"{module}.py").write_text(text)
    return where


def path_with(where: pathlib.Path, **others: tuple[dict[str, str], dict[str, str]]) -> str:
    """A PYTHONPATH on which this checkout and these packages (name -> entry points, modules) are installed."""
    install(where, "resilient-run", ours())
    for name, (probes, sources) in others.items():
        install(where, name, probes, sources)
    return os.pathsep.join([str(where), str(ROOT), str(ROOT / "agents"), os.environ.get("PYTHONPATH", "")])
