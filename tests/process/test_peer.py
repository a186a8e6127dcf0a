"""Large copies between two nodes: several connections at once, damage and cuts on the way, a sender that is killed, a receiver that stops."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import random
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import uvloop
from resilient_agents.copies import Copies
from resilient_agents.lane import Lane
from resilient_agents.vault import Vault
from test_vault import until

from resilient.checkpoint import haul, memory, transport
from resilient.checkpoint.chest import Chest, MemoryTier
from resilient.checkpoint.haul import PIECE_BYTES, Incoming, Limit
from resilient.checkpoint.holder import PeerServer
from resilient.checkpoint.layout import Layout as Shared
from resilient.checkpoint.layout import Row, decode, padded
from resilient.checkpoint.notes import Notes
from resilient.checkpoint.peer import Peer
from resilient.checkpoint.ring import OwnSegment, Ring
from resilient.checkpoint.slot import Slot
from resilient.checkpoint.snapshot import HEADER_BYTES, slot_bytes, stamped_digest
from resilient.checkpoint.tcp import Tcp
from resilient.checkpoint.tier import SnapshotKey
from resilient.core.machine import VaultDo
from resilient.core.messages import Fetch, Layout
from resilient.errors import ProtocolError, SnapshotCorrupt, SnapshotMissing, TierUnavailable

pytestmark = pytest.mark.process

PAYLOAD = 10 * PIECE_BYTES + 12_345
SIZE = slot_bytes(0, 3, PAYLOAD)
LATE = 1 << 20  # what the cut connections' threads had in hand, and words; one of the pieces that came may be the last one, which is short


@functools.cache
def content(step: int) -> bytes:
    return random.Random(step).randbytes(PAYLOAD)


def seal(ring: Ring, step: int, rank: int = 0) -> Slot:
    ring.begin(run="run", rank=rank, world_size=2, round=1, layout=b"", own=b"own", payload_bytes=PAYLOAD)[:] = content(step)
    ring.seal(step)
    slot = ring.get(step)
    slot.stamp_payload()
    return slot


def ring_at(directory: Path, name: str) -> Ring:
    return Ring.open([memory.create(f"{directory}/{name}-{i}", SIZE) for i in range(2)])


class Proxy:
    """A wire that can be listened to, damaged and cut. Counts what goes towards the server."""

    def __init__(self, port: int) -> None:
        self.carried = 0
        self.flip_at = self.cut_at = self.stop_at = -1  # when so many bytes have been carried towards the server
        self._server = socket.create_server(("127.0.0.1", 0))
        self._target = port
        self._open: list[socket.socket] = [self._server]
        self._lock = threading.Lock()
        self.address = f"127.0.0.1:{self._server.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near = self._server.accept()[0]
                far = socket.create_connection(("127.0.0.1", self._target))
                self._open += [near, far]
                for source, sink, counts in ((near, far, True), (far, near, False)):
                    threading.Thread(target=self._carry, args=(source, sink, counts), daemon=True).start()

    def _carry(self, source: socket.socket, sink: socket.socket, counts: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                if counts:
                    data = self._spoilt(data)
                if data is None:
                    return
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)

    def _spoilt(self, data: bytes) -> bytes | None:
        with self._lock:
            self.carried += len(data)
            if 0 <= self.cut_at <= self.carried:
                self.cut()
            if 0 <= self.stop_at <= self.carried:
                return None
            if 0 <= self.flip_at <= self.carried and len(data) > 30_000:
                self.flip_at = -1
                return data[:20_000] + bytes([data[20_000] ^ 4]) + data[20_001:]
        return data

    def cut(self) -> None:
        self.cut_at = -1
        for connection in self._open[1:]:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            connection.close()  # with what nobody read: the other end hears of it at once

    def close(self) -> None:
        self.cut()
        self._server.shutdown(socket.SHUT_RDWR)
        for connection in self._open:
            connection.close()


@contextlib.asynccontextmanager
async def holder(directory: Path):
    """A vault's door with its memory, behind a proxy; and a peer that knocks at it."""
    directory.mkdir(exist_ok=True)  # noqa: ASYNC240 - nobody else is on this loop
    tier = MemoryTier(directory, memory.new_key())
    server = PeerServer(tier, Notes(), token="secret", run="run")
    proxy = Proxy(await server.start())
    peer = Peer(proxy.address, token="secret", run="run", name="test")
    server.memory = tier
    try:
        yield server, proxy, peer
    finally:
        peer.close()
        await server.close()
        proxy.close()
        tier.unlink()


def backwards(proxy: Proxy) -> Proxy:
    """The same wire, seen from the other end: it counts, damages and cuts what comes from the server."""
    back = Proxy(int(proxy.address.rpartition(":")[2]))
    carry = back._carry
    back._carry = lambda near, far, counts: carry(near, far, not counts)
    return back


def held(server: PeerServer, step: int, rank: int = 0) -> bool:
    """Whether that copy is there, and every byte of it right."""
    with contextlib.suppress(SnapshotMissing):
        found = server.memory.slot(SnapshotKey(rank, step)).read(rank=rank, step=step, stamped=True)
        return bytes(found.payload) == content(step)
    return False


async def there_and_back(tmp_path: Path) -> None:
    async with holder(tmp_path / "n1") as (server, proxy, peer):
        source, target = ring_at(tmp_path, "source"), ring_at(tmp_path, "target")
        for step in (1, 2, 3):
            await peer.put(SnapshotKey(0, step), seal(source, step))
            assert held(server, step)
            assert await peer.get(SnapshotKey(0, step), target) == SIZE
            assert bytes(target.get(step).read(rank=0, step=step, stamped=True).payload) == content(step)
        assert proxy.carried < 3 * SIZE + 50_000


def test_there_and_back_on_both_loops(tmp_path):
    for name, factory in (("asyncio", None), ("uvloop", uvloop.new_event_loop)):
        (tmp_path / name).mkdir()
        with asyncio.Runner(loop_factory=factory) as runner:
            runner.run(there_and_back(tmp_path / name))


async def test_room_for_what_will_come_is_made_with_the_first_copy_and_with_the_first_fetch(tmp_path):
    async with holder(tmp_path / "n1") as (server, _, peer):
        await peer.put(SnapshotKey(0, 1), seal(ring_at(tmp_path, "source"), 1), room=3 * SIZE)
        assert [slot.num_bytes for slot in server.memory.chest(0).slots("snapshot")] == [3 * SIZE] * 2
        tier = MemoryTier(tmp_path, memory.new_key())
        with tier.berth(SnapshotKey(0, 1)) as berth:
            await peer.get(SnapshotKey(0, 1), berth)
        assert [slot.num_bytes for slot in tier.chest(0).slots("snapshot")] == [3 * SIZE] * 2
        tier.unlink()
        with pytest.raises(TierUnavailable):
            await peer.put(SnapshotKey(0, 2), seal(ring_at(tmp_path, "other"), 2), room=1 << 50)
        assert held(server, 1)


async def test_a_bit_flipped_on_the_way_is_refused_and_the_older_copy_stays(tmp_path):
    async with holder(tmp_path / "n1") as (server, proxy, peer):
        source = ring_at(tmp_path, "source")
        await peer.put(SnapshotKey(0, 1), seal(source, 1))
        slot = seal(source, 2)
        for share in (0.1, 0.5, 0.9):
            proxy.flip_at = proxy.carried + int(share * SIZE)
            with pytest.raises(SnapshotCorrupt, match=r"the payload is not what was hashed.*at 127\.0\.0\.1"):
                await peer.put(SnapshotKey(0, 2), slot)
            assert proxy.flip_at == -1
            assert held(server, 1)
            assert [key.step for key in server.memory.list()] == [1]
        await peer.put(SnapshotKey(0, 2), slot)  # all of it again: nobody knows which piece was wrong
        assert held(server, 2)


async def test_a_bit_flipped_on_the_way_back_is_refused(tmp_path):
    async with holder(tmp_path / "n1") as (_, proxy, peer):
        source, target = ring_at(tmp_path, "source"), ring_at(tmp_path, "target")
        await peer.put(SnapshotKey(0, 1), seal(source, 1))
        back = backwards(proxy)
        fetching = Peer(back.address, token="secret", run="run", name="test")
        back.flip_at = SIZE // 2
        with pytest.raises(SnapshotCorrupt):
            await fetching.get(SnapshotKey(0, 1), target)
        assert target.newest() is None
        await fetching.get(SnapshotKey(0, 1), target)
        assert target.newest_step() == 1
        fetching.close()
        back.close()


async def test_a_transfer_that_was_cut_goes_on_where_it_stopped(tmp_path):
    async with holder(tmp_path / "n1") as (server, proxy, peer):
        slot = seal(ring_at(tmp_path, "source"), 1)
        proxy.cut_at = int(0.6 * SIZE)
        with pytest.raises(TierUnavailable):
            await peer.put(SnapshotKey(0, 1), slot)
        assert list(server.memory.list()) == []
        await until(lambda: server._broken)
        came = len(server._broken[0, "snapshot"].incoming.have())
        assert came >= 2
        before = proxy.carried
        await peer.put(SnapshotKey(0, 1), slot)
        assert proxy.carried - before < SIZE - (came - 1) * PIECE_BYTES + LATE
        assert held(server, 1)


async def test_what_came_of_a_cut_transfer_is_not_used_for_another_snapshot_nor_after_another_copy(tmp_path):
    async with holder(tmp_path / "n1") as (server, proxy, peer):
        source = ring_at(tmp_path, "source")
        slot = seal(source, 1)

        async def cut() -> None:
            proxy.cut_at = proxy.carried + int(0.6 * SIZE)
            with pytest.raises(TierUnavailable):
                await peer.put(SnapshotKey(0, 1), slot)
            await until(lambda: server._broken)

        await cut()
        await peer.put(SnapshotKey(0, 2), seal(source, 2))
        assert held(server, 2)
        await cut()
        broken = server._broken[0, "snapshot"]
        with server.memory.berth(SnapshotKey(0, 3)) as other:  # somebody else's copy of the rank came into the same place
            other.receive(slot.header())[:100] = bytes(100)
        assert not broken.berth.untouched()
        before = proxy.carried
        await peer.put(SnapshotKey(0, 1), slot)
        assert proxy.carried - before > SIZE
        assert held(server, 1)


async def test_a_fetch_that_was_cut_goes_on_where_it_stopped(tmp_path):
    async with holder(tmp_path / "n1") as (_, proxy, peer):
        await peer.put(SnapshotKey(0, 1), seal(ring_at(tmp_path, "source"), 1))
        back = backwards(proxy)
        fetching = Peer(back.address, token="secret", run="run", name="test")
        back.cut_at = int(0.6 * SIZE)
        tier = MemoryTier(tmp_path, memory.new_key())
        berth = tier.berth(SnapshotKey(0, 1))
        with pytest.raises(TierUnavailable), berth:
            await fetching.get(SnapshotKey(0, 1), berth)
        assert list(tier.list()) == []
        came, before = len(fetching._broken[2].have()), back.carried
        assert came >= 2
        with berth:
            await fetching.get(SnapshotKey(0, 1), berth)
        assert back.carried - before < SIZE - (came - 1) * PIECE_BYTES + LATE
        assert bytes(tier.slot(SnapshotKey(0, 1)).read(stamped=True).payload) == content(1)
        fetching.close()
        back.close()
        tier.unlink()


@pytest.mark.long
async def test_a_node_with_another_transport_is_refused_by_name(tmp_path, caplog):
    async with holder(tmp_path / "n1") as (server, proxy, _):
        rail = Tcp()
        rail.name = "rail"
        peer = Peer(proxy.address, token="secret", run="run", name="test", transport=rail)
        with pytest.raises(TierUnavailable):
            await peer.put(SnapshotKey(0, 1), seal(ring_at(tmp_path, "source"), 1))
        assert "transport 'tcp' expected, 'rail' found (see --data-transport)" in caplog.text
        assert not held(server, 1)
        peer.close()


async def test_a_wire_on_which_nothing_moves_any_more(tmp_path, monkeypatch):
    monkeypatch.setattr(transport, "STALL_S", 1.0)
    async with holder(tmp_path / "n1") as (server, proxy, peer):
        slot = seal(ring_at(tmp_path, "source"), 1)
        proxy.stop_at = SIZE // 2
        begin = time.monotonic()
        with pytest.raises(TierUnavailable):
            await peer.put(SnapshotKey(0, 1), slot)
        assert time.monotonic() - begin < 5
        await until(lambda: server._broken and not server.memory.chest(0).filling.locked())
        proxy.stop_at = -1
        monkeypatch.undo()
        await peer.put(SnapshotKey(0, 1), slot)
        assert held(server, 1)


async def test_a_slot_that_is_overwritten_while_it_is_sent(tmp_path):
    async with holder(tmp_path / "n1") as (server, proxy, peer):
        source = ring_at(tmp_path, "source")
        await peer.put(SnapshotKey(0, 1), seal(source, 1))
        slot = seal(source, 2)
        peer._limit = Limit(100 << 20)
        sending = asyncio.create_task(peer.put(SnapshotKey(0, 2), slot))
        before = proxy.carried
        await until(lambda: proxy.carried > before + PIECE_BYTES)
        slot.begin(run="run", rank=0, world_size=2, round=1, layout=b"", own=b"own", payload_bytes=PAYLOAD)[:] = content(4)
        with pytest.raises(SnapshotMissing, match="overwritten while it was being sent"):
            await sending
        assert held(server, 1)
        assert [key.step for key in server.memory.list()] == [1]


async def test_a_writer_faster_than_the_wire_is_copied_first(tmp_path, caplog):
    """Straight from the slot nothing would ever arrive whole; the private copy does, and the writer still waits for nobody."""
    caplog.set_level("INFO")
    async with holder(tmp_path / "n1") as (server, proxy, _):
        chest = Chest(tmp_path, memory.new_key(), 0)
        chest.seated = True
        ring = chest.grow_snapshots(SIZE)
        lane = Lane("test", threads=2)
        copies = Copies(Notes(), lane, token="secret", run="run", node="n0", limit=Limit(200 << 20))
        copies.set_peers((proxy.address,))
        seal(ring, 1)
        copies.look(chest)
        step = 1
        begin = time.monotonic()
        while not any(held(server, key.step) for key in server.memory.list()):
            assert time.monotonic() < begin + 20
            step += 1
            await asyncio.to_thread(seal, ring, step)
            copies.look(chest)
        assert "overwritten" in caplog.text
        await copies.close()
        lane.close()
        chest.unlink()


@contextlib.contextmanager
def started(code: str, *arguments: str):
    """A process, killed at the end."""
    process = subprocess.Popen([sys.executable, "-c", code, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()


def carried(incoming: Incoming, *words: bytes) -> None:
    """Let a connection say this to the receiving side."""
    near, far = socket.socketpair()
    with near, far:
        speaker = threading.Thread(target=lambda: (near.sendall(b"".join(words)), near.shutdown(socket.SHUT_WR)))
        speaker.start()
        try:
            incoming.carry(far)
        finally:
            speaker.join()


def several_tensors(path: Path, own: bytes) -> bytes:
    """A snapshot of large and small tensors, stamped."""
    sizes = (7, PIECE_BYTES + 1, 0, 130, 5 * PIECE_BYTES, 64, PIECE_BYTES, 0)
    described = Shared(tuple(Row(str(number), "uint8", (size,), (0,), (size,)) for number, size in enumerate(sizes))).encode()
    room = sum(padded(size) for size in sizes)
    slot = Slot(memory.create(str(path), slot_bytes(len(described), len(own), room)))
    view = slot.begin(run="run", rank=0, world_size=1, round=1, layout=described, own=own, payload_bytes=room)
    for (at, _), size in zip(decode(described).places(), sizes, strict=True):
        view[at : at + size] = content(1)[:size]
    slot.seal(1)
    spare = memoryview(bytearray(slot.num_bytes))
    return bytes(spare[: slot.stage(spare).num_bytes])


def test_pieces_in_any_order_give_the_digest_of_the_whole(tmp_path):
    end = struct.pack(">I", haul.END)
    for number, own in enumerate((b"own", bytes(PIECE_BYTES), bytes(3 * PIECE_BYTES + 7))):  # where the payload begins
        sealed = several_tensors(tmp_path / str(number), own)
        header, data = sealed[:HEADER_BYTES], sealed[HEADER_BYTES:]
        for seed in range(3):
            body = bytearray(len(data))
            incoming = Incoming(memoryview(body), header)
            for piece in random.Random(seed).sample(range(haul.piece_count(len(data))), haul.piece_count(len(data))):
                assert incoming.digest() is None
                carried(incoming, struct.pack(">I", piece), data[piece * PIECE_BYTES : (piece + 1) * PIECE_BYTES], end)
            assert body == data
            assert incoming.digest() == stamped_digest(header)


def test_a_damaged_layout_is_not_followed(tmp_path):
    """Whoever looks at all of it, afterwards, says what is wrong."""
    sealed = several_tensors(tmp_path / "slot", b"own")
    body = bytearray(len(sealed) - HEADER_BYTES)
    incoming = Incoming(memoryview(body), sealed[:HEADER_BYTES])
    for piece in range(haul.piece_count(len(body))):
        data = bytearray(sealed[HEADER_BYTES:][piece * PIECE_BYTES : (piece + 1) * PIECE_BYTES])
        data[3] ^= 1
        carried(incoming, struct.pack(">I", piece), bytes(data), struct.pack(">I", haul.END))
    assert incoming.missing() == 0
    assert incoming.digest() is None


def test_a_piece_that_is_there_or_cannot_be_is_refused_and_half_of_one_does_not_count():
    data, end = content(1), struct.pack(">I", haul.END)
    incoming = Incoming(memoryview(bytearray(len(data))), bytes(HEADER_BYTES))
    first = struct.pack(">I", 0) + data[:PIECE_BYTES]
    with pytest.raises(EOFError):
        carried(incoming, first[:-1])
    assert incoming.have() == ()
    carried(incoming, first, end)
    assert incoming.have() == (0,)
    for number in (0, haul.piece_count(len(data)), 1 << 31):
        with pytest.raises(ProtocolError, match="piece"):
            carried(incoming, struct.pack(">I", number), end)
    with pytest.raises(EOFError):
        carried(incoming)
    assert incoming.have() == (0,)


SENDER = """
import asyncio, sys
from resilient.checkpoint.haul import Limit
from resilient.checkpoint.peer import Peer
from resilient.checkpoint.ring import OwnSegment, Ring
from resilient.checkpoint.tier import SnapshotKey
address, *paths = sys.argv[1:]
async def main():
    peer = Peer(address, token="secret", run="run", name="sender", limit=Limit(100 << 20))
    print("ready", flush=True)
    await peer.put(SnapshotKey(0, 2), Ring.open(paths).get(2))
asyncio.run(main())
"""


async def test_a_sender_killed_in_the_middle_leaves_the_older_copy_whole(tmp_path):
    async with holder(tmp_path / "n1") as (server, proxy, peer):
        source = ring_at(tmp_path, "source")
        await peer.put(SnapshotKey(0, 1), seal(source, 1))
        slot = seal(source, 2)
        for _ in range(3):
            before = proxy.carried
            with started(SENDER, proxy.address, *(slot.path for slot in source.slots)) as sender:
                assert sender.stdout.readline() == b"ready\n"
                await until(lambda before=before: proxy.carried > before + 2 * PIECE_BYTES)
                sender.send_signal(signal.SIGKILL)
            await until(lambda: not server.memory.chest(0).filling.locked())
            assert held(server, 1)
            assert [key.step for key in server.memory.list()] == [1]
        await peer.put(SnapshotKey(0, 2), slot)
        assert held(server, 2)


HOLDER = """
import asyncio, sys
from pathlib import Path
from resilient.checkpoint import memory
from resilient_agents.vault import Vault
async def main():
    vault = Vault(run="run", directory=Path(sys.argv[1]), key=memory.new_key(), checkpoint_url="", checkpoint_every=0, token="secret", node="n2")
    print(await vault.start(), flush=True)
    await asyncio.to_thread(sys.stdin.read)
    await vault.close()
asyncio.run(main())
"""


async def test_a_receiver_that_stops_reading_holds_up_nobody(tmp_path):
    """One of two holders is stopped in the middle of a copy; everything goes on to the other one, of this rank and of the next."""
    directory = tmp_path / "n2"
    directory.mkdir()
    with started(HOLDER, str(directory)) as stopped:
        port = int(stopped.stdout.readline())
        async with holder(tmp_path / "n1") as (server, proxy, _):
            there = Proxy(port)
            words = {"checkpoint_url": "", "checkpoint_every": 0, "token": "secret", "node": "n0"}
            (tmp_path / "n0").mkdir()
            origin = Vault(run="run", directory=tmp_path / "n0", key=memory.new_key(), **words)
            await origin.start()
            rings = {}
            for rank in (0, 1):
                segments = origin.allocate(Layout(rank=rank, digest="", replicated=False, own_bytes=100, snapshot_bytes=SIZE))
                rings[rank] = Ring.open(segments.slots)
            origin.do(VaultDo(peers=(there.address, proxy.address), ranks=(0, 1)))
            seal(rings[0], 1)
            origin.poke()
            await until(lambda: there.carried > PIECE_BYTES, poke=origin.poke)
            stopped.send_signal(signal.SIGSTOP)
            begin = time.monotonic()
            seal(rings[0], 2)
            seal(rings[1], 2, rank=1)
            await until(lambda: held(server, 2) and held(server, 2, rank=1), poke=origin.poke)
            assert time.monotonic() - begin < transport.STALL_S
            there.close()
            await origin.close()


async def test_what_a_lost_holder_held_is_sent_to_the_next_one(tmp_path):
    """The holder's process is killed; the vault is told of another one, as after every loss, and brings it up to date by itself."""
    for name in ("n0", "n2"):
        (tmp_path / name).mkdir()
    words = {"checkpoint_url": "", "checkpoint_every": 0, "token": "secret", "node": "n0"}
    origin = Vault(run="run", directory=tmp_path / "n0", key=memory.new_key(), **words)
    await origin.start()
    rings = {}
    for rank in (0, 1):
        segments = origin.allocate(Layout(rank=rank, digest="", replicated=False, own_bytes=100, snapshot_bytes=SIZE))
        rings[rank] = Ring.open(segments.slots)
        seal(rings[rank], 3, rank)
    copied = {}
    origin.watch(lambda: None, copied=lambda rank: copied.update({rank: True}))
    with started(HOLDER, str(tmp_path / "n2")) as lost:
        address = f"127.0.0.1:{int(lost.stdout.readline())}"
        origin.do(VaultDo(peers=(address,), ranks=(0, 1)))
        await until(lambda: copied == {0: True, 1: True}, poke=origin.poke)
        lost.kill()
        lost.wait()
        async with holder(tmp_path / "n1") as (server, proxy, _):
            origin.do(VaultDo(peers=(proxy.address,), ranks=(0, 1)))  # nothing new has been sealed since
            await until(lambda: held(server, 3) and held(server, 3, rank=1), poke=origin.poke)
            await origin.close()


async def test_what_the_vault_sends_goes_on_after_a_cut(tmp_path):
    """Own state, which goes first at the next try, does not make the pieces forgotten."""
    (tmp_path / "n0").mkdir()
    origin = Vault(
        run="run", directory=tmp_path / "n0", key=memory.new_key(), checkpoint_url="", checkpoint_every=0, token="secret", node="n0"
    )
    await origin.start()
    segments = origin.allocate(Layout(rank=0, digest="", replicated=False, own_bytes=20_000, snapshot_bytes=SIZE))
    seal(Ring.open(segments.slots), 3)
    own = OwnSegment(segments.own, segments.own_bytes, run="run", rank=0)
    own.write_start(3, b"own" * 5000)
    async with holder(tmp_path / "n1") as (server, proxy, _):
        proxy.cut_at = int(0.6 * SIZE)
        origin.do(VaultDo(peers=(proxy.address,), ranks=(0,)))
        await until(lambda: server._broken, poke=origin.poke)
        came = len(server._broken[0, "snapshot"].incoming.have())
        own.write_start(4, b"own" * 5000)
        await until(lambda: held(server, 3), poke=origin.poke)
        assert server.memory.chest(0).own.start_step() == 4
        assert proxy.carried < 1.6 * SIZE - (came - 1) * PIECE_BYTES + LATE
        await origin.close()


@contextlib.asynccontextmanager
async def newcomer_at(directory: Path):
    """A vault that holds nothing yet."""
    directory.mkdir()  # noqa: ASYNC240 - nobody else is on this loop
    found = Vault(run="run", directory=directory, key=memory.new_key(), checkpoint_url="", checkpoint_every=0, token="secret", node="n0")
    found.memory = found._memory
    await found.start()
    yield found
    await found.close()


async def test_a_fetch_of_the_vault_goes_on_after_a_cut(tmp_path):
    async with holder(tmp_path / "n1") as (_, proxy, peer), newcomer_at(tmp_path / "n0") as newcomer:
        await peer.put(SnapshotKey(0, 1), seal(ring_at(tmp_path, "source"), 1))
        back = backwards(proxy)
        back.cut_at = int(0.6 * SIZE)
        wanted = Fetch(rank=0, step=1, tier="peer", source=back.address)
        newcomer.do(VaultDo(fetch=(wanted,), ranks=(0,)))
        await until(lambda: newcomer.known().fetched == (wanted,))
        assert back.cut_at == -1
        assert SIZE < back.carried < 1.5 * SIZE  # not all of it twice
        assert held(newcomer, 1)
        back.close()


@pytest.mark.parametrize("times", [1, 2])
async def test_what_arrives_damaged_is_fetched_once_more_and_then_refused(tmp_path, times):
    async with holder(tmp_path / "n1") as (server, proxy, peer), newcomer_at(tmp_path / "n0") as newcomer:
        await peer.put(SnapshotKey(0, 1), seal(ring_at(tmp_path, "source"), 1))
        back = backwards(proxy)
        if times == 1:
            back.flip_at = int(0.6 * SIZE)
        else:
            server.memory.slot(SnapshotKey(0, 1)).memory[SIZE // 2] ^= 4
        wanted = Fetch(rank=0, step=1, tier="peer", source=back.address)
        newcomer.do(VaultDo(fetch=(wanted,), ranks=(0,)))
        await until(lambda: newcomer.known().fetched or newcomer.known().refused)
        assert 2 * SIZE < back.carried < 2.1 * SIZE
        known = newcomer.known()
        if times == 1:
            assert (back.flip_at, known.fetched, known.refused) == (-1, (wanted,), ())
            assert held(newcomer, 1)
        else:
            (refused,) = known.refused
            assert (known.fetched, refused.damaged, refused.step) == ((), True, 1)
            assert newcomer.seals(0)[2] == ()
        back.close()
