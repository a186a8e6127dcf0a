"""Whole incidents, as they were recorded: one command has to name what broke, and nobody else."""

from __future__ import annotations

import json
import pathlib

import pytest

from resilient import cli

INCIDENTS = sorted((pathlib.Path(__file__).parents[1] / "data" / "incidents").iterdir())
CASES = [(path, form) for path in INCIDENTS for form in ("flight", "flight-nccl") if form == "flight" or (path / form).exists()]
SAME = {"hang": "collective-missing"}  # what the recorder calls it, and what a dump can tell of it


def read(where: pathlib.Path, capsys: pytest.CaptureFixture[str], *more: str) -> dict:
    files = [str(p) for p in sorted(where.iterdir()) if p.suffix in {".log", ".stderr", ".stdout"}]
    code = cli.main(["diagnose", "--json", *files, *more])
    assert code in (0, 1)
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize(("where", "flight"), CASES, ids=lambda it: it if isinstance(it, str) else it.name)
def test_the_cause_is_named(where, flight, capsys):
    expected = json.loads((where / "expected.json").read_text())
    dumps = [str(path) for path in sorted((where / flight).glob("fr_rank?"))]
    found = read(where, capsys, *dumps)["incidents"]
    first = found[0]
    kind = expected["cause"]["kind"]
    assert first["cause"]["finding"]["kind"] == SAME.get(kind, kind), found
    assert first["verdict"] in expected["class_ok"]
    blamed = {first["culprit"], *first["cause"]["finding"]["device"].split(",")}
    for innocent in expected.get("not_culprits", []):
        assert not any(innocent in name for name in blamed), (innocent, blamed)
    if not (first["verdict"] == "user" or first["culprit"] == ""):
        culprit = expected["culprit"]
        assert (
            any(str(culprit.get(key)) in name for name in blamed for key in ("device", "node")) or f"rank:{culprit.get('rank')}" in blamed
        )
    assert len(found) == expected["incidents"], [it["cause"]["finding"]["kind"] for it in found]
