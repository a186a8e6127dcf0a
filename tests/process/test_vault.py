"""The vault with real processes: writers killed anywhere, two nodes, storage that fails or hangs, a full memory."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import itertools
import logging
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import msgspec
import pytest
import uvloop
from resilient_agents import drain
from resilient_agents.drain import commit_s
from resilient_agents.inventory import FORSAKEN_STEPS
from resilient_agents.lane import Lane
from resilient_agents.vault import Vault

from resilient import checkpoint
from resilient.checkpoint import codec, hold, memory
from resilient.checkpoint.disk import DiskTier
from resilient.checkpoint.layout import Row, Twins
from resilient.checkpoint.peer import Peer
from resilient.checkpoint.ring import OwnSegment, Ring
from resilient.checkpoint.slot import Slot
from resilient.checkpoint.snapshot import slot_bytes
from resilient.checkpoint.tier import SnapshotKey
from resilient.core.machine import VaultDo
from resilient.core.messages import NONE, Fetch, Layout, Persisted, Recorded
from resilient.errors import SnapshotCorrupt, SnapshotMissing, TierUnavailable

pytestmark = pytest.mark.process

PAYLOAD = 4700 * 64

WRITER = """
import hashlib, sys
from resilient.checkpoint.ring import OwnSegment, Ring
own_path, own_bytes, payload, *slots = sys.argv[1:]
own = OwnSegment(own_path, int(own_bytes), run="run", rank=0)
ring = Ring.open(slots)
step = max(own.start_step(), ring.newest_step()) + 1
print("ready", flush=True)
while True:
    seed = hashlib.sha256(b"%d" % step).digest()
    own.write_start(step, seed * 500)
    own.write_gate(step + 1, seed * 500)
    view = ring.begin(run="run", rank=0, world_size=1, round=1, layout=b"", own=seed, payload_bytes=int(payload))
    for start in range(0, len(view), 50_000):
        view[start:start + 50_000] = (seed * 1563)[:len(view[start:start + 50_000])]
    ring.seal(step)
    step += 1
"""


def seed(step: int) -> bytes:
    return hashlib.sha256(b"%d" % step).digest()


def right(payload: memoryview, step: int) -> bool:
    piece = (seed(step) * 1563)[:50_000]
    return all(payload[start : start + 50_000] == piece[: len(payload[start : start + 50_000])] for start in range(0, len(payload), 50_000))


def layout(rank: int = 0, *, replicated: bool = False, payload: int = PAYLOAD, often: bool = False) -> Layout:
    room = slot_bytes(200, 100, payload)
    return Layout(rank=rank, digest="", replicated=replicated, own_bytes=20_000, snapshot_bytes=room, often=often)


def described(rank: int) -> bytes:
    """What a snapshot says of its payload."""
    return checkpoint.layout.Layout((Row("model.w", "uint8", (PAYLOAD,), (0,), (PAYLOAD,)),), Twins(rank)).encode()


async def until(condition, timeout_s: float = 15.0, poke=lambda: None):
    """Wait for a condition of the outside world; fails if it does not come about."""
    deadline = time.monotonic() + timeout_s
    while not (found := condition()):
        assert time.monotonic() < deadline, "it did not come about"
        poke()
        await asyncio.sleep(0.01)
    return found


@contextlib.asynccontextmanager
async def vault(directory: Path, *, url: str = "", every: int = 10, token: str = "secret", **words):
    """A started vault; nothing of it is left afterwards."""
    directory.mkdir(exist_ok=True)  # noqa: ASYNC240 - nobody else is on this loop
    found = Vault(
        run="run",
        directory=directory,
        key=memory.new_key(),
        checkpoint_url=url,
        checkpoint_every=every,
        token=token,
        node=directory.name,
        **words,
    )
    found.port = await found.start()
    found.address = f"127.0.0.1:{found.port}"
    try:
        yield found
    finally:
        await found.close(unlink=True)
        assert list(directory.glob("resilient.*")) == []  # noqa: ASYNC240


class Worker:
    """What a chair's worker does with its segments."""

    def __init__(self, keeper: Vault, wanted: Layout) -> None:
        self.rank = wanted.rank
        self.segments = keeper.allocate(wanted)
        assert not self.segments.error
        self.own = OwnSegment(self.segments.own, self.segments.own_bytes, run="run", rank=wanted.rank)
        self.ring = Ring.open(self.segments.slots)

    def step(self, step: int, *, snapshot: bool = True) -> None:
        self.own.write_start(step, seed(step))
        self.own.write_gate(step + 1, seed(step + 1))
        if snapshot:
            self.snapshot(step)

    def snapshot(self, step: int, world_size: int = 1) -> None:
        own = codec.encode({"seed": seed(step)})
        view = self.ring.begin(
            run="run", rank=self.rank, world_size=world_size, round=1, layout=described(self.rank), own=own, payload_bytes=PAYLOAD
        )
        for start in range(0, len(view), 50_000):
            view[start : start + 50_000] = (seed(step) * 1563)[: len(view[start : start + 50_000])]
        self.ring.seal(step)


# --------------------------------------------------------------------------- a writer that is killed


async def test_a_writer_killed_anywhere_leaves_only_whole_snapshots(tmp_path):
    """SIGKILL at random moments, mostly within begin..seal; its successors go on in the same segments; the reader checks all."""
    number = random.SystemRandom().randrange(1 << 30)
    print(f"seed {number}")
    dice = random.Random(number)
    torn = 0
    async with vault(tmp_path / "shm") as keeper:
        s = keeper.allocate(layout())
        command = [sys.executable, "-c", WRITER, s.own, str(s.own_bytes), str(PAYLOAD), *s.slots]
        for _ in range(12):
            with killed(command):
                end = time.monotonic() + dice.uniform(0.005, 0.08)
                while time.monotonic() < end:  # a reader beside the living writer
                    check(keeper, living=True)
                    await asyncio.sleep(0)
            before = keeper.all_seals()[0]
            check(keeper, living=False)
            assert len(before.snapshots) >= 1
            assert len(before.own_steps) >= 1
            torn += len(before.snapshots) < 2
        assert keeper.seals(0)[0] > 12  # they did write
    print(f"{torn} of 12 killed within a snapshot")


@contextlib.contextmanager
def killed(command: list[str]):
    """A process that says "ready", and is killed at the end."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    try:
        assert process.stdout.readline() == b"ready\n"
        yield process
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()


def check(keeper: Vault, *, living: bool) -> None:
    """Everything that claims to be sealed is right."""
    seals = keeper.all_seals()[0]
    own = OwnSegment(seals.own, seals.own_bytes, run="run", rank=0, writable=False)
    gone = SnapshotMissing if living else ()  # a living writer may overwrite it meanwhile; a dead one may not
    for step in seals.own_steps:
        with contextlib.suppress(gone):
            assert own.read_start(step) == seed(step) * 500
    if seals.gate_step != NONE:
        with contextlib.suppress(gone):
            assert own.read_gate(seals.gate_step) == seed(seals.gate_step - 1) * 500
    own.close()
    for step, path in seals.snapshots.items():
        slot = Slot(path, writable=False)
        with contextlib.suppress(gone):
            found = slot.read(run="run", rank=0)
            if not living:
                assert found.step == step
            fine = found.own == seed(found.step) and right(found.payload, found.step)
            assert fine or (living and slot.sealed_step() != found.step)
            del found
        slot.close()


# --------------------------------------------------------------------------- two nodes


async def test_a_lost_nodes_rank_is_found_at_its_peer(tmp_path):
    async with vault(tmp_path / "n1") as holder, vault(tmp_path / "n2") as newcomer:
        async with vault(tmp_path / "n0") as lost:
            worker = Worker(lost, layout(3))
            lost.do(VaultDo(peers=(holder.address,), world_size=4, ranks=(3,)))
            notes = [Recorded(rank=3, index=i, key="broadcast", payload=b"x" * i) for i in range(3)]
            for note in notes:
                lost.keep(note)
            for step in range(8):
                worker.step(step)
                lost.all_seals()
                await asyncio.sleep(0.005)
            held = await until(
                lambda: next((h for h in holder.known().holdings if h.own_step == 7 and 7 in h.snapshots and h.gate_step == 8), None),
                poke=lost.poke,
            )
            assert held.rank == 3
        heard = []
        newcomer.watch(lambda: None, heard.append)
        wanted = Fetch(rank=3, step=7, tier="peer", source=holder.address)
        newcomer.do(VaultDo(fetch=(wanted,), ranks=(3,)))
        newcomer.do(VaultDo(fetch=(wanted,), ranks=(3,)))  # said twice, done once
        await until(lambda: newcomer.known().fetched == (wanted,))
        assert heard == notes
        assert newcomer.seals(3) == (7, 8, (7,))
        assert newcomer.known().holdings == ()
        slot = Slot(newcomer.snapshot_path(3, 7), writable=False)
        found = slot.read(run="run", rank=3, step=7, stamped=True)
        assert right(found.payload, 7)
        del found
        slot.close()
        path, own_bytes = newcomer.own_segment(3)
        own = OwnSegment(path, own_bytes, rank=3, writable=False)
        assert (own.read_start(7), own.read_gate(8)) == (seed(7), seed(8))
        successor = Worker(newcomer, layout(3))  # takes over what was fetched, in segments of the right size
        assert (successor.own.read_start(7), successor.own.read_gate(8)) == (seed(7), seed(8))
        successor.step(8)
        assert newcomer.seals(3) == (8, 9, (7, 8))


def test_the_same_on_the_loop_that_resilient_run_uses(tmp_path, caplog):
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(test_a_lost_nodes_rank_is_found_at_its_peer(tmp_path))
        runner.run(test_garbage_on_the_port_costs_one_line_each(tmp_path, caplog))


async def test_a_chair_that_moves_to_the_node_that_holds_its_copies(tmp_path):
    async with vault(tmp_path / "n1") as holder, vault(tmp_path / "n0") as origin:
        worker = Worker(origin, layout(0))
        origin.do(VaultDo(peers=(holder.address,), ranks=(0,)))
        worker.step(5)
        await until(lambda: holder.seals(0) == (5, 6, (5,)), poke=origin.poke)
        wanted = Fetch(rank=0, step=5, tier="peer", source=holder.address)
        holder.do(VaultDo(fetch=(wanted,), ranks=(0,)))
        await until(lambda: holder.known().fetched == (wanted,))
        assert holder.known().holdings == ()
        successor = Worker(holder, layout(0))
        assert successor.own.read_start(5) == seed(5)
        worker.step(6)  # the old node does not know yet: its copies are no longer taken
        origin.poke()
        await asyncio.sleep(0.1)
        assert holder.seals(0) == (5, 6, (5,))


async def test_state_that_others_hold_anyway_is_not_copied(tmp_path):
    async with vault(tmp_path / "n1") as holder, vault(tmp_path / "n0") as origin:
        worker = Worker(origin, layout(0, replicated=True))
        origin.do(VaultDo(peers=(holder.address,), ranks=(0,)))
        worker.step(5)
        await until(lambda: holder.seals(0)[:2] == (5, 6), poke=origin.poke)
        origin.poke()
        await asyncio.sleep(0.1)
        assert holder.seals(0)[2] == ()


async def test_a_writer_faster_than_the_network_never_tears_a_copy(tmp_path):
    async with vault(tmp_path / "n1") as holder, vault(tmp_path / "n0") as origin:
        s = origin.allocate(layout())
        origin.do(VaultDo(peers=(holder.address,), ranks=(0,)))
        seen = set()

        def copied() -> bool:
            for path in holder.all_seals()[0].snapshots.values() if 0 in holder.all_seals() else ():
                slot = Slot(path, writable=False)
                with contextlib.suppress(SnapshotMissing):
                    found = slot.read(stamped=True)  # verifies every digest
                    assert right(found.payload, found.step) or slot.sealed_step() != found.step
                    seen.add(found.step)
                    del found
                slot.close()
            return len(seen) > 5

        with killed([sys.executable, "-c", WRITER, s.own, str(s.own_bytes), str(PAYLOAD), *s.slots]):
            await until(copied, poke=origin.poke)
        assert origin.known().refused == ()


async def test_copies_that_are_no_longer_sent_give_their_memory_back(tmp_path):
    """Rank 0's node has another holder now. As long as its last copies could serve they stay."""
    async with vault(tmp_path / "n1") as holder, vault(tmp_path / "n2") as other, vault(tmp_path / "n0") as origin:
        worker, neighbour = Worker(origin, layout(0)), Worker(holder, layout(1))
        origin.do(VaultDo(peers=(holder.address,), ranks=(0,)))
        holder.do(VaultDo(ranks=(1,)))
        worker.step(5)
        await until(lambda: holder.seals(0) == (5, 6, (5,)), poke=origin.poke)
        origin.do(VaultDo(peers=(other.address,), ranks=(0,)))
        for step in (5, 6, 6 + FORSAKEN_STEPS):
            neighbour.step(step)
            holder.poke()
            assert holder.seals(0) == (5, 6, (5,))
        neighbour.step(20 + FORSAKEN_STEPS)
        holder.poke()
        assert [h.rank for h in holder.known().holdings] == []
        assert list((tmp_path / "n1").glob("*.rank-0.*")) == []
        origin.do(VaultDo(peers=(holder.address,), ranks=(0,)))  # and it can come again
        worker.step(8 + FORSAKEN_STEPS)
        await until(lambda: holder.seals(0)[0] == 8 + FORSAKEN_STEPS, poke=origin.poke)


async def test_it_listens_at_the_address_it_was_given_and_nowhere_else(tmp_path):
    async with vault(tmp_path / "n1", host="127.0.0.2", bind="127.0.0.2") as holder, vault(tmp_path / "n0") as origin:
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", holder.port))
        worker = Worker(origin, layout(0))
        origin.do(VaultDo(peers=(f"127.0.0.2:{holder.port}",), ranks=(0,)))
        worker.step(5)
        await until(lambda: holder.seals(0) == (5, 6, (5,)), poke=origin.poke)


async def test_what_changes_faster_than_it_travels_keeps_nothing_else_back(tmp_path, monkeypatch):
    async with vault(tmp_path / "n1") as holder, vault(tmp_path / "n0") as origin:
        worker = Worker(origin, layout(0))
        origin.do(VaultDo(peers=(holder.address,), ranks=(0,)))
        steps, real = itertools.count(6), Peer.put

        async def put(*args, **more) -> None:
            await real(*args, **more)
            worker.step(next(steps))  # whenever something has arrived there is a newer one already, of every kind

        monkeypatch.setattr(Peer, "put", put)
        worker.step(5)
        for _ in range(3):
            start, gate, snapshots = holder.seals(0)
            before = start, gate, max(snapshots, default=NONE)

            def all_newer(before=before) -> bool:
                start, gate, snapshots = holder.seals(0)
                return all(now > then for now, then in zip((start, gate, max(snapshots, default=NONE)), before, strict=True))

            await until(all_newer, poke=origin.poke)


async def test_a_peer_that_does_not_answer_costs_a_warning_and_recovers(tmp_path, caplog):
    with socket.create_server(("127.0.0.1", 0)) as closed:
        address = f"127.0.0.1:{closed.getsockname()[1]}"
    async with vault(tmp_path / "n1") as holder, vault(tmp_path / "n0") as origin:
        worker = Worker(origin, layout(0))
        origin.do(VaultDo(peers=(address, holder.address), ranks=(0,)))
        worker.step(5)
        await until(lambda: holder.seals(0) == (5, 6, (5,)), poke=origin.poke)
    assert len([r for r in caplog.records if r.levelno >= logging.WARNING]) == 1
    assert f"copies to {address} wait" in caplog.text


async def test_nothing_to_be_fetched(tmp_path, monkeypatch):
    monkeypatch.setattr("resilient_agents.vault.FETCH_PATIENCE_S", 0.3)
    async with vault(tmp_path / "n1") as holder, vault(tmp_path / "n0") as keeper:
        empty = Fetch(rank=3, step=7, tier="peer", source=holder.address)
        gone = Fetch(rank=4, step=7, tier="peer", source="127.0.0.1:1")
        no_url = Fetch(rank=5, step=7, tier="persistent")
        keeper.do(VaultDo(fetch=(empty, gone, no_url), ranks=(3, 4, 5)))
        refused = await until(lambda: len(keeper.known().refused) == 3 and keeper.known().refused)
        assert {r.rank: r.tier for r in refused} == {3: "peer", 4: "peer", 5: "persistent"}
        assert {r.rank: r.reason for r in refused}[3] == f"rank 3 step 7: nothing of it at {holder.address}"
        assert keeper.known().fetched == ()


async def test_a_start_of_the_step_before_is_enough_and_notes_come_in_any_case(tmp_path):
    """A node that dies in a gate leaves no copy of the gate; its ranks' newcomers repeat the step, and ask for the minutes."""
    told = []
    async with vault(tmp_path / "n1") as holder, vault(tmp_path / "n0") as origin:
        worker = Worker(origin, layout(0, replicated=True))
        origin.do(VaultDo(peers=(holder.address,), ranks=(0,)))
        origin.keep(Recorded(rank=0, index=0, key="seed", payload=b"1"))
        worker.own.write_start(20, seed(20))
        await until(lambda: any(h.own_steps == (20,) for h in holder.known().holdings), poke=origin.poke)
        await until(lambda: holder._notes.of(0))
        holder.watch(lambda: None, told.append)
        repeated, never = (Fetch(rank=0, step=step, tier="peer", source=holder.address, round=step) for step in (21, 30))
        holder.do(VaultDo(fetch=(repeated,), ranks=(0,)))
        await until(lambda: holder.known().fetched == (repeated,))
        assert [note.index for note in told] == [0]
        holder.do(VaultDo(fetch=(never,), ranks=(0,)))
        await until(lambda: holder.known().refused)
        assert [note.index for note in told] == [0, 0]


async def test_garbage_on_the_port_costs_one_line_each(tmp_path, caplog):
    async with vault(tmp_path / "n0") as keeper:
        worker = Worker(keeper, layout(0))
        worker.step(5)
        for garbage in (b"GET / HTTP/1.1\r\n\r\n", os.urandom(2000), b"\xff" * 100, b"", b"\0\0\0\5hello"):
            with socket.create_connection(("127.0.0.1", keeper.port)) as connection:
                connection.sendall(garbage)
                connection.shutdown(socket.SHUT_WR)
                connection.settimeout(10)
                answer = b"?"
                with contextlib.suppress(ConnectionResetError):
                    while answer:
                        answer = await asyncio.to_thread(connection.recv, 4096)
        await asyncio.sleep(0.05)
        lines = [record for record in caplog.records if record.levelno >= logging.WARNING]
        assert 4 <= len(lines) <= 5
        assert all(record.exc_info is None for record in lines)
        assert keeper.seals(0) == (5, 6, (5,))


# --------------------------------------------------------------------------- the persistent tier


async def committed(tmp_path: Path, url: str, *steps: int, ranks=(0, 1)) -> None:
    """Two ranks run, their checkpoints are committed, everything dies."""
    async with vault(tmp_path / "shm", url=url) as keeper:
        workers = [Worker(keeper, layout(rank)) for rank in ranks]
        for step in steps:
            for worker in workers:
                worker.own.write_start(step, seed(step))
                worker.snapshot(step, len(ranks))
            parts = await until(
                lambda step=step: len(p := [p for p in keeper.known().persisted if p.step == step]) == len(ranks) and p, poke=keeper.poke
            )
            keeper.do(VaultDo(commit=step, manifest=tuple(parts), ranks=ranks, world_size=len(ranks)))
            await until(lambda step=step: keeper.known().committed == step)
            assert keeper.known().persisted == ()
        assert await keeper.settle(10)


async def test_a_later_run_goes_on_from_the_newest_checkpoint(tmp_path):
    url = f"file://{tmp_path}/checkpoints"
    await committed(tmp_path, url, 10, 20, 30, 40)
    async with vault(tmp_path / "shm", url=url) as keeper:
        await until(lambda: keeper.known().available == (20, 30, 40))  # three are kept
        wanted = tuple(Fetch(rank=rank, step=40, tier="persistent") for rank in (0, 1))
        keeper.do(VaultDo(fetch=wanted, ranks=(0, 1), world_size=2))
        await until(lambda: set(keeper.known().fetched) == set(wanted))
        for rank in (0, 1):
            worker = Worker(keeper, layout(rank))  # segments of the right size beside what was fetched
            assert keeper.seals(rank)[2] == (40,)
            slot = Slot(keeper.snapshot_path(rank, 40), writable=False)
            found = slot.read(rank=rank, step=40, stamped=True)
            assert right(found.payload, 40)
            del found
            slot.close()
            for step in range(40, 44):
                worker.step(step)
                keeper.poke()
            assert keeper.seals(rank)[2] == (42, 43)  # the fetched one has done its work
        assert list((tmp_path / "shm").glob("*.fetched")) == []
        assert keeper.known().persisted == ()  # step 40 was there already


async def test_a_damaged_checkpoint_is_refused_by_name_and_written_anew_later(tmp_path, caplog):
    url = str(tmp_path / "checkpoints")
    await committed(tmp_path, url, 10, 20)
    path = tmp_path / "checkpoints/step-00000020/rank-00001.distcp"
    data = bytearray(path.read_bytes())
    data[200_000] ^= 4
    path.write_bytes(data)
    async with vault(tmp_path / "shm", url=url) as keeper:
        wanted = tuple(Fetch(rank=rank, step=20, tier="persistent") for rank in (0, 1))
        keeper.do(VaultDo(fetch=wanted, ranks=(0, 1), world_size=2))
        refused = await until(lambda: keeper.known().refused)
        assert [(r.tier, r.step, r.rank) for r in refused] == [("persistent", 20, 1)]
        assert str(path) in refused[0].reason
        assert keeper.snapshot_path(1, 20) == ""
        older = tuple(Fetch(rank=rank, step=10, tier="persistent") for rank in (0, 1))
        keeper.do(VaultDo(fetch=older, ranks=(0, 1), world_size=2))
        await until(lambda: set(keeper.known().fetched) == set(older))
        workers = [Worker(keeper, layout(rank)) for rank in (0, 1)]
        for worker in workers:
            worker.snapshot(20, 2)
        parts = await until(lambda: len(keeper.known().persisted) == 2 and keeper.known().persisted, poke=keeper.poke)
        assert DiskTier(url).steps() == (10,)
        keeper.do(VaultDo(commit=20, manifest=parts, ranks=(0, 1), world_size=2))
        await until(lambda: keeper.known().committed == 20)
    tier = DiskTier(url)
    for rank in (0, 1):
        tier.get(SnapshotKey(rank, 20), bytearray(2 * PAYLOAD))


async def test_a_checkpoint_of_another_world_size_is_cut_to_what_a_rank_tracks(tmp_path):
    url = str(tmp_path / "checkpoints")
    await committed(tmp_path, url, 10)
    rows = checkpoint.layout.Layout((Row("model.w", "uint8", (PAYLOAD,), (64,), (640,)),))
    other = checkpoint.layout.Layout((Row("model.v", "uint8", (PAYLOAD,), (0,), (640,)),))
    async with vault(tmp_path / "shm", url=url) as keeper:
        wanted = Fetch(rank=3, step=10, tier="persistent")
        keeper.do(VaultDo(fetch=(wanted,), ranks=(3,), world_size=4))
        await until(lambda: keeper.known().fetched == (wanted,))
        assert keeper.snapshot_path(3, 10) == "", "what it needs of it is not known yet"
        ask = msgspec.structs.replace(layout(3), reshape=10, rows=rows.encode(), world_size=4)
        found = await keeper.reshape(msgspec.structs.replace(ask, rows=other.encode()))
        assert found.refused == "model.w: it is in the checkpoint, and not tracked here"
        found = await keeper.reshape(ask)
        assert (found.refused, found.error, found.own_of) == ("", "", 1)
        slot = Slot(keeper.snapshot_path(3, 10), writable=False)
        sealed = slot.read(rank=3, step=10)
        assert bytes(sealed.payload) == (seed(10) * 30)[64:704]
        assert (sealed.world_size, codec.decode(sealed.own)) == (4, {"seed": seed(10)})
        del sealed
        slot.close()
        keeper.poke()
        await asyncio.sleep(0.2)
    assert DiskTier(url).manifest(10).world_size == 2, "it was not written over"


async def test_everything_killed_while_a_checkpoint_is_written(tmp_path):
    """No commit, so it is not there; what is left of it goes with the next commit after it."""
    url = str(tmp_path / "checkpoints")
    await committed(tmp_path, url, 10)
    (tmp_path / "checkpoints/step-00000020").mkdir()
    (tmp_path / "checkpoints/step-00000020/rank-00000.distcp.77.part").write_bytes(b"half")
    async with vault(tmp_path / "shm", url=url) as keeper:
        await until(lambda: keeper.known().available == (10,))
    await committed(tmp_path, url, 30)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-00000010", "step-00000030"]


async def test_storage_that_fails_is_tried_again(tmp_path, caplog):
    url = str(tmp_path / "checkpoints")
    async with vault(tmp_path / "shm", url=url) as keeper:
        (tmp_path / "checkpoints").touch()  # a file where the directory should be
        worker = Worker(keeper, layout(0))
        worker.snapshot(10)
        await until(lambda: "rank 0 is missing in a checkpoint" in caplog.text, poke=keeper.poke)
        (tmp_path / "checkpoints").unlink()
        worker.snapshot(20)
        parts = await until(lambda: keeper.known().persisted, poke=keeper.poke)
        assert [part.step for part in parts] == [20]


async def test_storage_that_hangs_holds_up_nothing(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(drain, "ANSWER_S", 0.2)
    release = threading.Event()
    monkeypatch.setattr(DiskTier, "write", lambda *_, **__: release.wait(30))
    async with vault(tmp_path / "shm", url=str(tmp_path / "checkpoints")) as keeper:
        worker = Worker(keeper, layout(0))
        worker.snapshot(10)
        await until(lambda: "no end after" in caplog.text, poke=keeper.poke)
        begin = time.monotonic()
    assert time.monotonic() - begin < 2
    release.set()


async def test_a_writer_is_never_held_up_by_storage_and_is_copied_from_then_on(tmp_path, caplog, monkeypatch):
    gate = threading.Event()
    real = DiskTier.write
    monkeypatch.setattr(DiskTier, "write", lambda *args, **words: (gate.wait(30), real(*args, **words))[1])
    async with vault(tmp_path / "shm", url=str(tmp_path / "checkpoints")) as keeper:
        worker = Worker(keeper, layout(0))
        worker.snapshot(10)
        keeper.poke()
        await asyncio.sleep(0.1)
        begin = time.monotonic()
        worker.snapshot(11)
        worker.snapshot(12)
        assert time.monotonic() - begin < hold.PATIENCE_S
        gate.set()
        await until(lambda: "rank 0 left out of a checkpoint" in caplog.text)
        gate.clear()
        worker.snapshot(20)
        keeper.poke()
        await asyncio.sleep(0.1)
        worker.snapshot(21)
        worker.snapshot(22)
        gate.set()
        await until(lambda: [part.step for part in keeper.known().persisted] == [20])


async def test_slow_storage_leaves_some_out(tmp_path, caplog, monkeypatch):
    gate = threading.Event()
    real = DiskTier.write
    monkeypatch.setattr(DiskTier, "write", lambda *args, **words: (gate.wait(30), real(*args, **words))[1])
    async with vault(tmp_path / "shm", url=str(tmp_path / "checkpoints")) as keeper:
        worker = Worker(keeper, layout(0, often=True))
        for step in (10, 20, 30):
            worker.snapshot(step)
            keeper.poke()
            await asyncio.sleep(0.1)
        assert "checkpoint of step 30 left out for rank 0" in caplog.text
        gate.set()
        await until(lambda: [part.step for part in keeper.known().persisted] == [10, 20])


def test_a_commit_is_given_time_for_its_index():
    """50,000 parameters with AdamW: the index took 76 s on a busy machine, and a minute was all it had, again and again."""
    assert commit_s([Persisted(rank=0, step=1, num_bytes=160_000_000, tail_at=135_000_000)]) > 300


# --------------------------------------------------------------------------- memory


async def test_memory_that_is_full_is_said_to_the_worker(small):
    async with vault(small) as keeper:
        worker = Worker(keeper, layout(0))
        worker.step(1)
        keeper.do(VaultDo(ranks=(0, 1)))
        segments = keeper.allocate(layout(1, payload=2_000_000))
        assert "bytes wanted" in segments.error
        assert "--memory-dir" in segments.error
        assert re.search(r"for all ranks of this node, 2, about 8\d{6} bytes are needed", segments.error)
        segments = keeper.allocate(layout(0, payload=2_000_000))  # and what was there is still there
        assert "bytes wanted" in segments.error
        assert keeper.seals(0) == (1, 2, (1,))
        worker.step(2)
        assert keeper.seals(0) == (2, 3, (1, 2))


async def test_segments_of_a_dead_agent_are_removed_at_the_next_start(tmp_path):
    code = """
import asyncio, os, sys
from pathlib import Path
from resilient import checkpoint
from resilient.checkpoint import codec, hold, memory
from resilient.core.messages import Layout
from resilient_agents.vault import Vault
async def main():
    vault = Vault(run="run", directory=Path(sys.argv[1]), key=memory.new_key(), checkpoint_url="", checkpoint_every=0, token="t", node="n0")
    await vault.start()
    vault.allocate(Layout(rank=0, digest="", replicated=False, own_bytes=100, snapshot_bytes=10_000))
    print("ready", flush=True)
    await asyncio.sleep(60)
asyncio.run(main())
"""
    directory = tmp_path / "shm"
    directory.mkdir()
    with killed([sys.executable, "-c", code, str(directory)]):
        assert len(list(directory.glob("resilient.*"))) == 4
    assert len(list(directory.glob("resilient.*"))) == 4
    async with vault(directory) as keeper:
        assert len(list(directory.glob("resilient.*"))) == 1
        assert keeper.all_seals() == {}


async def test_damage_in_memory_is_seen_before_it_is_used(tmp_path):
    async with vault(tmp_path / "n1") as holder, vault(tmp_path / "n0") as keeper:
        worker = Worker(keeper, layout(0))
        worker.snapshot(5)
        slot = Slot(keeper.snapshot_path(0, 5))
        await until(slot.is_stamped, poke=keeper.poke)
        slot._memory[slot.sealed_bytes() - 5] ^= 1
        with pytest.raises(SnapshotCorrupt):
            slot.read()
        keeper.do(VaultDo(peers=(holder.address,), ranks=(0,)))
        keeper.poke()
        await asyncio.sleep(0.2)
        assert holder.seals(0)[2] == ()
        slot.close()


# --------------------------------------------------------------------------- lanes


async def test_a_lane_gives_results_and_errors_back():
    lane = Lane("test")
    assert await lane.run(lambda: 6 * 7, deadline_s=10) == 42
    with pytest.raises(ZeroDivisionError):
        await lane.run(lambda: 1 // 0, deadline_s=10)
    with pytest.raises(TimeoutError, match="its own"):
        await lane.run(lambda: (_ for _ in ()).throw(TimeoutError("its own")), deadline_s=10)
    lane.close()


async def test_a_lane_replaces_threads_that_hang_and_ends_at_four():
    lane = Lane("test")
    release = threading.Event()
    for _ in range(4):
        with pytest.raises(TierUnavailable, match="no end after"):
            await lane.run(lambda: release.wait(30), deadline_s=0.02)
        if len(lane._lost) < 4:
            assert await lane.run(lambda: "still here", deadline_s=10) == "still here"
    with pytest.raises(TierUnavailable, match="4 operations hang"):
        await lane.run(lambda: None, deadline_s=10)
    release.set()
    await until(lambda: not lane._lost)
    assert await lane.run(lambda: "again", deadline_s=10) == "again"
    lane.close()
    lane.join(5)


async def test_a_lane_has_a_limit():
    lane = Lane("test", queue_max=1)
    release = threading.Event()
    first = asyncio.create_task(lane.run(lambda: release.wait(30), deadline_s=30))
    await until(lambda: lane._alive and lane._waiting.empty())
    second = asyncio.create_task(lane.run(lambda: "second", deadline_s=30))
    await until(lambda: not lane._waiting.empty())
    with pytest.raises(TierUnavailable, match="1 operations wait"):
        await lane.run(lambda: None, deadline_s=1)
    release.set()
    assert (await first, await second) == (True, "second")
    lane.close()
