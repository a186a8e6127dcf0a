"""What storage does to a vault, and what is there afterwards: nothing wrong, nothing committed lost, the reason in one line."""

from __future__ import annotations

import asyncio
import errno
import functools
import logging
import os
import pathlib
import random
import subprocess
import sys
import threading
import time

import pytest
from faulty import Faulty
from resilient_agents import drain
from test_vault import PAYLOAD, Worker, layout, right, until, vault

from resilient.checkpoint.disk import DiskTier
from resilient.checkpoint.layout import padded
from resilient.checkpoint.snapshot import parse
from resilient.checkpoint.tier import SnapshotKey
from resilient.core.machine import VaultDo

pytestmark = pytest.mark.process
RANKS = (0, 1)


@pytest.fixture(autouse=True)
def _reset():
    Faulty.reset()
    yield
    Faulty.reset()


def sound(where: pathlib.Path) -> tuple[int, ...]:
    """The steps that are listed; every one of them is read and is right."""
    tier = DiskTier(str(where))
    steps = sorted({key.step for key in tier.list()})
    for step in steps:
        tier.verify(step)
        for rank in RANKS:
            into = bytearray(3 * PAYLOAD)
            count = tier.get(SnapshotKey(rank, step), into)
            assert right(parse(memoryview(into)[:count], rank=rank, step=step, stamped=True).payload[: padded(PAYLOAD)], step)
    return tuple(steps)


async def commit(keeper, workers, step: int, timeout_s: float = 15.0) -> bool:
    """Whether both ranks' files arrived in that time; then it is committed as well."""
    for worker in workers:
        worker.snapshot(step, len(RANKS))
    found = functools.partial(lambda: [part for part in keeper.known().persisted if part.step == step])
    try:
        await until(lambda: len(found()) == len(RANKS), timeout_s, poke=keeper.poke)
    except AssertionError:
        return False
    keeper.do(VaultDo(commit=step, manifest=tuple(found()), ranks=RANKS, world_size=len(RANKS)))
    await until(lambda: keeper.known().committed == step, 30.0)
    return True


def warnings(caplog) -> list[str]:
    lines = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert all("\n" not in line for line in lines)
    assert all(record.exc_info is None for record in caplog.records), "a fault of ours"
    return lines


# --------------------------------------------------------------------------- killed


def persisting(url: str, where: pathlib.Path, first: int, *kill_at: str, after_s: float | None = None) -> tuple[list[int], str]:
    """Two checkpoints from step `first` on, in a process that is killed; those it said were committed, and its last line."""
    program = pathlib.Path(__file__).with_name("faulty.py")
    root = program.parents[2]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (root, root / "agents", program.parent)))}
    where.mkdir(exist_ok=True)
    command = [sys.executable, str(program), url, str(where), str(first), str(first + 10), *kill_at]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env) as process:
        if after_s is not None:
            first_line = process.stdout.readline()
            time.sleep(after_s)
            process.kill()
        out, err = process.communicate(timeout=60)
    lines = ((first_line if after_s is not None else "") + out).splitlines()
    assert process.returncode in {0, -9}, err
    return [int(line.split()[1]) for line in lines if line.startswith("committed")], lines[-1] if lines else ""


def test_killed_before_every_kind_of_operation(tmp_path):
    """One process after the other in the same place, each killed a little later in its work; the last ones prune what the first left."""
    kept, step, acknowledged, seen = tmp_path / "kept", 10, 0, set()
    for what, number in ((what, number) for number in range(1, 7) for what in ("ls", "info", "open", "write", "close", "rm", "rmdir")):
        committed, last = persisting(f"faulty://{kept}", tmp_path / "shm", step, what, str(number))
        acknowledged = max([acknowledged, *committed])
        found = sound(kept) if kept.exists() else ()
        newer = [number for number in found if number > acknowledged]
        assert acknowledged in (0, *found) or len(newer) >= 3, (what, number, last, found)
        assert all(number in found for number in committed[-3:])
        seen.add(last)
        step = max([*found, acknowledged]) + 10
    kinds = {line.removeprefix("killed before ").split()[0] for line in seen if line.startswith("killed")}
    print(sorted(seen))
    assert {"ls", "open", "write", "close", "info", "rm", "rmdir"} <= kinds
    assert persisting(f"faulty://{kept}", tmp_path / "shm", step)[0] == [step, step + 10]
    assert len(sound(kept)) == 3
    assert len(list(kept.iterdir())) == 3, "nothing half is left behind"


def test_killed_at_random_moments(tmp_path):
    """The same with real local files."""
    number = random.SystemRandom().randrange(1 << 30)
    print(f"seed {number}")
    dice, kept, step = random.Random(number), tmp_path / "kept", 10
    for _ in range(8):
        committed, _ = persisting(str(kept), tmp_path / "shm", step, after_s=dice.uniform(0.0, 0.1))
        found = sound(kept)
        assert set(committed) <= set(found)  # of two at most, and three are kept
        step = max(found) + 10
    persisting(str(kept), tmp_path / "shm", step)
    assert len(sound(kept)) == 3
    assert len(list(kept.iterdir())) == 3


# --------------------------------------------------------------------------- errors, slowness, hanging


@pytest.mark.long
async def test_errors_at_random(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(drain, "RETRY_S", (0.01, 0.05))
    number = random.SystemRandom().randrange(1 << 30)
    print(f"seed {number}")
    dice, kept = random.Random(number), tmp_path / "kept"
    codes = (errno.EIO, errno.ENOSPC, errno.ETIMEDOUT, errno.ESTALE, errno.EACCES)

    def before(_number: int, what: str, path: str) -> None:
        if dice.random() < 0.06:
            code = dice.choice(codes)
            raise OSError(code, os.strerror(code), path)

    Faulty.before = before
    async with vault(tmp_path / "shm", url=f"faulty://{kept}") as keeper:
        workers = [Worker(keeper, layout(rank)) for rank in RANKS]
        done = [step for step in range(10, 300, 10) if await commit(keeper, workers, step, 1.0)]
        Faulty.reset()
        assert await commit(keeper, workers, 300)
        assert await keeper.settle(10)
    print(f"{len(done)} of 29 committed")
    assert sound(kept) == (*done, 300)[-3:]
    assert any("is missing in a checkpoint" in line for line in warnings(caplog))


@pytest.mark.parametrize("what", ["write", "rm", *(pytest.param(what, marks=pytest.mark.long) for what in ("ls", "open", "close", "info"))])
async def test_hanging(tmp_path, caplog, monkeypatch, what):
    """Every operation of one kind hangs for a while; it is given up, and what was given up does no harm when it goes on."""
    monkeypatch.setattr(drain, "ANSWER_S", 0.3)
    monkeypatch.setattr(drain, "RETRY_S", (0.05, 0.2))
    kept, release, hung = tmp_path / "kept", threading.Event(), []

    def before(_number: int, now: str, path: str) -> None:
        if now == what and not release.is_set() and len(hung) < 2:
            hung.append(path)
            release.wait(20)

    async with vault(tmp_path / "shm", url=f"faulty://{kept}") as keeper:
        workers = [Worker(keeper, layout(rank)) for rank in RANKS]
        assert await commit(keeper, workers, 10)
        Faulty.before = before
        for step in (20, 30, 40, 50):
            await commit(keeper, workers, step, 1.5)
        release.set()
        assert await commit(keeper, workers, 60)
        assert await keeper.settle(10)
        await asyncio.sleep(0.3)
    assert sound(kept)[-1] == 60
    assert hung
    assert any("no end after" in line for line in warnings(caplog))


async def test_what_was_given_up_changes_nothing_later(tmp_path, monkeypatch):
    """A write hangs just before its end; the step is written again and committed; then the first one goes on."""
    monkeypatch.setattr(drain, "ANSWER_S", 0.3)
    kept, release, hung, real = tmp_path / "kept", threading.Event(), threading.Event(), os.fsync

    def hang(fd: int) -> None:
        if not hung.is_set():
            hung.set()
            release.wait(20)
        real(fd)

    async with vault(tmp_path / "shm", url=str(kept)) as keeper:
        workers = [Worker(keeper, layout(rank)) for rank in RANKS]
        assert await commit(keeper, workers, 10)
        monkeypatch.setattr(os, "fsync", hang)
        assert not await commit(keeper, workers, 20, 1.0)
        for worker in workers:
            worker.snapshot(15, len(RANKS))  # the run goes back
        assert await commit(keeper, workers, 20)
        before = {path: path.stat().st_ino for path in files(kept)}
        release.set()
        await until(lambda: not parts(kept))  # its own file is gone, one way or the other
        await asyncio.sleep(0.1)
        assert {path: path.stat().st_ino for path in files(kept)} == before
    assert sound(kept) == (10, 20)


async def test_slow(tmp_path, caplog):
    Faulty.before = lambda *_: time.sleep(0.02)
    async with vault(tmp_path / "shm", url=f"faulty://{tmp_path}/kept") as keeper:
        workers = [Worker(keeper, layout(rank)) for rank in RANKS]
        for step in (10, 20, 30):
            assert await commit(keeper, workers, step)
        assert await keeper.settle(10)
    assert sound(tmp_path / "kept") == (10, 20, 30)
    assert warnings(caplog) == []


# --------------------------------------------------------------------------- a directory that cannot be written


def files(kept: pathlib.Path) -> list[pathlib.Path]:
    return sorted(path for path in kept.rglob("*") if path.is_file() and path.suffix != ".part")


def parts(kept: pathlib.Path) -> list[pathlib.Path]:
    return list(kept.rglob("*.part"))


async def tried(tmp_path, caplog, kept: pathlib.Path, begin, end, reason: str) -> None:
    """One checkpoint, one while it cannot be written, one afterwards."""
    async with vault(tmp_path / "shm", url=str(kept)) as keeper:
        workers = [Worker(keeper, layout(rank)) for rank in RANKS]
        assert await commit(keeper, workers, 10)
        begin()
        try:
            assert not await commit(keeper, workers, 20, 1.0)
            assert sound(kept) == (10,)
        finally:
            end()
        assert await commit(keeper, workers, 30)
        assert await keeper.settle(10)
    assert sound(kept) == (10, 30)
    assert parts(kept) == []
    assert any("is missing in a checkpoint" in line and reason in line for line in warnings(caplog))


async def test_a_full_disk(tmp_path, caplog, small):
    ballast = small / "ballast"
    fill = functools.partial(ballast.write_bytes, bytes(3_000_000))
    await tried(tmp_path, caplog, small / "kept", fill, ballast.unlink, "No space left on device")


async def test_a_read_only_disk(tmp_path, caplog, small):
    remount = [command("mount", "-o", f"remount,{how}", str(small)) for how in ("ro", "rw")]
    await tried(tmp_path, caplog, small / "kept", *remount, "Read-only file system")


def command(*words: str):
    return functools.partial(subprocess.run, words, check=True)


@pytest.fixture
def forbidden(tmp_path):
    """A directory, and what makes it unwritable and writable again."""
    kept = tmp_path / "kept"
    kept.mkdir()
    if os.geteuid():
        return kept, functools.partial(kept.chmod, 0o500), functools.partial(kept.chmod, 0o700)
    if subprocess.run(["chattr", "+i", str(kept)], capture_output=True, check=False).returncode:
        pytest.skip("root may write everywhere, and this file system has no `chattr +i`")
    subprocess.run(["chattr", "-i", str(kept)], check=True)
    return kept, command("chattr", "+i", str(kept)), command("chattr", "-i", str(kept))


async def test_permission_denied(tmp_path, caplog, forbidden):
    await tried(tmp_path, caplog, *forbidden, "ermi")  # "Operation not permitted", "Permission denied"
