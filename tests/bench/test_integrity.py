"""One bit of a stored state is flipped, and it is loaded: who notices (`pytest -m bench -s tests/bench/test_integrity.py`).

Each engine stores a small training once, where it stores it; then, forty times, one bit at a random place of its data is flipped, the state
is loaded as the engine loads it, and the bit is put back. `refused`: it was noticed; `wrong`: tensors other than the stored ones came
back without a word; the rest hit bytes that no tensor is made of, and right tensors came back.
"""

from __future__ import annotations

import os
import pathlib
import random
import sys

import pytest

from resilient.checkpoint.disk import DiskTier
from resilient.checkpoint.ring import Ring
from resilient.checkpoint.tier import SnapshotKey
from resilient.errors import CheckpointError

sys.path.insert(0, str(pathlib.Path(__file__).parent))
import fleet
import peers
from told import bound, told

pytestmark = [pytest.mark.bench, pytest.mark.timeout(900)]

FLIPS = int(os.environ.get("BENCH_FLIPS", "40"))
STEPS = 6
ENGINES = ("torch.save", "dcp-thread", "nvrx-async", "nvrx-local", "dlrover-memory", "dlrover-disk")
FLAGS = ["--steps", str(STEPS), "--every", "3", "--width", "128", "--flips", str(FLIPS)]


def ours(where: pathlib.Path) -> list[dict[str, object]]:
    kept = where / "kept"
    flags = ("--checkpoint", f"file://{kept}", "--checkpoint-every", "3")
    with fleet.started(where, 1, 1, ["resilient", str(where), *FLAGS], flags) as running:
        running.wait()
        (times,) = running.times()
    memory = {"engine": "resilient", "where": "agent's memory", **{name: times[name] for name in ("flips", "refused", "wrong")}}
    (where / "room").write_bytes(bytes(2 * times["state_bytes"]))
    room, key = Ring.open([str(where / "room")]), SnapshotKey(0, STEPS)
    files = [file for file in sorted((kept / f"step-{STEPS:08}").iterdir()) if file.suffix == ".distcp"]
    sound = loaded(kept, key, room)
    draw, refused, wrong = random.Random(7), 0, 0
    for _ in range(FLIPS):
        path = draw.choice(files)
        whole = bytearray(path.read_bytes())
        at, bit = draw.randrange(len(whole)), 1 << draw.randrange(8)
        whole[at] ^= bit
        path.write_bytes(whole)
        try:
            wrong += loaded(kept, key, room) != sound
        except CheckpointError:
            refused += 1
        whole[at] ^= bit
        path.write_bytes(whole)
    room.close()
    return [memory, {"engine": "resilient", "where": "disk", "flips": FLIPS, "refused": refused, "wrong": wrong}]


def loaded(kept: pathlib.Path, key: SnapshotKey, room: Ring) -> bytes:
    """The payload, as a start would find it in its chair's memory."""
    DiskTier(str(kept)).get(key, room)
    return bytes(room.get(key.step).read(step=key.step).payload)


def theirs(where: pathlib.Path, engine: str) -> dict[str, object]:
    if not peers.python(engine):
        return peers.left_out(engine)
    (times,) = peers.trained(where, engine, FLAGS)
    return {"engine": engine, **{name: times[name] for name in ("where", "flips", "refused", "wrong")}}


def test_integrity(tmp_path: pathlib.Path) -> None:
    rows = ours(tmp_path / "ours")
    found = min(int(row["refused"]) / max(1, int(row["refused"]) + int(row["wrong"])) for row in rows)
    rows += [theirs(tmp_path / engine, engine) for engine in ENGINES]
    told("integrity", rows, bounds=[bound("flips that matter and are found", found, at_least=1)])
