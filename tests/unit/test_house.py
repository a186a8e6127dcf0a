"""The architecture is a test: who may import whom, what the deterministic core may not touch, where torch may be, how long a file may grow."""

from __future__ import annotations

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[2]
FILES = sorted([*(ROOT / "resilient").rglob("*.py"), *(ROOT / "agents").rglob("*.py")])

# Arrows point down only: each layer may import those after it (and itself).
LAYERS = {
    "resilient.run": {"resilient_agents"},
    "resilient.ckpt": {"resilient.progress", "resilient.checkpoint", "resilient.core"},
    "resilient.progress": {"resilient.checkpoint"},
    "resilient.cli": {"resilient_agents", "resilient.ckpt", "resilient.config", "resilient.host", "resilient.checkpoint", "resilient.core"},
    "resilient_agents": {
        "resilient.host",
        "resilient.train",
        "resilient.checkpoint",
        "resilient.wire",
        "resilient.core",
        "resilient.config",
        "resilient.rulebook",
    },
    "resilient.host": {"resilient.checkpoint", "resilient.wire", "resilient.core"},
    "resilient.train": {"resilient.checkpoint", "resilient.wire", "resilient.core"},
    "resilient.checkpoint": {"resilient.wire", "resilient.core"},
    "resilient.wire": {"resilient.core"},
    "resilient.core": set(),
    "resilient.sim": {"resilient.core"},
    "resilient.config": set(),
    "resilient.rulebook": {"resilient.config", "resilient.core"},
    "resilient.errors": set(),
    "resilient": {"resilient.train"},  # the package's own doors; lazily
}
TORCH_MAY_BE = (
    "resilient.train.",
    "resilient.checkpoint.capture",
    "resilient_agents.zygote",
    "resilient_agents.store",
    "resilient_agents.arguments",
    "resilient_agents.script",
    "resilient_agents.exercises.",
)
CORE_MAY_IMPORT = {
    "__future__",
    "collections",
    "dataclasses",
    "enum",
    "functools",
    "itertools",
    "math",
    "typing",
    "heapq",
    "re",
    "random",
    "msgspec",
    "resilient",
}
CORE_MAY_NOT_NAME = {"time", "asyncio", "socket", "threading", "os", "sys", "subprocess", "open", "print", "input"}
LONGER_THAN_400 = {
    "resilient/core/agent.py": "one machine, one file: what is pure is in crew, sheets, minutes and hang",
    "resilient/core/coordinator.py": "one machine, one file: what is pure is in round, seating, moves, ledger, culprit, triage, commits and fleet",
    "resilient/core/messages.py": "every message, to be read as one list",
    "resilient/core/machine.py": "every event and action of both machines, to be read as one list",
    "resilient/sim/world.py": "the whole fleet on one clock",
    "agents/resilient_agents/main.py": "one case for every action of the agent's machine",
    "resilient/train/loop.py": "one step from its beginning to its commit or undo, as it is read",
    "resilient/train/group.py": "one method for every collective of c10d, in both spellings",
}
BROAD = {
    "agents/resilient_agents/engine.py",  # around one probe: whatever it raises is a finding
    "agents/resilient_agents/lane.py",  # hands the exception to whoever waits for the errand
    "agents/resilient_agents/main.py",
    "resilient/checkpoint/peer.py",
    "resilient/wire/link.py",
}


def module_of(path: pathlib.Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts[1:] if parts[0] == "agents" else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def layer_of(module: str) -> str | None:
    return max((layer for layer in LAYERS if module == layer or module.startswith(layer + ".")), key=len, default=None)


def imports(tree: ast.AST) -> list[tuple[str, int]]:
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, node.lineno) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            found += [(f"{node.module}.{alias.name}", node.lineno) for alias in node.names]
    return found


def test_there_are_files_to_look_at() -> None:
    assert len(FILES) > 60


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_arrows_point_down(path: pathlib.Path) -> None:
    module = module_of(path)
    layer = layer_of(module)
    assert layer is not None, f"{module} belongs to no layer"
    wrong = []
    for name, line in imports(ast.parse(path.read_text())):
        target = layer_of(name)
        if target in (None, layer, "resilient", "resilient.errors"):
            continue
        if target not in LAYERS[layer]:
            wrong.append(f"{path}:{line}: {layer} imports {name}")
    assert not wrong


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_torch_is_only_where_training_is(path: pathlib.Path) -> None:
    module = module_of(path)
    if module.startswith(TORCH_MAY_BE) or module + "." in TORCH_MAY_BE:
        return
    wrong = [f"{path}:{line}" for name, line in imports(ast.parse(path.read_text())) if name.split(".")[0] == "torch"]
    assert not wrong


@pytest.mark.parametrize("path", sorted((ROOT / "resilient" / "core").glob("*.py")), ids=lambda p: p.name)
def test_the_core_has_no_hands(path: pathlib.Path) -> None:
    tree = ast.parse(path.read_text())
    wrong = [f"{path}:{line}: {name}" for name, line in imports(tree) if name.split(".")[0] not in CORE_MAY_IMPORT]
    wrong += [f"{path}:{n.lineno}: {n.id}" for n in ast.walk(tree) if isinstance(n, ast.Name) and n.id in CORE_MAY_NOT_NAME]
    wrong += [
        f"{path}:{n.lineno}: random.{n.attr}"
        for n in ast.walk(tree)
        if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name) and n.value.id == "random" and n.attr != "Random"
    ]
    assert not wrong


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_nothing_is_swallowed(path: pathlib.Path) -> None:
    if str(path.relative_to(ROOT)) in BROAD:
        return
    wrong = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ExceptHandler):
            names = [n.id for n in ast.walk(node.type) if isinstance(n, ast.Name)] if node.type is not None else ["bare"]
            goes_on = any(isinstance(n, ast.Raise) for n in ast.walk(node))
            if {"bare", "Exception", "BaseException"} & set(names) and not goes_on:
                wrong.append(f"{path}:{node.lineno}")
    assert not wrong


def test_files_stay_short() -> None:
    long = {str(p.relative_to(ROOT)): n for p in FILES if (n := len(p.read_text().splitlines())) > 400}
    assert long.keys() <= LONGER_THAN_400.keys(), long
    assert all(LONGER_THAN_400.values())


def test_agents_is_a_source_root_and_no_package() -> None:
    assert not (ROOT / "agents" / "__init__.py").exists()
