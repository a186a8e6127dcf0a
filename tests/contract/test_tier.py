"""What every tier must do. A third party's tier subclasses `TierContract` and gives `tier`, and `publish` if `put` is not enough."""

from __future__ import annotations

import asyncio
import json
import os
import threading
import uuid

import fsspec
import msgspec
import pytest
import s3server
from sealing import sealed

from resilient.checkpoint import memory, remote
from resilient.checkpoint.chest import MemoryTier
from resilient.checkpoint.disk import DiskTier, Keep
from resilient.checkpoint.holder import PeerServer
from resilient.checkpoint.notes import Notes
from resilient.checkpoint.peer import Peer, PeerTier
from resilient.checkpoint.ring import Ring
from resilient.checkpoint.snapshot import HEADER_BYTES, parse, slot_bytes
from resilient.checkpoint.source import Whole
from resilient.checkpoint.tier import SnapshotKey
from resilient.core.messages import Recorded
from resilient.errors import SnapshotCorrupt, SnapshotMismatch, SnapshotMissing, TierUnavailable


class TierContract:
    """The suite. `tier`: an empty tier."""

    @pytest.fixture
    def tier(self):
        raise NotImplementedError

    def publish(self, tier, *keys: SnapshotKey) -> None:
        """Whatever it takes until what was put is listed."""

    @pytest.fixture
    def kept(self, tier, tmp_path):
        """The tier with steps 1 and 2 of ranks 0 and 1; what was put, by key."""
        data = {SnapshotKey(rank, step): sealed(tmp_path, rank, step, bytes([rank, step]) * 5000) for step in (1, 2) for rank in (0, 1)}
        for key, copy in data.items():
            tier.put(key, copy)
        self.publish(tier, *data)
        return data

    def test_an_empty_tier_lists_nothing(self, tier):
        assert list(tier.list()) == []

    def test_what_was_put_comes_back(self, tier, kept):
        for key, copy in kept.items():
            into = bytearray(len(copy) + 100)
            assert tier.get(key, into) == len(copy)
            assert into[: len(copy)] == copy

    def test_the_list_is_in_order(self, tier, kept):
        assert list(tier.list()) == sorted(kept)

    def test_it_comes_back_into_a_segment(self, tier, kept, tmp_path):
        key = SnapshotKey(1, 2)
        path = tmp_path / "segment"
        path.write_bytes(bytes(slot_bytes(500, 500, 10_048)))
        ring = Ring.open([str(path)])
        tier.get(key, ring)
        assert bytes(ring.get(2).read(rank=1, step=2, stamped=True).payload[:10_000]) == bytes([1, 2]) * 5000
        ring.close()

    def test_what_is_not_there_is_missing(self, tier, kept):
        for key in (SnapshotKey(0, 3), SnapshotKey(7, 1)):
            with pytest.raises(SnapshotMissing):
                tier.get(key, bytearray(20_000))

    def test_memory_that_is_too_small_is_refused(self, tier, kept):
        with pytest.raises(SnapshotMismatch, match="room for 5000"):
            tier.get(SnapshotKey(0, 1), bytearray(5000))
        assert tier.get(SnapshotKey(0, 1), bytearray(20_000))  # and the tier is as before

    def test_what_was_dropped_is_missing(self, tier, kept):
        key = SnapshotKey(0, 1)
        tier.drop(key)
        tier.drop(key)
        assert key not in set(tier.list())
        assert SnapshotKey(0, 2) in set(tier.list())
        with pytest.raises(SnapshotMissing):
            tier.get(key, bytearray(20_000))

    def test_damage_is_seen_at_the_first_door(self, tier, tmp_path):
        good = sealed(tmp_path, 0, 1)
        for position in (70, HEADER_BYTES + 1, len(good) - 1):
            bad = bytearray(good)
            bad[position] ^= 1
            with pytest.raises(SnapshotCorrupt):
                tier.put(SnapshotKey(0, 1), bad)
        with pytest.raises(SnapshotCorrupt, match="not hashed"):
            tier.put(SnapshotKey(0, 1), sealed(tmp_path, 0, 1, stamp=False))
        with pytest.raises(SnapshotMismatch):
            tier.put(SnapshotKey(0, 2), good)
        assert list(tier.list()) == []

    def test_a_large_snapshot(self, tier, tmp_path):
        payload = os.urandom(9_000_001)
        copy = sealed(tmp_path, 0, 5, payload)
        tier.put(SnapshotKey(0, 5), copy)
        self.publish(tier, SnapshotKey(0, 5))
        into = bytearray(len(copy))
        tier.get(SnapshotKey(0, 5), into)
        assert parse(into, step=5, stamped=True).payload[: len(payload)] == payload


class TestMemory(TierContract):
    @pytest.fixture
    def tier(self, tmp_path):
        found = MemoryTier(tmp_path, memory.new_key())
        yield found
        found.unlink()
        assert not list(tmp_path.glob("resilient.*"))

    def test_two_slots_per_rank(self, tier, kept, tmp_path):
        tier.put(SnapshotKey(0, 3), sealed(tmp_path, 0, 3))
        assert [key.step for key in tier.list() if key.rank == 0] == [2, 3]

    def test_segments_grow_and_keep_what_is_in_them(self, tier, kept, tmp_path):
        tier.put(SnapshotKey(0, 3), sealed(tmp_path, 0, 3, bytes(100_000)))
        assert [key.step for key in tier.list() if key.rank == 0] == [2, 3]
        into = bytearray(20_000)
        tier.get(SnapshotKey(0, 2), into)
        assert into[: len(kept[SnapshotKey(0, 2)])] == kept[SnapshotKey(0, 2)]

    def test_own_state_of_both_kinds(self, tier, tmp_path):
        for step in (3, 4, 5):
            tier.put(SnapshotKey(0, step, "start"), sealed(tmp_path, 0, step, b""))
            tier.put(SnapshotKey(0, step, "gate"), sealed(tmp_path, 0, step, b""))
        assert list(tier.list()) == [SnapshotKey(0, 4, "start"), SnapshotKey(0, 5, "gate"), SnapshotKey(0, 5, "start")]


class TestPeer(TierContract):
    @pytest.fixture
    def loop(self):
        loop = asyncio.new_event_loop()
        thread = threading.Thread(target=loop.run_forever)
        thread.start()
        yield loop
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.run_until_complete(loop.shutdown_default_executor())
        loop.close()

    @pytest.fixture
    def server(self, loop, tmp_path):
        tier = MemoryTier(tmp_path, memory.new_key())
        server = PeerServer(tier, Notes(), token="secret", run="run")
        server.port = self.on(loop, server.start())
        server.memory = tier
        yield server
        self.on(loop, server.close())
        tier.unlink()

    @pytest.fixture
    def tier(self, loop, server):
        found = PeerTier(self.on(loop, self.peer(server)), loop)
        yield found
        loop.call_soon_threadsafe(found.peer.close)

    async def peer(self, server, token="secret", run="run") -> Peer:
        return Peer(f"127.0.0.1:{server.port}", token=token, run=run, name="test")

    def on(self, loop, work):
        return asyncio.run_coroutine_threadsafe(work, loop).result(10)

    def test_the_wrong_token_or_run(self, loop, server):
        for words in ({"token": "wrong"}, {"run": "other"}):
            tier = PeerTier(self.on(loop, self.peer(server, **words)), loop)
            with pytest.raises(TierUnavailable, match=f"peer 127.0.0.1:{server.port}: .*{'token' if 'token' in words else 'run id'}"):
                next(tier.list())

    def test_nobody_there(self, loop, server):
        self.on(loop, server.close())
        with pytest.raises(TierUnavailable, match=r"peer 127\.0\.0\.1"):
            next(PeerTier(self.on(loop, self.peer(server)), loop).list())

    def test_a_peer_that_was_started_again(self, loop, tier, server, kept):
        port = server.port
        self.on(loop, server.close())
        again = PeerServer(server.memory, Notes(), token="secret", run="run")
        self.on(loop, again.start(port=port))
        assert list(tier.list()) == sorted(kept)
        self.on(loop, again.close())

    def test_a_rank_that_sits_there_takes_no_copy(self, tier, server, tmp_path):
        server.memory.chest(0).seated = True
        with pytest.raises(TierUnavailable, match="rank sits on this node"):
            tier.put(SnapshotKey(0, 1), sealed(tmp_path, 0, 1))
        tier.put(SnapshotKey(1, 1), sealed(tmp_path, 1, 1))

    def test_damage_in_the_other_memory_is_seen_here(self, tier, server, kept):
        slot = server.memory.slot(SnapshotKey(0, 2))
        slot._memory[slot.sealed_bytes() - 1] ^= 1
        with pytest.raises(SnapshotCorrupt):
            tier.get(SnapshotKey(0, 2), bytearray(20_000))
        assert tier.get(SnapshotKey(0, 1), bytearray(20_000))

    def test_a_copy_that_is_overwritten_while_it_is_sent(self, tier, server, kept, monkeypatch):
        slot = server.memory.slot(SnapshotKey(0, 2))
        real = slot.body
        monkeypatch.setattr(slot, "body", lambda: (real(), slot.unseal())[0])
        with pytest.raises(SnapshotMissing):
            tier.get(SnapshotKey(0, 2), bytearray(20_000))

    def test_notes_go_with_the_rank(self, loop, tier):
        notes = [Recorded(rank=1, index=index, key="all_reduce", payload=bytes(index)) for index in (2, 0, 1)]
        for note in notes:
            self.on(loop, tier.peer.leave_note(note))
        assert self.on(loop, tier.peer.notes(1)) == tuple(sorted(notes, key=lambda note: note.index))
        assert self.on(loop, tier.peer.notes(0)) == ()


class DiskContract(TierContract):
    stride = 1  # of the bytes that are damaged, one after the other

    def publish(self, tier, *keys):
        for step in sorted({key.step for key in keys}):
            parts = [tier.write(key, Whole(tier.test_data[key])) for key in keys if key.step == step]
            tier.commit(step, parts, run="run")

    @pytest.fixture
    def url(self, tmp_path):
        raise NotImplementedError

    @pytest.fixture
    def tier(self, url):
        found = DiskTier(url, world_size=None)
        found.test_data = {}
        real = found.put

        def put(key, data):
            real(key, data)
            found.test_data[key] = bytes(data)

        found.put = put
        return found

    def file(self, tier, key):
        return tier._storage._fs, tier._storage.where(tier.path(key))

    def damage(self, fs, path, position: int) -> None:
        data = bytearray(fs.cat_file(path))
        data[position] ^= 1
        fs.pipe_file(path, bytes(data))

    def test_nothing_counts_before_the_marker(self, tier, tmp_path):
        key = SnapshotKey(0, 1200)
        part = tier.write(key, Whole(sealed(tmp_path, 0, 1200)))
        assert list(tier.list()) == []
        with pytest.raises(SnapshotMissing, match=r"no commit marker.*step-00001200/COMMIT\.json"):
            tier.get(key, bytearray(20_000))
        tier.commit(1200, [part], run="run")
        assert tier.steps() == (1200,)
        assert list(tier.list()) == [key]
        fs, path = self.file(tier, key)
        assert path.endswith("/step-00001200/rank-00000.distcp")
        assert sorted(name.rpartition("/")[2] for name in fs.ls(path.rpartition("/")[0], detail=False)) == [
            ".metadata",
            "COMMIT.json",
            "rank-00000.distcp",
        ]

    def test_the_manifest_is_readable(self, tier, kept):
        fs, path = self.file(tier, SnapshotKey(0, 2))
        found = json.loads(fs.cat_file(path.replace("rank-00000.distcp", "COMMIT.json")))
        assert (found["format"], found["step"], found["world_size"], found["run"]) == (3, 2, 2, "run")
        assert found["ranks"][1]["file"] == "rank-00001.distcp"
        assert found["ranks"][1]["bytes"] == len(fs.cat_file(path.replace("rank-00000", "rank-00001")))

    def test_a_damaged_file_is_named(self, tier, kept):
        fs, path = self.file(tier, SnapshotKey(0, 2))
        for position in (*range(0, len(fs.cat_file(path)), 97 * self.stride), 5000, -1):
            self.damage(fs, path, position)
            with pytest.raises(SnapshotCorrupt, match=r"step=2 .*rank-00000\.distcp"):
                tier.get(SnapshotKey(0, 2), bytearray(20_000))
            with pytest.raises(SnapshotCorrupt, match=r"step=2 .*rank-00000\.distcp"):
                tier.verify(2)
            self.damage(fs, path, position)
        assert tier.get(SnapshotKey(0, 2), bytearray(20_000))

    @pytest.mark.parametrize("change", ["shorter", "longer", "empty", "header only"])
    def test_a_file_of_another_length_is_named(self, tier, kept, change):
        fs, path = self.file(tier, SnapshotKey(0, 2))
        data = fs.cat_file(path)
        fs.pipe_file(path, {"shorter": data[:-1], "longer": data + b"?", "empty": b"", "header only": data[:HEADER_BYTES]}[change])
        with pytest.raises(SnapshotCorrupt, match=r"expected.*rank-00000\.distcp"):
            tier.get(SnapshotKey(0, 2), bytearray(20_000))

    def test_another_ranks_sound_file_is_not_taken(self, tier, kept):
        fs, path = self.file(tier, SnapshotKey(0, 2))
        fs.pipe_file(path, fs.cat_file(path.replace("rank-00000", "rank-00001")))
        with pytest.raises(SnapshotCorrupt, match=r"digest .*rank-00000\.distcp"):
            tier.get(SnapshotKey(0, 2), bytearray(20_000))

    def test_a_file_that_is_gone_is_named(self, tier, kept):
        fs, path = self.file(tier, SnapshotKey(0, 2))
        fs.rm_file(path)
        with pytest.raises(SnapshotCorrupt, match=r"no such file.*rank-00000\.distcp"):
            tier.get(SnapshotKey(0, 2), bytearray(20_000))

    def test_every_damage_to_the_manifest_is_seen(self, tier, kept):
        fs, path = self.file(tier, SnapshotKey(0, 2))
        marker = path.replace("rank-00000.distcp", "COMMIT.json")
        good = fs.cat_file(marker)
        for position, byte in list(enumerate(good))[:: self.stride]:
            if chr(byte).isspace():
                continue
            fs.pipe_file(marker, good[:position] + bytes([byte ^ 1]) + good[position + 1 :])
            with pytest.raises(SnapshotCorrupt, match=r"COMMIT\.json"):
                tier.manifest(2)
        for length in range(0, len(good), 7 * self.stride):
            fs.pipe_file(marker, good[:length])
            with pytest.raises(SnapshotCorrupt):
                tier.manifest(2)
        assert [key.step for key in tier.list()] == [1, 1]

    def test_another_world_size(self, tier, kept):
        tier.world_size = 4
        with pytest.raises(SnapshotMismatch, match=r"world size 4 expected, 2 found .*step-00000002"):
            tier.get(SnapshotKey(0, 2), bytearray(20_000))

    def test_another_run_goes_on_from_it(self, tier, kept, url):
        assert DiskTier(url, world_size=2).get(SnapshotKey(0, 2), bytearray(20_000)) == len(kept[SnapshotKey(0, 2)])

    def test_a_marker_needs_all_files(self, tier, tmp_path):
        parts = [tier.write(SnapshotKey(rank, 5), Whole(sealed(tmp_path, rank, 5))) for rank in (0, 1)]
        fs, path = self.file(tier, SnapshotKey(1, 5))
        fs.rm_file(path)
        with pytest.raises(SnapshotMissing, match=r"rank-00001\.distcp"):
            tier.commit(5, parts, run="run")
        assert tier.steps() == ()

    def test_a_committed_step_is_written_again_only_if_its_bytes_were_wrong(self, tier, kept, tmp_path):
        other = sealed(tmp_path, 0, 2, b"other")
        before = tier.entry(SnapshotKey(0, 2)).xxh3_128
        assert tier.write(SnapshotKey(0, 2), Whole(other)).digest == before
        assert tier.steps() == (1, 2)
        assert tier.write(SnapshotKey(0, 2), Whole(other), again=True).digest != before
        assert tier.steps() == (1,)

    def test_old_checkpoints_go_and_the_last_whole_one_stays(self, tier, tmp_path):
        for step in (100, 200, 300, 400, 500):
            tier.commit(step, [tier.write(SnapshotKey(0, step), Whole(sealed(tmp_path, 0, step)))], run="run")
        for step in (150, 450, 600):  # never committed
            tier.write(SnapshotKey(0, step), Whole(sealed(tmp_path, 0, step)))
        fs, path = self.file(tier, SnapshotKey(0, 500))
        fs.pipe_file(path, b"damaged")
        assert tier.prune(Keep(2)) == (100, 150, 200)  # 500 is not whole, so it does not count
        assert tier.prune(Keep(1), distrusted={400}) == ()
        assert tier.prune(Keep(1)) == (300,)
        assert tier.steps() == (400, 500)
        assert tier._directories() == (400, 450, 500, 600)
        fs.pipe_file(path.replace("500", "400"), b"damaged")
        assert tier.prune(Keep(1)) == ()

    def test_other_files_at_the_url_are_left_alone(self, tier, kept):
        fs, path = self.file(tier, SnapshotKey(0, 2))
        root = path.rpartition("/step-")[0]
        fs.pipe_file(f"{root}/notes.txt", b"mine")
        fs.makedirs(f"{root}/step-best", exist_ok=True)
        assert tier.steps() == (1, 2)
        tier.prune(Keep(1))
        assert fs.cat_file(f"{root}/notes.txt") == b"mine"


class TestLocalDirectory(DiskContract):
    @pytest.fixture
    def url(self, tmp_path):
        return f"file://{tmp_path}/checkpoints"

    def test_a_plain_path_is_the_same_place(self, tier, kept, tmp_path, url):
        assert list(DiskTier(f"{tmp_path}/checkpoints").list()) == sorted(kept)

    def test_no_half_written_file_has_a_name_that_counts(self, tier, tmp_path, monkeypatch):
        monkeypatch.setattr(os, "fsync", lambda fd: (_ for _ in ()).throw(OSError(5, "Input/output error")))
        with pytest.raises(TierUnavailable, match="Input/output error"):
            tier.write(SnapshotKey(0, 1), Whole(sealed(tmp_path, 0, 1)))
        assert [path.name for path in (tmp_path / "checkpoints/step-00000001").iterdir() if path.suffix == ".distcp"] == []

    def test_a_place_that_cannot_be_written(self, tmp_path):
        (tmp_path / "file").write_text("not a directory")
        with pytest.raises(TierUnavailable, match=f"checkpoint URL '{tmp_path}/file/x'"):
            DiskTier(f"{tmp_path}/file/x").write(SnapshotKey(0, 1), Whole(sealed(tmp_path, 0, 1)))


class TestMemoryUrl(DiskContract):
    @pytest.fixture
    def url(self):
        name = f"memory://{uuid.uuid4()}"
        yield name
        fs = fsspec.filesystem("memory")
        fs.rm(name, recursive=True) if fs.exists(name) else None


@pytest.fixture(scope="module")
def server():
    with s3server.Server() as found:
        yield found


class TestS3(DiskContract):
    """Against a real server, in a process of its own."""

    stride = 23

    @pytest.fixture
    def url(self, server):
        with s3server.options(server.port):
            yield f"s3://bucket/{uuid.uuid4()}"

    def test_a_file_of_many_parts(self, tier, tmp_path):
        payload = os.urandom(5 * remote.PART_BYTES + 12_345)
        copy, key = sealed(tmp_path, 0, 5, payload), SnapshotKey(0, 5)
        tier.commit(5, [tier.write(key, Whole(copy))], run="run")
        into = bytearray(len(copy))
        assert tier.get(key, into) == len(copy)
        assert into == copy
        tier.verify(5)

    def test_a_write_that_fails_leaves_nothing(self, tier, tmp_path):
        copy = bytearray(sealed(tmp_path, 0, 5, os.urandom(3 * remote.PART_BYTES)))
        source = Whole(copy)
        copy[-100] ^= 1
        with pytest.raises(SnapshotCorrupt):
            tier.write(SnapshotKey(0, 5), source)
        fs, path = self.file(tier, SnapshotKey(0, 5))
        assert not fs.exists(path)
        assert fs.list_multipart_uploads("bucket") == []

    def test_a_bucket_that_is_not_there(self, server, tmp_path):
        with s3server.options(server.port), pytest.raises(TierUnavailable, match=r"checkpoint URL 's3://nowhere/x'.*bucket"):
            DiskTier("s3://nowhere/x").write(SnapshotKey(0, 5), Whole(sealed(tmp_path, 0, 5)))


def test_a_url_of_an_unknown_kind():
    with pytest.raises(TierUnavailable, match="checkpoint URL 'nonsense://x'"):
        DiskTier("nonsense://x")


def test_the_manifest_survives_reformatting(tmp_path):
    """People may pretty-print it: the digest is over its contents."""
    tier = DiskTier(str(tmp_path))
    tier.commit(1, [tier.write(SnapshotKey(0, 1), Whole(sealed(tmp_path, 0, 1)))], run="run")
    marker = tmp_path / "step-00000001/COMMIT.json"
    marker.write_text(json.dumps(json.loads(marker.read_text()), indent=8))
    assert msgspec.structs.asdict(tier.manifest(1))["world_size"] == 1
