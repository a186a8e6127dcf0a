"""What is recorded in tests/data hangs together: trees of machines and whole incidents."""

from __future__ import annotations

import json
import pathlib
import pickle
import re

import pytest

DATA = pathlib.Path(__file__).parents[1] / "data"
HOSTS = sorted((DATA / "hosts").iterdir())
INCIDENTS = sorted((DATA / "incidents").iterdir())
RECORD = re.compile(r"\d+,\d+,\d+,[-c];.*")
CLASSES = {"ignore", "user", "app-restart", "gpu-reset", "replace", "cordon"}


def files(tree):
    return {path.relative_to(tree).as_posix() for path in tree.rglob("*") if path.is_file()}


@pytest.mark.parametrize("tree", HOSTS, ids=lambda path: path.name)
def test_a_tree_lies_over_the_healthy_one(tree):
    assert files(tree) <= files(DATA / "hosts" / "healthy")


@pytest.mark.parametrize("tree", HOSTS, ids=lambda path: path.name)
def test_kernel_records_are_in_order(tree):
    rows = (tree / "dev" / "kmsg").read_text(encoding="utf-8").splitlines()
    records = [row for row in rows if not row.startswith(" ")]
    assert all(RECORD.fullmatch(row) for row in records)
    numbers = [tuple(map(int, row.split(",", 3)[1:3])) for row in records]
    assert numbers == sorted(numbers) and len(numbers) == len(set(numbers))
    assert numbers[:18] == [tuple(map(int, row.split(",", 3)[1:3])) for row in healthy_boot()]


def healthy_boot():
    rows = (DATA / "hosts" / "healthy" / "dev" / "kmsg").read_text(encoding="utf-8").splitlines()
    return [row for row in rows if not row.startswith(" ")][:18]


@pytest.mark.parametrize("path", INCIDENTS, ids=lambda path: path.name)
def test_every_incident_says_what_is_expected(path):
    told = json.loads((path / "expected.json").read_text(encoding="utf-8"))
    assert told["class"] in told["class_ok"] and set(told["class_ok"]) <= CLASSES
    assert told["culprit"] and (path / told["cause"]["file"]).exists()
    assert [seat["rank"] for seat in json.loads((path / "ranks.json").read_text(encoding="utf-8"))] == [0, 1, 2, 3]


@pytest.mark.parametrize("path", sorted((DATA / "incidents").glob("*/flight*/fr_rank?")), ids=lambda path: "-".join(path.parts[-3:]))
def test_a_dump_and_its_json_tell_the_same(path):
    dump = pickle.loads(path.read_bytes())
    told = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    names = [(entry["profiling_name"], entry["collective_seq_id"], entry["state"]) for entry in dump["entries"]]
    assert names == [(entry["profiling_name"], entry["collective_seq_id"], entry["state"]) for entry in told["entries"]]
