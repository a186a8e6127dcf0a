"""A checkpoint that is sound to the last byte and computes something else is refused by the canary, and the one before it is taken."""

from __future__ import annotations

import pathlib
import uuid

import pytest
from launched import Launched
from test_resized import losses

from resilient.checkpoint import layout
from resilient.checkpoint.disk import DiskTier
from resilient.checkpoint.slot import Slot
from resilient.checkpoint.snapshot import parse
from resilient.checkpoint.source import Live
from resilient.checkpoint.tier import SnapshotKey

pytestmark = pytest.mark.process
WORLD = 2


def forge(tmp_path: pathlib.Path, step: int) -> None:
    """Write that step anew with another weight, and with digests that fit."""
    tier = DiskTier(f"{tmp_path}/kept")
    whole = tier.checkpoint(step)
    run, parts = whole.manifest.run, []
    slots = []
    for entry in whole.manifest.ranks:
        data = bytearray(4 * sum(e.bytes for e in whole.manifest.ranks))
        tier.get(SnapshotKey(entry.rank, step), data)
        found = parse(data)
        payload = bytearray(found.payload)
        described = layout.decode(found.layout)
        begin, length = described.places()[0]
        if length:
            payload[begin + 3] ^= 1  # sign or exponent of a weight
        path = tmp_path / f"slot-{uuid.uuid4()}"
        path.write_bytes(bytes(found.num_bytes))
        slot = Slot(str(path))
        words = {"run": run, "rank": entry.rank, "world_size": found.world_size, "round": 1, "layout": found.layout, "own": found.own}
        slot.begin(**words, payload_bytes=len(payload))[:] = payload
        slot.seal(step)
        slots.append(slot)
    for slot in slots:
        parts.append(tier.write(SnapshotKey(slot.read(verify=False).rank, step), Live(slot), again=True))
        slot.close()
    tier.commit(step, parts, run=run)


@pytest.mark.parametrize("kind", [pytest.param("ddp", marks=pytest.mark.long), "fsdp"])
def test_a_state_that_computes_something_else_is_refused(tmp_path: pathlib.Path, kind: str) -> None:
    def run(name: str, steps: int, *flags: str) -> Launched:
        (tmp_path / name).mkdir()
        arguments = ["--out", str(tmp_path / name), "--kind", kind, "--steps", str(steps), "--canary"]
        with Launched(tmp_path, ["--nproc-per-node", str(WORLD), *flags], "resized.py", arguments, name=name) as found:
            assert found.wait() == 0, found.text()
        return found

    keep = ["--checkpoint", f"file://{tmp_path}/kept", "--checkpoint-every", "4"]
    run("undisturbed", 12)
    first = run("first", 8, *keep)
    assert {event["step"] for event in first.events("checkpoint_committed")} == {4, 8}
    forge(tmp_path, 8)
    DiskTier(f"{tmp_path}/kept").verify(8)
    second = run("second", 12, *keep)
    begun = [(r["tier"], r["step"]) for r in second.events("round_started")]
    wrong = [row for row in begun if row[1] == 8]
    assert set(wrong) == {("persistent", 8)}, "what was brought into memory from there is as wrong"
    assert begun[: len(wrong)] == wrong
    assert begun[-1][1] == 4
    found = [event for event in second.events("finding") if event["kind"] == "refused"]
    assert "the canary's number was" in found[0]["text"]
    assert losses(tmp_path / "second")[11] == losses(tmp_path / "undisturbed")[11]
