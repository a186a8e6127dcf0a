"""Restoring from a disk that has to be asked: a verified snapshot beside torch.load of the same state, and zstd's price."""

from __future__ import annotations

import functools
import pathlib
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dist_checkpoint

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from limits import cold
from told import told

from resilient.checkpoint.disk import DiskTier
from resilient.checkpoint.layout import Layout, Row, Twins
from resilient.checkpoint.ring import Ring
from resilient.checkpoint.slot import Slot
from resilient.checkpoint.snapshot import slot_bytes
from resilient.checkpoint.source import Live
from resilient.checkpoint.tier import SnapshotKey

pytestmark = pytest.mark.bench
MB, TENSORS, TIMES = 512, 48, 5


def files(where: pathlib.Path) -> list[pathlib.Path]:
    return [path for path in where.rglob("*") if path.is_file()]


def taken(work: Callable[[], Any], before: Callable[[], None] = lambda: None) -> float:
    found = []
    for _ in range(TIMES):
        before()
        begin = time.perf_counter()
        work()
        found.append(time.perf_counter() - begin)
    return statistics.median(found)


def test_from_a_cold_disk(tmp_path: pathlib.Path) -> None:
    state = trained()
    slot, key = sealed(tmp_path, state), SnapshotKey(0, 7)
    num_bytes = sum(tensor.nbytes for tensor in state.values())
    rows: list[dict[str, object]] = []

    def tell(name: str, write_s: float, size: int, read_s: float) -> None:
        speed = round(num_bytes / read_s / 1e9, 2)
        rows.append(
            {
                "engine": name,
                "write_s": round(write_s, 2),
                "share": round(size / num_bytes, 3),
                "read_s": round(read_s, 2),
                "read_gb_s": speed,
            }
        )

    for level in (0, 1, 3):
        kept = tmp_path / f"level{level}"
        tier, room = DiskTier(str(kept), level=level), ring(tmp_path, f"into{level}", slot.num_bytes)
        begin = time.perf_counter()
        part = tier.write(key, Live(slot))
        written = time.perf_counter() - begin
        tier.commit(7, [part], run="run")
        tell(
            f"ours, verified, zstd {level}",
            written,
            part.num_bytes,
            taken(functools.partial(tier.get, key, room), lambda kept=kept: cold(files(kept))),
        )
        room.close()
    theirs, dcp = tmp_path / "torch.pt", tmp_path / "dcp"
    begin = time.perf_counter()
    torch.save(state, theirs)
    cold([theirs])
    written = time.perf_counter() - begin
    tell("torch.save, fsync; torch.load", written, theirs.stat().st_size, taken(lambda: torch.load(theirs), lambda: cold([theirs])))
    begin = time.perf_counter()
    dist_checkpoint.save({"s": state}, checkpoint_id=dcp, no_dist=True)
    written = time.perf_counter() - begin
    into = {"s": {name: torch.zeros_like(tensor) for name, tensor in state.items()}}
    tell(
        "torch's DCP",
        written,
        num_bytes,
        taken(lambda: dist_checkpoint.load(into, checkpoint_id=dcp, no_dist=True), lambda: cold(files(dcp))),
    )
    told("from_disk", rows, state=f"{num_bytes / 1e6:.0f} MB of fp32 weights and moments", reads=f"cold, medians of {TIMES}")
    slot.close()


def trained() -> dict[str, torch.Tensor]:
    """Parameters and both moments of Adam after some steps: what zstd finds in random numbers would not be true."""
    torch.manual_seed(1)
    side = int((MB * (1 << 20) / 4 / TENSORS) ** 0.5)
    net = torch.nn.Sequential(*(torch.nn.Linear(side, side, bias=False) for _ in range(TENSORS // 3)))
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    for _ in range(3):
        net(torch.randn(8, side)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    found = dict(net.state_dict())
    for number, moments in enumerate(optimizer.state.values()):
        found |= {f"{number}.{name}": moments[name] for name in ("exp_avg", "exp_avg_sq")}
    return found


def sealed(where: pathlib.Path, state: dict[str, torch.Tensor]) -> Slot:
    rows = tuple(Row(name, "float32", tuple(t.shape), (0,) * t.dim(), tuple(t.shape)) for name, t in state.items())
    described = Layout(rows, Twins(0))
    layout, places = described.encode(), described.places()
    end = sum(-(-length // 64) * 64 for _, length in places)
    path = where / "slot"
    path.write_bytes(bytes(slot_bytes(len(layout), 1000, end)))
    slot = Slot(str(path))
    view = slot.begin(run="run", rank=0, world_size=1, round=1, layout=layout, own=b"\x80", payload_bytes=end)
    for (begin, length), tensor in zip(places, state.values(), strict=True):
        view[begin : begin + length] = memoryview(tensor.numpy()).cast("B")
    slot.seal(7)
    return slot


def ring(where: pathlib.Path, name: str, num_bytes: int) -> Ring:
    (where / name).write_bytes(bytes(num_bytes))
    return Ring.open([str(where / name)])
