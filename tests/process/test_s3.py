"""A checkpoint on an S3 server that fails: it is committed in the end or clearly not, and what is listed is whole."""

from __future__ import annotations

import random
import time
import uuid

import pytest
import s3server
import sealing

from resilient.checkpoint import remote
from resilient.checkpoint.disk import DiskTier
from resilient.checkpoint.source import Whole
from resilient.checkpoint.storage import Storage
from resilient.checkpoint.tier import SnapshotKey
from resilient.errors import CheckpointError, TierUnavailable

pytestmark = pytest.mark.process
FAULTS = ("500", "503", "reset", "cut", "garbage", "late")


@pytest.fixture(scope="module")
def server():
    with s3server.Server() as found:
        yield found


@pytest.fixture
def proxy(server):
    with s3server.Proxy(server.port) as found:
        yield found


@pytest.fixture
def sealed(tmp_path, monkeypatch):
    """rank -> the bytes of a snapshot of step 7, each of two parts."""
    monkeypatch.setattr(remote, "PART_BYTES", 5 << 20)  # the least that s3 takes
    return {rank: sealing.sealed(tmp_path, rank, 7, random.Random(rank).randbytes((5 << 20) + 12_345)) for rank in (0, 1)}


def check(port: int, url: str, sealed: dict[int, bytes], *, committed: bool) -> None:
    """What a reader with sound storage sees."""
    with s3server.options(port):
        tier = DiskTier(url)
        if committed:
            assert tier.steps() == (7,)
        for step in tier.steps():
            tier.verify(step)
            for rank, copy in sealed.items():
                into = bytearray(len(copy))
                tier.get(SnapshotKey(rank, step), into)
                assert into == copy


@pytest.mark.parametrize(
    "fault", [fault if fault in ("500", "reset", "late") else pytest.param(fault, marks=pytest.mark.long) for fault in FAULTS]
)
def test_every_request_may_fail(server, proxy, sealed, fault):
    """The k-th request and the next one fail, for many k: writing and committing are tried again until they are done."""
    for k in range(1 + FAULTS.index(fault) % 3, 16, 3):
        url = f"s3://bucket/{uuid.uuid4()}"
        first = len(proxy.lines) + k
        proxy.fault = lambda number, _, first=first: fault if number in {first, first + 1} else ""
        with s3server.options(proxy.port, retries=0):
            done, failed, tier = [], 0, DiskTier(url)
            tier._storage._fs.retries = 1  # s3fs's own patience would hide most of it
            while len(done) <= len(sealed):
                try:
                    if len(done) == len(sealed):
                        tier.commit(7, done, run="run")
                        break
                    done.append(tier.write(SnapshotKey(len(done), 7), Whole(sealed[len(done)])))
                except TierUnavailable as error:
                    assert url in str(error) and "\n" not in str(error)
                    failed += 1
                    assert failed < 5
        check(server.port, url, sealed, committed=True)
    assert proxy.faults >= 6


def test_a_storm(server, proxy, sealed):
    """One request in four fails, in any way; nothing but CheckpointError comes out, and what is listed is whole."""
    number = random.SystemRandom().randrange(1 << 30)
    print(f"seed {number}")
    dice, url, committed = random.Random(number), f"s3://bucket/{uuid.uuid4()}", False
    proxy.fault = lambda *_: dice.choice(FAULTS) if dice.random() < 0.25 else ""
    end = time.monotonic() + 10
    with s3server.options(proxy.port, retries=0):
        tier = DiskTier(url)
        tier._storage._fs.retries = 2
        while not committed and time.monotonic() < end:
            try:
                tier.commit(7, [tier.write(SnapshotKey(rank, 7), Whole(copy)) for rank, copy in sealed.items()], run="run")
                committed = True
            except CheckpointError as error:
                print(error)
            check(server.port, url, sealed, committed=committed)
    assert proxy.faults


def test_a_server_that_hangs_and_one_that_is_gone(proxy, sealed):
    url = f"s3://bucket/{uuid.uuid4()}"
    proxy.fault = lambda *_: "hang"
    with s3server.options(proxy.port, read_timeout_s=0.5):
        begin = time.monotonic()
        for attempt in (lambda t: t.write(SnapshotKey(0, 7), Whole(sealed[0])), DiskTier.steps, lambda t: t.manifest(7)):
            tier = DiskTier(url)
            tier._storage._fs.retries = 1
            with pytest.raises(TierUnavailable, match="imeout"):
                attempt(tier)
        assert time.monotonic() - begin < 10
    with s3server.options(s3server.free_port()):
        tier = DiskTier(url)
        with pytest.raises(TierUnavailable, match="connect"):
            tier.steps()


def test_a_server_that_dies_in_the_middle_and_comes_back(sealed):
    with s3server.Server() as server, s3server.Proxy(server.port) as proxy:
        url = f"s3://bucket/{uuid.uuid4()}"
        proxy.fault = lambda number, _: (server.kill(), "")[1] if number == 5 else ""
        with s3server.options(proxy.port):
            tier = DiskTier(url)
            with pytest.raises(TierUnavailable):
                tier.commit(7, [tier.write(SnapshotKey(rank, 7), Whole(copy)) for rank, copy in sealed.items()], run="run")
            server.start()
            tier.commit(7, [tier.write(SnapshotKey(rank, 7), Whole(copy)) for rank, copy in sealed.items()], run="run")
        check(server.port, url, sealed, committed=True)


@pytest.mark.parametrize("scheme", ["s3", "memory"])
def test_a_prefix_that_looks_like_a_pattern_is_none(server, scheme):
    """Drivers take `run[1]` for a pattern when they remove a tree: the neighbour's checkpoint went."""
    root = f"{scheme}://bucket/{uuid.uuid4()}"
    with s3server.options(server.port):
        neighbours = [Storage(f"{root}/{name}") for name in ("run1", "run2")]
        for neighbour in neighbours:
            neighbour.write("step-00000002/file", b"sound")
        for name in ("run[1]", "run?", "*"):
            mine = Storage(f"{root}/{name}")
            mine.write("step-00000002/file", b"old")
            assert mine.read("step-00000002/file") == b"old"
            mine.remove_tree("step-00000002")
            mine.remove_tree("step-00000002")
            assert mine.names() == ()
        assert all(neighbour.read("step-00000002/file") == b"sound" for neighbour in neighbours)
