"""One vault's part in the comparison of replicas, and two vaults that bring their sheets together: real segments, real connections."""

from __future__ import annotations

import logging
import time
from pathlib import Path

import pytest
from test_vault import until, vault

from resilient.checkpoint import layout, replicas
from resilient.checkpoint.layout import Row, Twins
from resilient.checkpoint.peer import Peer
from resilient.checkpoint.ring import Ring
from resilient.checkpoint.snapshot import slot_bytes
from resilient.core.machine import VaultDo
from resilient.core.messages import NONE, Comparison, Layout, Sheet
from resilient.errors import SnapshotCorrupt, SnapshotMissing, TierUnavailable

pytestmark = pytest.mark.process

ROWS = tuple(Row(name, "uint8", (count,), (0,), (count,)) for name, count in (("w", 5 << 20), ("w.exp_avg", 640)))
BYTES = sum(row.num_bytes for row in ROWS)


class Worker:
    """A rank that seals; its twins are all ranks of the world."""

    def __init__(self, keeper, rank: int, world: int = 3, *, alone: bool = False) -> None:
        room = slot_bytes(4096, 100, BYTES)
        made = keeper.allocate(Layout(rank=rank, digest="", replicated=True, own_bytes=20_000, snapshot_bytes=room))
        self.ring, self.rank, self.world = Ring.open(made.slots), rank, world
        self.layout = layout.Layout(ROWS, Twins(rank) if alone else Twins(0, world)).encode()

    def seal(self, step: int, *, flip: int = -1) -> None:
        words = {"run": "run", "rank": self.rank, "world_size": self.world, "round": 4, "layout": self.layout, "own": b""}
        view = self.ring.begin(payload_bytes=BYTES, **words)
        view[:] = bytes([step]) * BYTES
        if flip >= 0:
            view[flip] ^= 1
        self.ring.seal(step)


def sheets(*keepers) -> tuple[Sheet, ...]:
    """As the coordinator makes them."""
    sums = [(keeper.address, one) for keeper in keepers for one in keeper.known().audit.sums]
    return tuple(Sheet(vault=address, digest=one.digest, ranks=one.ranks) for address, one in sums)


async def audited(keeper, rank: int, step: int) -> None:
    keeper.audits.begin(rank, step)
    await until(lambda: keeper.audits.done(rank)[0] == step)


async def test_two_vaults_find_the_tensor_and_the_rank(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    async with vault(tmp_path / "n0") as leader, vault(tmp_path / "n1") as other:
        leader.do(VaultDo(ranks=(0, 1), world_size=3))
        other.do(VaultDo(ranks=(2,), world_size=3))
        workers = [Worker(leader, 0), Worker(leader, 1), Worker(other, 2)]
        done: list[int] = []
        leader.watch(lambda: None, copied=done.append)
        for worker in workers:
            worker.seal(8, flip=BYTES - 3 if worker.rank == 2 else -1)
        await audited(leader, 0, 8)
        assert leader.known().audit is None, "rank 1 is missing"
        await audited(leader, 1, 8)
        await audited(other, 2, 8)
        assert done == [0, 1]
        assert leader.audits.done(0)[1] > 0.0
        both, one = leader.known().audit, other.known().audit
        assert [(it.twins, it.ranks) for it in (*both.sums, *one.sums)] == [((0, 3, 1), (0, 1)), ((0, 3, 1), (2,))]
        assert (both.step, both.round, one.step, one.round) == (8, 4, 8, 4)
        wish = Comparison(step=8, round=4, sheets=sheets(leader, other))
        leader.do(VaultDo(ranks=(0, 1), world_size=3, compare=wish))
        found = await until(lambda: leader.known().compared)
        assert (found.step, found.round, found.void) == (8, 4, "")
        assert [(it.ranks, it.twins, it.text) for it in found.differences] == [
            ((2,), 3, "step 8: w.exp_avg: differs on rank 2 of 3 replicas")
        ]
        assert "replicas are not equal: step 8" in caplog.text


async def test_what_was_overwritten_or_is_damaged_makes_an_audit_void(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO, "resilient.vault")
    async with vault(tmp_path / "n0") as keeper:
        keeper.do(VaultDo(ranks=(0,), world_size=3))
        worker = Worker(keeper, 0)
        for step in (1, 2, 3):
            worker.seal(step)
        await audited(keeper, 0, 1)
        assert keeper.known().audit is None
        assert "replicas of step 1 are not compared: snapshot rank=0 step=1: not in this node's memory" in caplog.text
        slot = worker.ring.get(3)
        slot.stamp_payload()
        slot.memory[slot.sealed_bytes() - 700] ^= 1
        await audited(keeper, 0, 3)
        assert keeper.known().audit is None, "memory is damaged: that says nothing about what the rank holds"
        assert "replicas of step 3 are not compared: snapshot step=3: the payload is not what was hashed" in caplog.text
        worker.seal(4)
        await audited(keeper, 0, 4)
        assert keeper.known().audit.step == 4


async def test_a_step_that_comes_too_soon_is_void_and_one_after_a_rollback_is_not(tmp_path: Path):
    async with vault(tmp_path / "n0") as keeper:
        keeper.do(VaultDo(ranks=(0,), world_size=3))
        worker = Worker(keeper, 0)
        for step in (7, 8):
            worker.seal(step)
            keeper.audits.begin(0, step)
        assert keeper.audits.done(0)[0] == 8, "7 is still being hashed"
        await until(lambda: keeper.known().audit)
        assert (keeper.audits.done(0)[0], keeper.known().audit.step) == (8, 7)
        worker.seal(3)
        await audited(keeper, 0, 3)


async def test_who_has_no_twins_says_so_without_a_sheet(tmp_path: Path):
    async with vault(tmp_path / "n0") as keeper:
        keeper.do(VaultDo(ranks=(0,), world_size=3))
        Worker(keeper, 0, alone=True).seal(5)
        await audited(keeper, 0, 5)
        assert [(it.twins, it.digest, it.ranks) for it in keeper.known().audit.sums] == [((0, 1, 1), "", (0,))]


async def test_a_sheet_that_is_not_to_be_had_makes_a_comparison_void(tmp_path: Path):
    async with vault(tmp_path / "n0") as leader, vault(tmp_path / "n1") as other:
        keepers = (leader, other)
        for rank, keeper in enumerate(keepers):
            keeper.do(VaultDo(ranks=(rank,), world_size=2))
            worker = Worker(keeper, rank, world=2)
            worker.seal(1, flip=rank)
            await audited(keeper, rank, 1)
        first = sheets(*keepers)
        nobody = (*first[:1], Sheet(vault="127.0.0.1:1", digest=first[1].digest, ranks=(1,)))
        unknown = (*first[:1], Sheet(vault=other.address, digest="00" * 16, ranks=(1,)))
        for step, found, why in ((1, nobody, "peer 127.0.0.1:1"), (2, unknown, "not kept here"), (3, first, "")):
            leader.do(VaultDo(ranks=(0,), world_size=2, compare=Comparison(step=step, round=4, sheets=found)))
            told = await until(lambda step=step: (it := leader.known().compared) is not None and it.step == step and it)
            assert why in told.void
            assert bool(told.differences) is not bool(why)


async def test_a_sheet_that_is_another_one_is_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    async with vault(tmp_path / "n0") as keeper:
        peer = Peer(keeper.address, token="secret", run="run", name="test")
        with pytest.raises(SnapshotMissing, match="not kept here"):
            await peer.sheet("00" * 16)
        sheet = replicas.sheet(layout.Layout(ROWS, Twins(0, 2)).encode(), [b"a" * 16, b"b" * 16])
        digest, kept = replicas.digest_of(sheet), {"sheet": sheet}
        keeper._server.sheet = lambda _: kept["sheet"]
        assert await peer.sheet(digest) == sheet
        kept["sheet"] = sheet[:-1] + b"c"
        with pytest.raises(SnapshotCorrupt, match=f"{digest} expected"):
            await peer.sheet(digest)
        kept["sheet"] = bytes(65 << 20)
        with pytest.raises(TierUnavailable, match="at most 67108864 bytes expected"):
            await peer.sheet(digest)
        peer.close()


async def test_what_is_hashed_here_is_taken_off_what_the_watchman_does(tmp_path: Path):
    async with vault(tmp_path / "n0") as keeper:
        keeper.do(VaultDo(ranks=(0,), world_size=2))
        worker = Worker(keeper, 0, world=2)
        keeper.audits._spent(3600.0)
        worker.seal(1)
        until_s = time.monotonic() + 0.3
        while time.monotonic() < until_s:
            keeper.poke()
        assert not worker.ring.get(1).is_stamped()
        assert keeper.audits.done(0) == (NONE, 0.0)
