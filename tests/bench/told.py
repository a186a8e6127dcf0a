"""What a benchmark found: a table for people, JSON for tools (`bench/<name>.json`, beside the sources)."""

from __future__ import annotations

import json
import os
import platform
import statistics
from pathlib import Path
from typing import Any

import torch

WHERE = Path(os.environ.get("BENCH_DIR", Path(__file__).parents[2] / "bench"))


def summary(seconds: list[float]) -> dict[str, float | int]:
    """Median, largest and count of what was measured."""
    return {"count": len(seconds), "median_s": round(statistics.median(seconds), 4), "max_s": round(max(seconds), 4)}


def told(name: str, rows: list[dict[str, Any]], **facts: Any) -> None:
    """Print rows as a table, and write them with the facts they depend on."""
    WHERE.mkdir(parents=True, exist_ok=True)
    machine = {"cpus": os.cpu_count(), "python": platform.python_version(), "torch": torch.__version__}
    (WHERE / f"{name}.json").write_text(json.dumps({"name": name, "machine": machine, **facts, "rows": rows}, indent=1) + "\n")
    if plain := [f"{key} {value}" for key, value in facts.items() if not isinstance(value, list)]:
        print("\n" + "   ".join(plain))
    table(rows)
    for value in facts.values():
        if isinstance(value, list):
            table(value)


def bound(what: str, found: float, *, at_most: float | None = None, at_least: float | None = None) -> dict[str, Any]:
    """A line of the table of bounds: told, never asserted, for a machine has its moods."""
    limit = at_most if at_most is not None else at_least
    assert limit is not None
    met = found <= limit if at_most is not None else found >= limit
    return {
        "bound": what,
        "found": round(found, 2),
        "wanted": f"{'<=' if at_most is not None else '>='} {limit}",
        "met": "yes" if met else "NO",
    }


def table(rows: list[dict[str, Any]]) -> None:
    """For people."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    cells = [keys, *([str(row.get(key, "")) for key in keys] for row in rows)]
    print()
    widths = [max(len(line[i]) for line in cells) for i in range(len(keys))]
    for line in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip(), flush=True)
