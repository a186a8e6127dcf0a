"""The machines and the simulator, besides what test_house.py says: what they load, and where chance may come from."""

from __future__ import annotations

import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
SIM = sorted((ROOT / "resilient" / "sim").glob("*.py"))
SOURCES = sorted([*(ROOT / "resilient").rglob("*.py"), *(ROOT / "agents").rglob("*.py")])


def modules(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield f"{node.module}.{node.names[0].name}", node.lineno


def test_a_machine_loads_neither_torch_nor_a_network():
    code = "import sys, resilient.core.agent, resilient.core.coordinator; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    assert not {"torch", "numpy", "asyncio", "socket", "subprocess"} & set(loaded)


@pytest.mark.parametrize("path", SIM, ids=lambda p: p.name)
def test_the_simulator_has_one_seed_and_no_clock(path):
    allowed = {"__future__", "collections", "dataclasses", "functools", "heapq", "random", "typing", "msgspec", "resilient"}
    for module, line in modules(path):
        assert module.split(".")[0] in allowed, f"{path.name}:{line}: {module}"
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "random":
            assert node.attr == "Random", f"{path.name}:{node.lineno}: random.{node.attr}"


def test_no_pickle_anywhere():
    found = [
        f"{p}:{line}: {m}"
        for p in SOURCES
        for m, line in modules(p)
        if m.split(".")[0] in {"pickle", "dill", "cloudpickle", "shelve", "marshal"}
        and p.name != "recorder.py"  # torch's flight-recorder dumps are pickles: read there, plain values only
    ]
    assert not found
