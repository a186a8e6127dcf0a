"""A state that lies in two nodes' memory, sharded over four ranks, cut for two: what each node fetches, keeps and waits for.

Both vaults are in one process and on one machine, over loopback.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import pathlib
import shutil
import sys
import threading
import time

import msgspec
import pytest
import uvloop
from resilient_agents.vault import Vault

from resilient.checkpoint import memory
from resilient.checkpoint.layout import Layout as Described
from resilient.checkpoint.layout import Row, Twins
from resilient.checkpoint.ring import Ring
from resilient.checkpoint.snapshot import slot_bytes
from resilient.core.machine import VaultDo
from resilient.core.messages import Elder, Layout

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from told import told

pytestmark = pytest.mark.bench

TENSORS, SHAPE = 32, (4096, 1024)
STATE_BYTES = TENSORS * SHAPE[0] * SHAPE[1] * 4
STEP, OLD, NEW = 6, 4, 2
SHM = pathlib.Path("/dev/shm")
WHERE = {  # which old ranks lie on which of the two nodes; on node n sits new rank n
    "both nodes came back": ((0, 1), (2, 3)),
    "in each other's place": ((2, 3), (0, 1)),
    "one is new, copies were kept": ((0, 1, 2, 3), ()),
}


def described(rank: int, world: int) -> Described:
    share = SHAPE[0] // world
    local = (share, SHAPE[1])
    return Described(tuple(Row(f"model.{i}", "float32", SHAPE, (share * rank, 0), local) for i in range(TENSORS)), Twins(rank))


def chair(rank: int, world: int) -> Layout:
    return Layout(rank=rank, digest="", replicated=False, own_bytes=100, snapshot_bytes=slot_bytes(8192, 100, STATE_BYTES // world))


def leave(vault: Vault, rank: int) -> None:
    ring, length = Ring.open(vault.allocate(chair(rank, OLD)).slots), STATE_BYTES // OLD
    words = {"run": "run", "rank": rank, "world_size": OLD, "round": 1, "layout": described(rank, OLD).encode(), "own": b"own"}
    view, piece = ring.begin(**words, payload_bytes=length), os.urandom(1 << 20)
    for start in range(0, length, len(piece)):
        view[start : start + len(piece)] = piece
    del view
    ring.seal(STEP)
    ring.get(STEP).stamp_payload()
    ring.close()


class Sizes:
    """The largest sum of what lies in a directory."""

    def __init__(self, directory: pathlib.Path) -> None:
        self.directory, self.most, self.over = directory, 0, threading.Event()
        self.first = self.now()
        self.thread = threading.Thread(target=self.look, daemon=True)
        self.thread.start()

    def now(self) -> int:
        found = 0
        for path in self.directory.glob("resilient.*"):
            with contextlib.suppress(FileNotFoundError):
                found += path.stat().st_size
        return found

    def look(self) -> None:
        while not self.over.wait(0.002):
            self.most = max(self.most, self.now())


async def measure(where: str) -> list[dict[str, object]]:
    directory = SHM / f"resilient-bench-{os.getpid()}"
    vaults, addresses, sizes = [], [], []
    try:
        for node, ranks in enumerate(WHERE[where]):
            here = directory / f"n{node}"
            here.mkdir(parents=True)
            words = {"checkpoint_url": "", "checkpoint_every": 0, "token": "secret", "node": here.name}
            vaults.append(Vault(run="run", directory=here, key=memory.new_key(), **words))
            addresses.append(f"127.0.0.1:{await vaults[-1].start()}")
            for rank in ranks:
                await asyncio.to_thread(leave, vaults[-1], rank)
            sizes.append(Sizes(here))
        begin = time.perf_counter()
        took, fetched = await asyncio.gather(*(one(node, vault, addresses, where, begin) for node, vault in enumerate(vaults)))
        rows = []
        for node, (seconds, num_bytes) in enumerate((took, fetched)):
            sizes[node].over.set()
            sizes[node].thread.join()
            rows.append({
                "where": where, "node": node, "state_MB": STATE_BYTES // 10**6, "fetched_MB": round(num_bytes / 1e6, 1),
                "segments_before_MB": sizes[node].first // 10**6, "at_most_MB": sizes[node].most // 10**6, "seconds": round(seconds, 3),
            })  # fmt: skip
        for vault in vaults:
            await vault.close()
        return rows
    finally:
        shutil.rmtree(directory, ignore_errors=True)


async def one(node: int, vault: Vault, addresses: list[str], where: str, begin: float) -> tuple[float, int]:
    """New rank `node`, on that node."""
    elders = tuple(
        Elder(rank=rank, vaults=tuple(address for address, ranks in zip(addresses, WHERE[where], strict=True) if rank in ranks))
        for rank in range(OLD)
    )
    vault.do(VaultDo(round=1, step=STEP, ranks=(node,), world_size=NEW, elders=elders))
    wish = msgspec.structs.replace(chair(node, NEW), reshape=STEP, rows=described(node, NEW).encode(), world_size=NEW, origin=OLD)
    found = await vault.reshape(wish)
    assert (found.error, found.refused) == ("", "")
    return time.perf_counter() - begin, vault._estate.fetched_bytes


def test_resharded() -> None:
    told("resharded", [row for where in WHERE for row in uvloop.run(measure(where))])
