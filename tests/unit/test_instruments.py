"""Instruments: what --probes may say, and that our own probes come in through the door that is there for all."""

from __future__ import annotations

import importlib
import inspect
import sys
import tomllib

import pytest
from installed import ROOT, install, ours
from resilient_agents.instruments import Choice, choice, find

from resilient.errors import ConfigError


@pytest.fixture
def doors(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(install(tmp_path, "resilient-run", ours()))
    monkeypatch.syspath_prepend(install(tmp_path / "more", "strange", {"strange": "nowhere:Strange"}))


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("auto", Choice()),
        ("off", Choice(on=False)),
        ("disk", Choice(only=("disk",))),
        ("disk, clock", Choice(only=("disk", "clock"))),
        ("no-disk,no-strange", Choice(without=("disk", "strange"))),
    ],
)
def test_what_may_be_said(doors, text, meant):
    assert choice(text) == meant


@pytest.mark.parametrize(("text", "why"), [("", "'auto'"), ("disk,no-clock", "'auto'"), ("dsik", "'disk'"), ("no-clcok", "'clock'")])
def test_what_may_not(doors, text, why):
    with pytest.raises(ConfigError, match=why):
        choice(text)


def test_strangers_stand_beside_ours_and_nothing_is_imported_to_find_them(doors):
    assert set(find()) >= {*ours(), "strange"}
    assert set(find(Choice(only=("strange", "disk")))) == {"strange", "disk"}
    assert "strange" not in find(Choice(without=("strange",)))
    assert "nowhere" not in sys.modules


def test_what_is_wanted():
    assert Choice().wants("x") and not Choice(on=False).wants("x")
    assert Choice(only=("x",)).wants("x") and not Choice(only=("y",)).wants("x") and not Choice(without=("x",)).wants("x")


@pytest.mark.parametrize("name", ours())
def test_ours_are_what_they_say(name):
    module, _, attribute = ours()[name].partition(":")
    kind = getattr(importlib.import_module(module), attribute)
    assert kind.name == name or name.startswith("nvml")
    assert kind.period_s > 0 and getattr(kind, "timeout_s", 10.0) >= 1.0
    assert getattr(kind, "scope", "node") in ("node", "run")
    assert len(inspect.signature(kind).parameters) == 1
    assert inspect.getdoc(kind)


def test_nobody_else_knows_their_names():
    """No privileged path: neither engine nor prober nor daemon names a probe."""
    for file in ("engine", "prober", "instruments", "probing", "daemon"):
        text = (ROOT / "agents/resilient_agents" / f"{file}.py").read_text()
        assert "resilient_agents.probes" not in text, file
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]["resilient-agent"]
