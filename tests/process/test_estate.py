"""Old snapshots in the memory of other nodes, cut for a world of another size: only what is wanted comes, and only if every byte is right."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import socket
import struct

import msgspec
import numpy as np
import pytest
import xxhash
from test_peer import Proxy
from test_vault import until, vault

from resilient.checkpoint import afar
from resilient.checkpoint.layout import Layout as Described
from resilient.checkpoint.layout import Row, Twins
from resilient.checkpoint.ring import Ring
from resilient.checkpoint.slot import Slot
from resilient.checkpoint.snapshot import FIELDS, HEADER_BYTES, MAGIC, SNAPSHOT_BYTES_MAX, payload_offset, slot_bytes
from resilient.checkpoint.tally import PIECE
from resilient.checkpoint.tier import SnapshotKey
from resilient.core.machine import VaultDo
from resilient.core.messages import Elder, Layout
from resilient.errors import SnapshotCorrupt

pytestmark = pytest.mark.process
STEP = 6
WHOLE = {
    "model.big": np.arange(5003 * 1001, dtype="float32").reshape(5003, 1001),  # 20 MB: pieces of 4 MiB end anywhere in a row
    "model.flat": np.arange(2_200_000, dtype="int16"),
    "model.small": np.arange(7 * 3 * 2, dtype="float64").reshape(7, 3, 2),
    "model.one": np.array(2.5),
}
STATE_BYTES = sum(whole.nbytes for whole in WHOLE.values())


def described(kind: str, rank: int, world: int) -> Described:
    """rows: the first dimension is split, as by FSDP2; columns: the last one, as by tensor parallelism; copies: everybody has all."""
    rows = []
    for key, whole in WHOLE.items():
        offsets, local = [0] * whole.ndim, list(whole.shape)
        if whole.ndim and kind != "copies":
            axis = 0 if kind == "rows" else whole.ndim - 1
            share = -(-whole.shape[axis] // world)
            offsets[axis] = min(share * rank, whole.shape[axis])
            local[axis] = min(share * (rank + 1), whole.shape[axis]) - offsets[axis]
        rows.append(Row(key, str(whole.dtype), whole.shape, tuple(offsets), tuple(local)))
    return Described(tuple(rows), Twins(0, world) if kind == "copies" else Twins(rank))


def part(row: Row) -> bytes:
    return WHOLE[row.key][tuple(slice(o, o + n) for o, n in zip(row.offsets, row.local, strict=True))].tobytes()


def payload_bytes(rows: Described) -> int:
    return sum(length + -length % 64 for _, length in rows.places())


def chair(rank: int, rows: Described, more: int = 0) -> Layout:
    room = slot_bytes(2000, 100 + more, payload_bytes(rows))
    return Layout(rank=rank, digest="", replicated=False, own_bytes=2000, snapshot_bytes=room)


def leave(keeper, kind: str, rank: int, world: int, more: bytes = b"") -> None:
    """That rank's snapshot lies in this vault's memory."""
    rows = described(kind, rank, world)
    ring = Ring.open(keeper.allocate(chair(rank, rows, len(more))).slots)
    own = b"own %d" % rank + more
    words = {"run": "run", "rank": rank, "world_size": world, "round": 1}
    view = ring.begin(**words, layout=rows.encode(), own=own, payload_bytes=payload_bytes(rows))
    for row, (begin, length) in zip(rows.rows, rows.places(), strict=True):
        view[begin : begin + length] = part(row)
    del view
    ring.seal(STEP)
    ring.get(STEP).stamp_payload()
    ring.close()


async def cut(keeper, kind: str, rank: int, world: int, old: int):
    rows = described(kind, rank, world)
    wish = msgspec.structs.replace(chair(rank, rows), reshape=STEP, rows=rows.encode(), world_size=world, origin=old)
    return await keeper.reshape(wish)


def check(keeper, segments, kind: str, rank: int, world: int, old: int) -> None:
    """Every bit of it."""
    assert (segments.error, segments.refused, segments.own_of) == ("", "", rank % old)
    chest = keeper._memory.chest(rank)
    found = chest.sealed("snapshot", world)[STEP].read(run="run", rank=rank, step=STEP)
    rows = described(kind, rank, world)
    assert (found.layout, found.own) == (rows.encode(), b"own %d" % (rank % old))
    for row, (begin, length) in zip(rows.rows, rows.places(), strict=True):
        assert bytes(found.payload[begin : begin + length]) == part(row), row.key


def fetched(caplog: pytest.LogCaptureFixture) -> list[int]:
    """Bytes of payload that came for each rank that was cut."""
    return [int(match[1]) for record in caplog.records if (match := re.search(r"(\d+) bytes of others", record.getMessage()))]


def elders(world: int, *vaults: str) -> VaultDo:
    return VaultDo(round=1, step=STEP, ranks=(0, 1), world_size=9, elders=tuple(Elder(rank=rank, vaults=vaults) for rank in range(world)))


class Back(Proxy):
    """Counts what comes from the server."""

    def _carry(self, source, sink, counts):
        super()._carry(source, sink, not counts)


class Gone(Back):
    """When it is cut nobody is there any more."""

    def cut(self):
        super().cut()
        self._server.shutdown(socket.SHUT_RDWR)
        self._server.close()


@contextlib.asynccontextmanager
async def nodes(tmp_path, count: int):
    async with contextlib.AsyncExitStack() as stack:
        yield [await stack.enter_async_context(vault(tmp_path / f"n{number}")) for number in range(count)]


@pytest.mark.parametrize(
    ("kind", "old", "world"), [("rows", 4, 2), ("rows", 2, 4), ("rows", 3, 4), ("columns", 4, 2), ("columns", 1, 3), ("copies", 3, 2)]
)
async def test_only_what_the_ranks_of_a_node_need_comes(tmp_path, caplog, kind, old, world):
    """A node whose memory is empty; two of its ranks are cut at once."""
    caplog.set_level(logging.INFO, "resilient.vault")
    async with nodes(tmp_path, 2) as (there, here):
        for rank in range(old):
            leave(there, kind, rank, old)
        here.do(elders(old, there.address))
        found = await asyncio.gather(*(cut(here, kind, rank, world, old) for rank in range(2)))
        for rank, segments in enumerate(found):
            check(here, segments, kind, rank, world, old)
    mine = [sum(row.num_bytes for row in described(kind, rank, world).rows) for rank in range(2)]
    if kind == "columns":  # no stretch of memory is a part of the columns: pieces come whole
        assert sum(fetched(caplog)) <= 2 * STATE_BYTES
    elif kind == "copies":
        assert sum(mine) == 2 * STATE_BYTES
        assert min(fetched(caplog)) == 0, "what one of them has, the other one need not fetch"
        assert STATE_BYTES <= sum(fetched(caplog)) <= STATE_BYTES + 4096
    else:
        assert sum(mine) - 8 <= sum(fetched(caplog)) <= sum(mine) + 4 * 2 * PIECE  # the scalar comes once
    assert list(tmp_path.glob("*/resilient.*")) == []


async def test_own_state_may_be_larger_than_a_frame(tmp_path):
    async with nodes(tmp_path, 2) as (there, here):
        more = bytes(range(256)) * (5 << 12)
        leave(there, "rows", 0, 1, more)
        here.do(elders(1, there.address))
        segments = await cut(here, "rows", 0, 2, 1)
        assert (segments.error, segments.refused) == ("", "")
        found = here._memory.chest(0).sealed("snapshot", 2)[STEP].read(run="run", rank=0, step=STEP)
        assert found.own == b"own 0" + more


async def test_what_is_here_is_not_fetched(tmp_path, caplog):
    caplog.set_level(logging.INFO, "resilient.vault")
    async with nodes(tmp_path, 2) as (there, here):
        for rank in range(4):
            leave((here, here, there, there)[rank], "rows", rank, 4)
        here.do(elders(4, there.address))
        there.do(elders(4, here.address))
        check(here, await cut(here, "rows", 0, 2, 4), "rows", 0, 2, 4)
        check(there, await cut(there, "rows", 1, 2, 4), "rows", 1, 2, 4)
    first, second = fetched(caplog)
    assert first == 0
    assert second < 2 * PIECE, "a row at the border, and the own state of old rank 1"


async def test_a_flipped_bit_is_found_and_a_sound_copy_is_used(tmp_path, monkeypatch):
    monkeypatch.setattr(afar, "PATIENCE_S", 5.0)
    async with nodes(tmp_path, 3) as (there, here, other):
        for rank in range(2):
            leave(there, "rows", rank, 2)
            leave(other, "rows", rank, 2)
        flip(there, 1)
        here.do(elders(2, there.address))
        check(here, await cut(here, "rows", 0, 3, 2), "rows", 0, 3, 2)  # needs nothing of it
        refused = (await cut(here, "rows", 1, 3, 2)).refused
        assert "not what was hashed" in refused
        assert not here._memory.chest(1).sealed("snapshot")
        here.do(elders(2, there.address, other.address))
        check(here, await cut(here, "rows", 1, 3, 2), "rows", 1, 3, 2)


async def test_a_bit_that_flips_after_the_digests_were_told_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(afar, "PATIENCE_S", 5.0)
    async with nodes(tmp_path, 2) as (there, here):
        leave(there, "rows", 0, 1)
        here.do(elders(1, there.address))
        check(here, await cut(here, "rows", 0, 2, 1), "rows", 0, 2, 1)
        flip(there, 0, 200)  # rank 0 has the last tensor right
        assert "model.small is not what was sealed" in (await cut(here, "rows", 1, 2, 1)).refused


class _Liar:
    address = "there"

    def __init__(self, header: bytes, head: bytes) -> None:
        self.said = header, head

    async def head(self, key, **_):
        return self.said


def test_what_no_memory_holds_is_refused_before_its_pieces_are_counted(monkeypatch):
    """A head that is sound in itself, of a payload that nobody can have."""
    monkeypatch.setattr(afar, "PAUSE_S", 0.0)
    for num_bytes, told in ((1 << 50, SNAPSHOT_BYTES_MAX), (64, "a payload of")):
        rows = Described((Row("model.big", "uint8", (1 << 50,), (0,), (1 << 50,)),), Twins(0)).encode()
        header, head = announced(rows, num_bytes)
        far = afar.Afar([_Liar(header, head)], SnapshotKey(0, STEP), run="run", world_size=1, wait=asyncio.run)
        with pytest.raises(SnapshotCorrupt, match=str(told)):
            far.read({0: ((0, 1),)}, lambda *_: None)


def announced(rows: bytes, payload: int) -> tuple[bytes, bytes]:
    at = payload_offset(len(rows), 0, payload)
    body = FIELDS.pack(STEP, 0, 1, 1, len(rows), 0, at, payload, xxhash.xxh3_128_digest(b"run"))
    seal = 1 << 32 | STEP + 1
    front = struct.pack("<6q", MAGIC, seal, ~seal, seal, 0, 0)
    return front + xxhash.xxh3_128_digest(body + rows) + body, rows.ljust(at - HEADER_BYTES, b"\0")


async def test_of_several_that_hold_the_same_a_sound_one_is_used(tmp_path):
    async with nodes(tmp_path, 2) as (there, here):
        leave(here, "copies", 0, 2)
        leave(there, "copies", 1, 2)
        flip(here, 0)
        here.do(elders(2, there.address))
        check(here, await cut(here, "copies", 0, 3, 2), "copies", 0, 3, 2)


@pytest.mark.parametrize("back", [61, -HEADER_BYTES - 5], ids=["payload", "head"])
async def test_of_a_rank_whose_snapshot_here_is_damaged_another_node_s_copy_is_used(tmp_path, back):
    async with nodes(tmp_path, 2) as (there, here):
        for keeper in (there, here):
            leave(keeper, "rows", 0, 1)
        flip(here, 0, back)
        here.do(elders(1, here.address, there.address))
        check(here, await cut(here, "rows", 0, 2, 1), "rows", 0, 2, 1)


def flip(keeper, rank: int, back: int = 61) -> None:
    """A bit so many bytes before the end, of the last tensor or another one; negative: behind the beginning."""
    slot = Slot(keeper.snapshot_path(rank, STEP))
    slot.memory[slot.sealed_bytes() - back if back > 0 else -back] ^= 16
    slot.close()


async def test_what_breaks_off_is_gone_on_with(tmp_path):
    async with nodes(tmp_path, 2) as (there, here):
        leave(there, "rows", 0, 1)
        proxy = Back(there.port)
        proxy.cut_at = STATE_BYTES // 2
        here.do(elders(1, proxy.address))
        check(here, await cut(here, "copies", 0, 2, 1), "copies", 0, 2, 1)
        assert proxy.cut_at == -1
        assert STATE_BYTES < proxy.carried < 1.5 * STATE_BYTES
        proxy.close()


async def test_another_vault_goes_on_where_one_went_away(tmp_path):
    async with nodes(tmp_path, 3) as (there, here, other):
        leave(there, "rows", 0, 1)
        leave(other, "rows", 0, 1)
        first, second = Gone(there.port), Back(other.port)
        first.cut_at = STATE_BYTES // 2
        here.do(elders(1, first.address, second.address))
        check(here, await cut(here, "copies", 0, 2, 1), "copies", 0, 2, 1)
        assert second.carried < 0.9 * STATE_BYTES
        second.close()


async def test_nobody_waits_for_a_peer_when_the_run_goes_on_from_elsewhere(tmp_path):
    async with nodes(tmp_path, 2) as (there, here):
        leave(there, "rows", 0, 1)
        proxy = Back(there.port)
        proxy.stop_at = STATE_BYTES // 2
        here.do(elders(1, proxy.address))
        task = asyncio.create_task(cut(here, "copies", 0, 2, 1))
        await until(lambda: proxy.carried >= proxy.stop_at)
        here.do(VaultDo(round=2, step=3, ranks=(0, 1), world_size=9))
        async with asyncio.timeout(5.0):
            assert "given up" in (await task).refused
        assert not here._memory.chest(0).sealed("snapshot")
        proxy.close()
