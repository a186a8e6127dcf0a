"""Parity beside whole copies: how soon the snapshots of all nodes are safe, what is kept for that, and how soon a lost one is back.

All vaults are in one process and on one machine: its cores do the work of all nodes, and of N nodes each sends, receives and hashes at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import pathlib
import shutil
import statistics
import sys
import time

import pytest
import uvloop
from resilient_agents.vault import Vault

from resilient.checkpoint import memory
from resilient.checkpoint.layout import Layout as Described
from resilient.checkpoint.layout import Row, Twins
from resilient.checkpoint.ring import Ring
from resilient.checkpoint.snapshot import slot_bytes
from resilient.core.ledger import Copy
from resilient.core.machine import VaultDo
from resilient.core.messages import Fetch, Layout, Member, Rebuild
from resilient.core.rebuild import sources

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from told import told

pytestmark = pytest.mark.bench

NUM_BYTES = 256_000_000
ROUNDS = 5
SHM = pathlib.Path("/dev/shm")


class Fleet:
    def __init__(self, directory: pathlib.Path) -> None:
        self.directory, self.vaults, self.rings, self.addresses = directory, [], [], []

    async def add(self) -> Vault:
        directory = self.directory / f"n{len(list(self.directory.iterdir()))}"
        directory.mkdir()
        words = {"checkpoint_url": "", "checkpoint_every": 0, "token": "secret", "node": directory.name}
        vault = Vault(run="run", directory=directory, key=memory.new_key(), **words)
        self.addresses.append(f"127.0.0.1:{await vault.start()}")
        self.vaults.append(vault)
        return vault

    def allocate(self, rank: int) -> None:
        layout = Layout(rank=rank, digest="", replicated=False, own_bytes=100, snapshot_bytes=slot_bytes(200, 0, NUM_BYTES))
        self.rings.append(Ring.open(self.vaults[rank].allocate(layout).slots, populate=True))

    def orders(self, *, parity: bool) -> None:
        group = tuple(Member(vault=address, ranks=(rank,)) for rank, address in enumerate(self.addresses))
        for rank, vault in enumerate(self.vaults):
            peer = self.addresses[(rank + 1) % len(self.vaults)]
            vault.do(VaultDo(peers=(peer,), ranks=(rank,), group=group if parity else ()))

    def seal(self, step: int) -> None:
        piece = os.urandom(1 << 20)
        for rank, ring in enumerate(self.rings):
            described = Described((Row("w", "uint8", (NUM_BYTES,), (0,), (NUM_BYTES,)),), Twins(rank)).encode()
            view = ring.begin(run="run", rank=rank, world_size=9, round=1, layout=described, own=b"", payload_bytes=NUM_BYTES)
            for start in range(0, NUM_BYTES, len(piece)):
                view[start : start + len(piece)] = piece[: NUM_BYTES - start]
            ring.seal(step)

    def safe(self, step: int, *, parity: bool) -> bool:
        if parity:
            return all(v._parities.copied(v._memory.chest(rank)) == step for rank, v in enumerate(self.vaults))
        return all(step in v._memory.chest((rank - 1) % len(self.vaults)).sealed("snapshot") for rank, v in enumerate(self.vaults))

    def kept(self) -> float:
        """Bytes that a node has for others, in snapshots."""
        room = [
            sum(
                slot.num_bytes
                for rank, chest in v._memory.chests.items()
                if rank != here and chest.snapshots
                for slot in chest.snapshots.slots
            )
            for here, v in enumerate(self.vaults)
        ]
        return max(room) / NUM_BYTES

    def fetch(self, step: int, *, parity: bool) -> Fetch:
        """Rank 0's node is lost."""
        if not parity:
            return Fetch(rank=0, step=step, tier="peer", source=self.addresses[1], round=step)
        copies = {rank: (Copy(node=str(rank), seated=True, snapshots=ring.steps()),) for rank, ring in enumerate(self.rings) if rank}
        found = sources([0], {str(rank): v.known().parities for rank, v in enumerate(self.vaults) if rank}, copies)[0][step]
        rebuild = Rebuild(
            stripes=tuple((self.addresses[int(node)], kept) for node, kept in found.stripes),
            others=tuple((rank, self.addresses[int(node)]) for rank, node in found.others),
        )
        return Fetch(rank=0, step=step, tier="peer", source="", round=step, rebuild=rebuild)


async def until(condition, poke=lambda: None) -> None:
    async with asyncio.timeout(60):
        while not condition():
            poke()
            await asyncio.sleep(0.002)


async def measure(count: int, *, parity: bool) -> dict[str, object]:
    directory = SHM / f"resilient-bench-{os.getpid()}"
    directory.mkdir()
    fleet = Fleet(directory)
    try:
        for rank in range(count):
            await fleet.add()
            fleet.allocate(rank)
        fleet.orders(parity=parity)
        safe, back = [], []
        for step in range(1, ROUNDS + 3):
            await asyncio.to_thread(fleet.seal, step)
            begin = time.perf_counter()
            await until(lambda step=step: fleet.safe(step, parity=parity), lambda: [v.poke() for v in fleet.vaults])
            safe.append(time.perf_counter() - begin)
        kept, members = fleet.kept(), list(fleet.vaults)
        newcomer = await fleet.add()
        fleet.vaults.pop()
        for step in (ROUNDS + 1, ROUNDS + 2):
            fetch = fleet.fetch(step, parity=parity)
            begin = time.perf_counter()
            newcomer.do(VaultDo(fetch=(fetch,), ranks=(0,)))
            await until(lambda fetch=fetch: fetch in newcomer.known().fetched)
            back.append(time.perf_counter() - begin)
        for vault in (*members, newcomer):
            await vault.close()
    finally:
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(directory)
    return {
        "what": "parity" if parity else "whole copies", "nodes": count, "first_s": round(safe[0], 3),
        "safe_s": round(statistics.median(safe[2:]), 3), "GB/s of all": round(count * NUM_BYTES / statistics.median(safe[2:]) / 1e9, 2),
        "kept": f"{kept:.2f} x", "back_s": round(min(back), 3),
    }  # fmt: skip


def test_parity() -> None:
    rows = [uvloop.run(measure(count, parity=parity)) for count in (3, 5) for parity in (False, True)]
    told("parity", rows, bytes=NUM_BYTES, rounds=ROUNDS)
