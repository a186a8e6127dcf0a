"""The persistent tier of real runs: what the options do, and two runs with one URL."""

from __future__ import annotations

import pathlib
import time

import msgspec
import pytest
from launched import Launched
from resilient_agents.tenancy import Tenant, encode

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


def test_a_second_run_with_the_same_url_is_refused(tmp_path: pathlib.Path) -> None:
    kept = ["--nproc-per-node", "1", "--checkpoint", f"file://{tmp_path}/kept", "--checkpoint-every", "5"]
    arguments = ["--steps", "1000", "--pause", "0.1"]
    with Launched(tmp_path, kept, "job.py", ["--out", str(tmp_path / "out"), *arguments], name="first") as first:
        first.until(lambda: first.events("checkpoint_committed"), "a checkpoint")
        with Launched(tmp_path, kept, "job.py", ["--out", str(tmp_path / "out2"), *arguments], name="second") as second:
            assert second.wait() == 2, second.text()
        line = f"resilient-run: error: --checkpoint file://{tmp_path}/kept: one run per URL expected, run "
        assert line in second.text()
        assert f"(process {first.process.pid} on " in second.text()
        assert not (tmp_path / "out2").exists(), "no worker was started"
        first.kill_all()
    with Launched(tmp_path, kept, "job.py", ["--out", str(tmp_path / "out"), "--steps", "12"], name="third") as third:
        assert third.wait() == 0, third.text()  # at once, and from where the first one was
    assert third.events("round_started")[0]["tier"] == "persistent"
    mark = tmp_path / "kept" / "IN-USE.json"
    assert not mark.exists()
    with Launched(tmp_path, kept, "job.py", ["--out", str(tmp_path / "out3"), *arguments], name="fourth") as fourth:
        ours = fourth.until(lambda: mark.exists() and msgspec.json.decode(mark.read_bytes(), type=Tenant), "its claim")
        theirs = encode(msgspec.structs.replace(ours, nonce="another", run=f"later-{ours.run}"))
        fourth.until_step(20)
        end = time.monotonic() + 30
        while fourth.process.poll() is None and time.monotonic() < end:
            mark.write_bytes(theirs)  # after a partition, say: the later one goes on
            time.sleep(0.5)
        assert fourth.wait(5) == 1, fourth.text()
    assert "one run per URL expected, run later-" in fourth.text()
