"""Bytes that are damaged on their way between two vaults: nothing wrong is kept, nothing wrong is fetched, and the next try goes through.

Every trial has a wire of its own that spoils one place of one direction: of the handshake, of a word, of own state, of a haul. Positions
come from a printed seed (CHAOS_SEED=n repeats them).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import pathlib
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
import sealing
import tally
from test_vault import vault

from resilient.checkpoint import pipe, transport
from resilient.checkpoint.peer import Peer
from resilient.checkpoint.tier import SnapshotKey
from resilient.core.messages import Recorded
from resilient.errors import CheckpointError, SnapshotCorrupt, TierUnavailable

pytestmark = pytest.mark.process
BODY = 1_300_000  # more than what goes over one connection
AT_ONCE = 24
TRIALS = [pytest.param(1, id="some"), pytest.param(50, id="many", marks=[pytest.mark.long, pytest.mark.timeout(900)])]
Deed = Callable[[bytes, int, random.Random], bytes | None]


def flipped(data: bytes, at: int, dice: random.Random) -> bytes:
    return data[:at] + bytes([data[at] ^ dice.randrange(1, 256)]) + data[at + 1 :]


def repeated(data: bytes, at: int, dice: random.Random) -> bytes:
    return data[:at] + data[max(0, at - dice.randrange(1, 2000)) :]


def exchanged(data: bytes, at: int, dice: random.Random) -> bytes:
    size = min(dice.randrange(1, 2000), len(data) - at, at)
    return data[: at - size] + data[at : at + size] + data[at - size : at] + data[at + size :]


def blanked(data: bytes, at: int, dice: random.Random) -> bytes:
    size = min(dice.choice((16, 4096)), len(data) - at)
    return data[:at] + bytes(size) + data[at + size :]


def lost(data: bytes, at: int, dice: random.Random) -> bytes:
    return data[:at] + data[at + dice.randrange(1, 2000) :]


def cut(_data: bytes, _at: int, _dice: random.Random) -> None:
    return None


DEEDS: dict[str, Deed] = {
    "a byte flipped": flipped,
    "bytes twice": repeated,
    "bytes exchanged": exchanged,
    "zeros": blanked,
    "bytes lost": lost,
    "cut": cut,
}


class Wire:
    """Between a peer and a vault. Spoils what comes `at` so many bytes after the begin, of one direction."""

    def __init__(self, port: int, deed: Deed, *, at: int, back: bool, dice: random.Random) -> None:
        self._port, self._deed, self._at, self._back, self._dice = port, deed, at, back, dice
        self.done = False
        self.carried = {False: 0, True: 0}
        self._writers: set[asyncio.StreamWriter] = set()

    async def start(self) -> str:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        return f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def close(self) -> None:
        self._server.close()
        for writer in self._writers:
            writer.transport.abort()

    async def _accept(self, near: asyncio.StreamReader, back: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            far, forth = await asyncio.open_connection("127.0.0.1", self._port)
            self._writers |= {back, forth}
            await asyncio.gather(self._carry(near, forth, back, back=False), self._carry(far, back, forth, back=True))

    async def _carry(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, other: asyncio.StreamWriter, *, back: bool) -> None:
        try:
            while data := await source.read(1 << 16):
                begin = self.carried[back]
                self.carried[back] += len(data)
                spoilt: bytes | None = data
                if not self.done and back == self._back and begin <= self._at < begin + len(data):
                    self.done = True
                    spoilt = self._deed(data, self._at - begin, self._dice)
                if spoilt is None:
                    break
                sink.write(spoilt)
                await sink.drain()
        except OSError:
            pass
        finally:
            for writer in (sink, other):
                writer.close()


class Trial:
    """One rank's copies: put, listed, and fetched again, over one wire."""

    def __init__(self, where: pathlib.Path, rank: int) -> None:
        make = lambda step, payload: sealing.sealed(where, rank, step, payload, world_size=1 << 12)  # noqa: E731
        noise = random.Random(rank)
        self.rank = rank
        self.note = Recorded(rank=rank, index=0, key="all_reduce", payload=noise.randbytes(3000))
        self.copies = {
            SnapshotKey(rank, 1, "start"): make(1, b""),
            SnapshotKey(rank, 1): make(1, noise.randbytes(BODY)),
            SnapshotKey(rank, 2): make(2, noise.randbytes(BODY)),
        }

    async def put(self, peer: Peer) -> None:
        await peer.leave_note(self.note)
        for key, copy in self.copies.items():
            await peer.put(key, copy)

    async def fetched(self, peer: Peer) -> bool:
        """Whether all that comes is what was put."""
        notes = await peer.notes(self.rank)
        keys = {key for key in await peer.list() if key.rank == self.rank}
        sound = notes in ((), (self.note,)) and keys <= set(self.copies)
        for key in sorted(keys):
            into = bytearray(2 * BODY)
            count = await peer.get(key, into)
            sound = sound and into[:count] == self.copies[key]
        return sound


@contextlib.asynccontextmanager
async def calling(address: str) -> AsyncIterator[Peer]:
    peer = Peer(address, token="secret", run="run", name="test")
    try:
        yield peer
    finally:
        peer.close()


async def patiently(work: Callable[[], Awaitable[None]]) -> None:
    """As whoever sends copies does: tried again while the other side still waits for the rest of what was damaged, and all of it anew where
    one that was broken off had damaged pieces."""
    until = time.monotonic() + 30
    while True:
        try:
            return await work()
        except (TierUnavailable, SnapshotCorrupt):
            assert time.monotonic() < until
        await asyncio.sleep(0.1)


async def tried(where: pathlib.Path, port: int, rank: int, deed: Deed, at: float, *, way: str, dice: random.Random) -> str:
    """at: share of all bytes that go that way, or, from 1 on, byte."""
    trial, back = Trial(where, rank), way == "back"
    whole = 3_100 + 2 * BODY if not back else 1_500
    if way == "fetch":
        back, whole = True, 3_100 + 2 * BODY
        async with calling(f"127.0.0.1:{port}") as peer:
            await trial.put(peer)
    wire = Wire(port, deed, at=int(at if at >= 1 else at * whole), back=back, dice=dice)
    address, failed, sound = await wire.start(), "", True
    try:
        async with calling(address) as peer:
            try:
                if way != "fetch":
                    await trial.put(peer)
                sound = await trial.fetched(peer)
            except CheckpointError as error:
                failed = str(error)
        async with calling(f"127.0.0.1:{port}") as peer:  # what lies there now, over a sound wire
            sound = sound and await trial.fetched(peer)
        async with calling(address) as peer:  # and the next try
            await patiently(lambda: trial.put(peer))
            sound = sound and await trial.fetched(peer) and len([key for key in await peer.list() if key.rank == rank]) == len(trial.copies)
    finally:
        await wire.close()
    assert "\n" not in failed
    if not sound:
        return "WRONG"
    return "found" if failed else "harmless"


@pytest.mark.parametrize("trials", TRIALS)
async def test_a_damaged_wire(tmp_path: pathlib.Path, trials: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipe, "ANSWER_S", 1.0)  # a length that has grown is waited for
    monkeypatch.setattr(transport, "STALL_S", 1.0)
    number = int(os.environ.get("CHAOS_SEED", random.SystemRandom().randrange(10**6)))
    print(f"seed {number}")
    dice, gate, ranks = random.Random(number), asyncio.Semaphore(AT_ONCE), iter(range(1 << 20))
    async with vault(tmp_path / "n1") as holder:

        async def one(name: str, way: str, at: float, seed: int) -> None:
            async with gate:
                rank = next(ranks)
                outcome = await tried(tmp_path, holder.port, rank, DEEDS[name], at, way=way, dice=random.Random(seed))
                holder._memory.forget(rank)
            place = {"there": "wire: put", "back": "wire: answers to a put", "fetch": "wire: get"}[way]
            tally.count(place if at < 1 else "wire: handshake, first words", name, outcome)
            assert outcome != "WRONG", (name, way, at)

        async with asyncio.TaskGroup() as group:
            for name in DEEDS:
                for way in ("there", "back", "fetch"):
                    for _ in range(trials):
                        group.create_task(one(name, way, dice.random(), dice.randrange(1 << 30)))
                    for _ in range(max(1, trials // 2)):
                        group.create_task(one(name, way, float(dice.randrange(1, 400)), dice.randrange(1 << 30)))


@pytest.mark.long
async def test_every_word_of_a_handshake(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each byte of it flipped: no connection, or the right one; and nobody takes damage for a wrong token, which would be for good."""
    monkeypatch.setattr(pipe, "ANSWER_S", 1.0)
    monkeypatch.setattr("resilient.wire.link.connect.__kwdefaults__", {"timeout_s": 1.0})
    async with vault(tmp_path / "n1") as holder:

        async def one(at: int, *, back: bool) -> None:
            wire = Wire(holder.port, flipped, at=at, back=back, dice=random.Random(at))
            address, outcome = await wire.start(), "harmless"
            async with calling(address) as peer:
                try:
                    assert await peer.list() == ()
                except CheckpointError as error:
                    assert "token" not in str(error)
                    outcome = "found"
            await wire.close()
            tally.count("wire: handshake", "each byte flipped", outcome)

        for back, length in ((False, 200), (True, 160)):
            async with asyncio.TaskGroup() as group:
                for at in range(length):
                    group.create_task(one(at, back=back))
