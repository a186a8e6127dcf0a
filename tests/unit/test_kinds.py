"""What a rule may name is what there is: the policy's kinds are those that the catalogue, the marks on the gauges, the probes and the core tell.

They are read from the data files, and from the code as it is written: what `Finding(kind=...)` is given, through local names, helpers'
parameters and tables. A value that cannot be followed to words fails here, so that no kind slips in unseen.
"""

from __future__ import annotations

import ast
import tomllib
from pathlib import Path

from resilient.core.policy import OPEN, TABLE
from resilient.rulebook import shipped

ROOT = Path(__file__).parents[2]
CORE, AGENTS = ROOT / "resilient" / "core", ROOT / "agents" / "resilient_agents"
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
PASSED_ON = {"kind", "text"}  # of a fact, a rule, another finding: told by whoever made that
UNASKED = {"shared", "collective-order"}  # by the policy and the court, of what they have judged: no rule is asked


class Module:
    """One file, and what its findings' kinds can be."""

    def __init__(self, path: Path) -> None:
        self.path, self.tree = path, ast.parse(path.read_text())
        self.inside: dict[ast.AST, ast.AST] = {}  # node -> the function around it
        for function in ast.walk(self.tree):
            if isinstance(function, FUNCTIONS):
                self.inside |= dict.fromkeys(ast.walk(function), function)  # an inner one comes later
        self.classes = {it: owner for owner in ast.walk(self.tree) if isinstance(owner, ast.ClassDef) for it in ast.walk(owner)}

    def calls(self, *names: str) -> list[ast.Call]:
        return [node for node in ast.walk(self.tree) if isinstance(node, ast.Call) and self.name(node.func) in names]

    @staticmethod
    def name(expr: ast.expr) -> str:
        return expr.attr if isinstance(expr, ast.Attribute) else expr.id if isinstance(expr, ast.Name) else ""

    def kinds(self) -> set[str]:
        found: set[str] = set()
        for call in self.calls("Finding", "replace"):
            for given in call.keywords:
                if given.arg == "kind":
                    found |= self.words(given.value, call)
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Dict):
                pairs = zip(node.keys, node.values, strict=True)
                found |= {v.value for k, v in pairs if isinstance(k, ast.Constant) and k.value == "kind" and isinstance(v, ast.Constant)}
        return found

    def words(self, expr: ast.expr, at: ast.AST) -> set[str]:
        """All that this can be."""
        match expr:
            case ast.Constant(value=str(word)):
                return {word} - {""}
            case ast.IfExp(body=one, orelse=other):
                return self.words(one, at) | self.words(other, at)
            case ast.Attribute(attr=attr) if attr in PASSED_ON:
                return set()
            case ast.Subscript(slice=ast.Constant(value=0)):  # of what a function here has answered
                answers = [node.value for node in ast.walk(self.tree) if isinstance(node, ast.Return) and node.value is not None]
                return {word for answer in answers for word in self.first(answer, at, strict=False)}
            case ast.Name(id=name):
                return self.named(name, at)
        raise AssertionError(f"{self.path}:{expr.lineno}: which kinds can {ast.unparse(expr)!r} be?")

    def first(self, expr: ast.expr, at: ast.AST, *, strict: bool = True) -> set[str]:
        """The same, of the first of several."""
        match expr:
            case ast.Tuple(elts=[one, *_]) if strict or isinstance(one, ast.Constant):
                return self.words(one, at)
            case ast.IfExp(body=one, orelse=other):
                return self.first(one, at, strict=strict) | self.first(other, at, strict=strict)
            case ast.Call(func=ast.Attribute(value=ast.Name(id=table), attr="get"), args=[_, *rest]) if strict:
                found = {word for default in rest for word in self.first(default, at)}
                for given in [self.table(table)] if self.table(table) else [self.given(call, table, at) for call in self.callers(at)]:
                    for value in self.values(given):
                        found |= self.first(value, at)
                return found
        assert not strict, f"{self.path}:{expr.lineno}: which kinds can {ast.unparse(expr)!r} begin with?"
        return set()

    def values(self, table: ast.expr | None) -> list[ast.expr]:
        if isinstance(table, ast.Name):
            table = self.table(table.id)
        return table.values if isinstance(table, ast.Dict) else []

    def table(self, name: str) -> ast.expr | None:
        """What a constant of the module is."""
        for node in self.tree.body:
            targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
            if any(isinstance(target, ast.Name) and target.id == name for target in targets):
                return node.value
        return None

    def named(self, name: str, at: ast.AST) -> set[str]:
        function = self.inside.get(at)
        if function is None or not isinstance(function, FUNCTIONS):
            value = self.table(name)
            assert value is not None, f"{self.path}: {name} is not known"
            return self.words(value, at)
        if name in [argument.arg for argument in function.args.args + function.args.kwonlyargs]:
            return {
                word for call in self.callers(at) if (given := self.given(call, name, at)) is not None for word in self.words(given, call)
            }
        found: set[str] = set()
        for node in ast.walk(function):
            if isinstance(node, ast.Assign):
                match node.targets:
                    case [ast.Name(id=it)] if it == name:
                        found |= self.words(node.value, node)
                    case [ast.Tuple(elts=[ast.Name(id=it), *_])] if it == name:
                        found |= self.first(node.value, node)
        if not found and (value := self.table(name)) is not None:
            return self.words(value, at)
        assert found, f"{self.path}: which kinds can {name} be?"
        return found

    def callers(self, at: ast.AST) -> list[ast.Call]:
        function = self.inside.get(at)
        calls = self.calls(getattr(function, "name", ""))
        return [call for call in calls if function not in self.classes or self.classes.get(call) is self.classes[function]]

    def given(self, call: ast.Call, name: str, at: ast.AST) -> ast.expr | None:
        arguments = self.inside[at].args  # type: ignore[attr-defined]
        names = [it.arg for it in arguments.args if it.arg not in ("self", "cls")]
        by_name = {it.arg: it.value for it in call.keywords}
        return by_name.get(name) or dict(zip(names, call.args, strict=False)).get(name)


def of_code(where: Path) -> set[str]:
    found: set[str] = set()
    for path in where.rglob("*.py"):
        found |= Module(path).kinds()
    return found


def of_data(pattern: str, key: str) -> list[dict]:
    return [row for path in sorted(AGENTS.glob(pattern)) for row in tomllib.loads(path.read_text()).get(key, [])]


MARKS = of_data("probes/*.toml", "rule")
LINES = of_data("diagnosis/facts/*.toml", "line")


def test_the_policys_kinds_are_those_that_are_told():
    assert len(MARKS) > 60 and len(LINES) > 150
    told = {row["kind"] for row in MARKS + LINES} | of_code(AGENTS)
    runtimes = of_code(CORE) - UNASKED - set(TABLE) - set(OPEN)
    assert {"nan-loss", "data-stall"} <= runtimes and {"nvml-error", "disk-full", "ib-flap"} <= told
    kinds = shipped().kinds
    assert sorted(kinds) == sorted((told | runtimes) - set(OPEN)), "what nobody tells is not listed, what is told is"


def test_rules_name_codes_that_there_are():
    """Of kinds whose codes are all in the marks on the gauges."""
    probes = {row["probe"] for row in MARKS}
    codes: dict[str, set[str]] = {}
    for row in MARKS:
        codes.setdefault(row["kind"], set()).add(row["code"])
    for rule in shipped().rules:
        if rule.kind in ("ecc", "nvlink", "throttle"):
            assert set(rule.codes) <= codes[rule.kind], rule.name
        if rule.probe in probes:
            assert rule.kind in codes, rule.name


def test_no_rule_counts_what_its_probe_has_counted():
    """A mark with a window, a limit of a probe: each of their findings is a whole judgement."""
    counted = {row["kind"] for row in MARKS} | {"edac", "aer-corrected", "ib-flap", "link-flap", "ib-errors"}
    assert [rule.name for rule in shipped().rules if rule.kind in counted and rule.threshold > 1] == []
