"""The persistent tier of real runs: what the options do."""

from __future__ import annotations

import pathlib

import pytest
from launched import Launched

from resilient.checkpoint.disk import DiskTier
from resilient.checkpoint.rankfile import ZSTD

pytestmark = pytest.mark.process


def test_what_is_kept_and_how_it_is_packed(tmp_path: pathlib.Path) -> None:
    url = f"file://{tmp_path}/kept"
    kept = [
        "--checkpoint",
        url,
        "--checkpoint-every",
        "3",
        "--checkpoint-keep",
        "2",
        "--checkpoint-keep-every",
        "6",
        "--checkpoint-zstd",
        "1",
    ]
    arguments = ["--out", str(tmp_path / "out"), "--steps", "16", "--pause", "0.1"]
    with Launched(tmp_path, ["--nproc-per-node", "2", *kept], "job.py", arguments) as run:
        assert run.wait() == 0, run.text()
    tier = DiskTier(url)
    newest = sorted(e["step"] for e in run.events("checkpoint_committed"))
    assert tier.steps() == tuple(sorted({*(step for step in newest if step % 6 == 0), *newest[-2:]}))
    assert 6 in tier.steps()
    tail, _ = tier.checkpoint(newest[-1]).tail(0)
    assert {item.codec for item in tail.items} == {ZSTD}
    tier.verify(newest[-1])
