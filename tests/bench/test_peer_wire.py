"""How much of the wire a copy to another node uses (`pytest -m bench -s tests/bench/test_peer_wire.py`).

Two processes on this machine, 512 MB in shared memory. In turn: raw TCP (`sendall` -> `recv_into` between warm mappings, as many streams as
a haul has); the same with every piece hashed before it is sent and after it has come (`hashed TCP`: nothing that checks can be faster);
the peer tier's put and get, which end when the copy has been checked and sealed; and the same bytes as the snapshots of four
ranks, from their seals until all are safe on the other side, hashing them here included. The ratios are those of neighbours in time; the
bound of put and get is 0.8 of raw, that of the four ranks 0.8 of hashed. On one machine sender and receiver share the cores, which two
machines would not: there each end hashes beside the wire.
"""

from __future__ import annotations

import asyncio
import contextlib
import mmap
import os
import pathlib
import socket
import statistics
import subprocess
import sys
import threading
import time

import pytest
import uvloop
import xxhash
from resilient_agents.copies import Copies
from resilient_agents.lane import Lane

from resilient.checkpoint import memory
from resilient.checkpoint.chest import Chest
from resilient.checkpoint.haul import PIECE_BYTES
from resilient.checkpoint.notes import Notes
from resilient.checkpoint.peer import STREAMS, Peer
from resilient.checkpoint.ring import Ring
from resilient.checkpoint.slot import Slot
from resilient.checkpoint.snapshot import slot_bytes
from resilient.checkpoint.tier import SnapshotKey

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from told import told

pytestmark = pytest.mark.bench

NUM_BYTES = 512_000_000
ROUNDS = 9
SHM = pathlib.Path("/dev/shm")

RECEIVER = """
import asyncio, mmap, os, socket, sys, threading, uvloop, xxhash
from resilient.checkpoint import memory
from resilient.checkpoint.chest import MemoryTier
from resilient.checkpoint.haul import PIECE_BYTES
from resilient.checkpoint.holder import PeerServer
from resilient.checkpoint.notes import Notes

num_bytes, streams = int(sys.argv[1]), int(sys.argv[2])

def take(connection, view, sums=False):
    for at in range(0, len(view), PIECE_BYTES) if sums else ():
        piece = view[at:at + PIECE_BYTES]
        take(connection, piece)
        xxhash.xxh3_128(piece).digest()
    if sums:
        return
    while view:
        count = connection.recv_into(view, 0, socket.MSG_WAITALL if len(view) <= PIECE_BYTES else 0)
        if not count:
            raise EOFError
        view = view[count:]

def raw(listener):
    fd = os.open(memory.create(memory.segment_path("/dev/shm", memory.new_key(), "raw"), num_bytes), os.O_RDWR)
    os.unlink(os.readlink(f"/proc/self/fd/{fd}"))
    view = memoryview(mmap.mmap(fd, num_bytes, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE))
    share = -(-num_bytes // streams)
    connections = [listener.accept()[0] for _ in range(streams)]
    with __import__("contextlib").suppress(EOFError):
        while True:
            word = bytearray(1)
            take(connections[0], memoryview(word))
            sums = word == b"#"
            parts = [threading.Thread(target=take, args=(c, view[i * share:(i + 1) * share], sums)) for i, c in enumerate(connections)]
            for part in parts: part.start()
            for part in parts: part.join()
            connections[0].sendall(b"!")

async def main():
    tier = MemoryTier("/dev/shm", memory.new_key())
    server = PeerServer(tier, Notes(), token="secret", run="run")
    listener = socket.create_server(("127.0.0.1", 0))
    threading.Thread(target=raw, args=(listener,), daemon=True).start()
    print(await server.start(), listener.getsockname()[1], flush=True)
    await asyncio.to_thread(sys.stdin.read)
    await server.close()
    tier.unlink()

uvloop.run(main())
"""


def seal(target: Slot | Ring, step: int, num_bytes: int, rank: int = 0) -> None:
    view = target.begin(run="run", rank=rank, world_size=1, round=1, layout=b"", own=b"", payload_bytes=num_bytes)
    piece = os.urandom(1 << 20)
    for start in range(0, len(view), len(piece)):
        view[start : start + len(piece)] = piece[: len(view) - start]
    target.seal(step)


class Raw:
    """As many plain streams."""

    def __init__(self, port: int) -> None:
        self._connections = [socket.create_connection(("127.0.0.1", port)) for _ in range(STREAMS)]
        self._view = memoryview(mmap.mmap(-1, NUM_BYTES, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE))
        self._share = -(-NUM_BYTES // STREAMS)

    def send(self, *, sums: bool = False) -> float:
        shares = [self._view[i * self._share : (i + 1) * self._share] for i in range(STREAMS)]
        begin = time.perf_counter()
        self._connections[0].sendall(b"#" if sums else b"?")
        carry = _hashed if sums else socket.socket.sendall
        threads = [threading.Thread(target=carry, args=(c, s)) for c, s in zip(self._connections, shares, strict=True)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert self._connections[0].recv(1) == b"!"
        return time.perf_counter() - begin

    def close(self) -> None:
        for connection in self._connections:
            connection.close()


def _hashed(connection: socket.socket, view: memoryview) -> None:
    for at in range(0, len(view), PIECE_BYTES):
        piece = view[at : at + PIECE_BYTES]
        xxhash.xxh3_128(piece).digest()
        connection.sendall(piece)


class FourRanks:
    """Their snapshots, and what brings them to the other side."""

    def __init__(self, address: str, key: str) -> None:
        self._chests = [Chest(SHM, key, rank) for rank in (1, 2, 3, 4)]
        self._lane = Lane("bench", threads=2)
        self._copies = Copies(Notes(), self._lane, token="secret", run="run", node="n0")
        self._copies.set_peers((address,))
        for chest in self._chests:
            chest.seated = True
            chest.grow_snapshots(slot_bytes(0, 0, NUM_BYTES // 4))

    async def send(self, step: int) -> float:
        safe: asyncio.Queue[int] = asyncio.Queue()
        self._copies.watch(safe.put_nowait)
        for chest in self._chests:
            await asyncio.to_thread(seal, chest.snapshots, step, NUM_BYTES // 4, chest.rank)
        begin = time.perf_counter()
        for chest in self._chests:
            self._copies.look(chest)
        async with asyncio.timeout(60):
            assert {await safe.get() for _ in self._chests} == {1, 2, 3, 4}
        return time.perf_counter() - begin

    async def close(self) -> None:
        await self._copies.close()
        self._lane.close()
        for chest in self._chests:
            chest.unlink()


async def measure(port: int, raw_port: int, directory: str) -> list[dict[str, object]]:
    size = slot_bytes(0, 0, NUM_BYTES)
    source = Slot(memory.create(f"{directory}.source", size), populate=True)
    seal(source, 1, NUM_BYTES)
    source.stamp_payload()
    target = Ring.open([memory.create(f"{directory}.target", size)], populate=True)
    raw, peer = Raw(raw_port), Peer(f"127.0.0.1:{port}", token="secret", run="run", name="bench")
    four = FourRanks(f"127.0.0.1:{port}", memory.new_key())
    key = SnapshotKey(0, 1)
    seconds: dict[str, list[float]] = {"raw TCP": [], "hashed TCP": [], "put": [], "get": [], "four ranks": []}

    async def timed(what: str) -> None:
        begin = time.perf_counter()
        await (peer.put(key, source) if what == "put" else peer.get(key, target))
        seconds[what].append(time.perf_counter() - begin)

    for step in range(ROUNDS + 2):
        seconds["raw TCP"].append(await asyncio.to_thread(raw.send))
        seconds["hashed TCP"].append(await asyncio.to_thread(raw.send, sums=True))
        await timed("put")
        await timed("get")
        seconds["four ranks"].append(await four.send(step))
    peer.close()
    await four.close()
    raw.close()
    rows = []
    for what, taken in seconds.items():
        warm = taken[2:]  # the receiver has two slots
        ratios, hashed = (
            [theirs / ours for theirs, ours in zip(seconds[limit][2:], warm, strict=True)] for limit in ("raw TCP", "hashed TCP")
        )
        rows.append({
            "what": what, "first_s": round(taken[0], 3), "median_s": round(statistics.median(warm), 3),
            "GB/s": round(NUM_BYTES / statistics.median(warm) / 1e9, 2), "of raw": round(statistics.median(ratios), 2),
            "worst": round(min(ratios), 2), "best": round(max(ratios), 2), "of hashed": round(statistics.median(hashed), 2),
        })  # fmt: skip
    return rows


def test_peer_wire() -> None:
    command = [sys.executable, "-c", RECEIVER, str(NUM_BYTES), str(STREAMS)]
    directory = str(SHM / f"resilient-bench-{os.getpid()}")
    receiver = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        ports = [int(word) for word in receiver.stdout.readline().split()]
        rows = uvloop.run(measure(*ports, directory))
    finally:
        receiver.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            receiver.wait(10)
        receiver.kill()
        receiver.wait()
        receiver.stdout.close()
        for left in SHM.glob(f"{pathlib.Path(directory).name}.*"):
            left.unlink()
    told("peer_wire", rows, bytes=NUM_BYTES, streams=STREAMS, rounds=ROUNDS, bound=0.8)
