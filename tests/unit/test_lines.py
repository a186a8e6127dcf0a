"""The labelled lines of tests/data/lines, read by the classifier itself (the same figures with a process in between: tests/bench/score_lines.py)."""

from __future__ import annotations

import importlib.util
import json
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[2]
LINES = ROOT / "tests" / "data" / "lines"
FILES = sorted(LINES.glob("*.jsonl"))
CLASSES = {"ignore", "user", "app-restart", "gpu-reset", "replace", "cordon"}
KEYS = ["id", "text", "stream", "layer", "kind", "code", "device", "is_fault", "class", "class_ok", "role", "source", "origin", "note"]

_spec = importlib.util.spec_from_file_location("score_lines", ROOT / "tests" / "bench" / "score_lines.py")
assert _spec is not None and _spec.loader is not None
score_lines = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(score_lines)


def answers(lines):
    from resilient_agents.diagnosis.text import classify

    found = {line["id"]: classify(line["text"], line["stream"]) for line in lines}
    return {name: {"class": finding.class_, "is_fault": finding.class_ not in {"ignore", "user"}} for name, finding in found.items()}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_line_is_labelled_in_full(path):
    lines = [json.loads(row) for row in path.read_text(encoding="utf-8").splitlines()]
    assert len({line["id"] for line in lines}) == len(lines)
    for line in lines:
        assert list(line) == KEYS, line["id"]
        assert line["class"] in line["class_ok"] and set(line["class_ok"]) <= CLASSES, line["id"]
        assert line["stream"] in {"kmsg", "syslog", "stderr", "stdout"}, line["id"]
        assert line["origin"] in {"observed", "format", "own"} and line["source"], line["id"]
        assert line["role"] in {"cause", "symptom", "context", "cascade"}, line["id"]
        assert line["is_fault"] == (line["class"] not in {"ignore", "user"}), line["id"]


def test_no_line_stands_in_two_files():
    seen = [line["text"] for path in FILES for line in score_lines.load(path)]
    assert len(seen) == len(set(seen))


@pytest.mark.parametrize("path", [path for path in FILES if path.stem != "arguable"], ids=lambda path: path.name)
def test_faults_are_found_and_nobody_is_blamed_for_nothing(path):
    lines = score_lines.load(path)
    found = score_lines.score(lines, answers(lines))
    assert found.precision > score_lines.PRECISION, found.wrong
    assert found.recall > score_lines.RECALL, found.wrong
    assert not found.blamed


def test_what_can_be_argued_is_argued_within_bounds():
    lines = score_lines.load(LINES / "arguable.jsonl")
    found = score_lines.score(lines, answers(lines))
    assert found.class_ok > 0.9, found.wrong
    assert not found.blamed
