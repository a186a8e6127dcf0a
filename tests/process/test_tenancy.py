"""Tenancy: who may write under a URL, with claims of living, dead and far-away runs."""

from __future__ import annotations

import asyncio
import os
import pathlib
import subprocess
import sys
import time

import msgspec
import pytest
from resilient_agents import tenancy
from resilient_agents.tenancy import FILE, Tenancy, Tenant

from resilient.errors import ConfigError

pytestmark = pytest.mark.process


@pytest.fixture(autouse=True)
def hurry(monkeypatch):
    monkeypatch.setattr(tenancy, "BEAT_S", 0.1)
    monkeypatch.setattr(tenancy, "SILENCE_S", 1.0)
    monkeypatch.setattr(tenancy, "POLL_S", 0.05)


@pytest.fixture
def process():
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]) as found:
        yield found
        found.kill()


def left(where: pathlib.Path, **words) -> Tenant:
    """What a run that was killed left there."""
    here = Tenant("0123", "other", "far", tenancy._place(), os.getpid(), tenancy._born(os.getpid()))
    found = msgspec.structs.replace(here, **words)
    where.mkdir(exist_ok=True)
    (where / FILE).write_bytes(tenancy.encode(found))
    return found


async def test_claimed_held_released(tmp_path):
    ours = Tenancy(str(tmp_path), "run")
    await ours.claim()
    ours.hold(pytest.fail)
    beat = tenancy._tenant((tmp_path / FILE).read_bytes()).beat
    await asyncio.sleep(0.5)
    assert tenancy._tenant((tmp_path / FILE).read_bytes()).beat > beat
    with pytest.raises(ConfigError, match=rf"one run per URL expected, run run \(process {os.getpid()} on .*IN-USE\.json"):
        await Tenancy(str(tmp_path), "again").claim()
    await ours.release()
    assert list(tmp_path.iterdir()) == []


async def test_a_process_that_is_gone_holds_up_nobody(tmp_path, process):
    left(tmp_path, pid=process.pid, born=tenancy._born(process.pid))
    with pytest.raises(ConfigError):
        await Tenancy(str(tmp_path), "run").claim()
    process.kill()  # and not waited for: a zombie is gone, too
    await asyncio.to_thread(os.waitid, os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    begin = time.monotonic()
    ours = Tenancy(str(tmp_path), "run")
    await ours.claim()
    assert time.monotonic() - begin < 0.5
    await ours.release()


async def test_a_number_that_another_process_has_now(tmp_path):
    left(tmp_path, born="12")
    ours = Tenancy(str(tmp_path), "run")
    await ours.claim()
    await ours.release()


@pytest.mark.parametrize("garbage", [False, True])
async def test_far_away_only_signs_of_life_count(tmp_path, garbage):
    left(tmp_path, place="elsewhere")
    if garbage:
        (tmp_path / FILE).write_bytes(b"{")
    os.utime(tmp_path / FILE, (4e9, 4e9))  # a clock that goes wrong says nothing
    told, ours, begin = [], Tenancy(str(tmp_path), "run"), time.monotonic()
    await ours.claim(told.append)
    assert time.monotonic() - begin > 0.9
    assert len(told) == 1 and ("somebody unknown" if garbage else "run other") in told[0]
    await ours.release()
    claiming = asyncio.create_task(Tenancy(str(tmp_path), "run").claim())
    left(tmp_path, place="elsewhere")
    await asyncio.sleep(0.3)
    left(tmp_path, place="elsewhere", beat=1)
    with pytest.raises(ConfigError, match="run other"):
        await claiming


async def test_of_two_at_once_one_stays(tmp_path):
    runs, lost = [Tenancy(str(tmp_path), f"run{i}") for i in range(4)], []
    barrier = asyncio.Barrier(len(runs))

    async def claim(ours: Tenancy) -> None:
        real = ours._write
        ours._write = lambda: _after(barrier, real)  # all have looked before one writes
        await ours.claim()
        ours._write = real
        ours.hold(lost.append)

    await asyncio.gather(*(claim(ours) for ours in runs))
    await asyncio.sleep(1.0)
    assert len(lost) == 3
    assert all("one run per URL expected" in reason for reason in lost)
    for ours in runs:
        await ours.release()
    assert list(tmp_path.iterdir()) == []


async def test_what_was_left_half_written_goes(tmp_path):
    (tmp_path / f"{FILE}.0123abcd.part").write_bytes(b"{")
    ours = Tenancy(str(tmp_path), "run")
    await ours.claim()
    assert [path.name for path in tmp_path.iterdir()] == [FILE]
    await ours.release()


@pytest.mark.parametrize("bit", [None, 5, 200, 900])
async def test_a_damaged_mark_is_mended_by_its_owner_and_ends_nobody(tmp_path, bit):
    ours, lost = Tenancy(str(tmp_path), "run"), []
    await ours.claim()
    data = bytearray((tmp_path / FILE).read_bytes())
    if bit is not None:
        data[bit // 8] ^= 1 << bit % 8
    (tmp_path / FILE).write_bytes(data if bit is not None else b"")
    ours.hold(lost.append)
    with pytest.raises(ConfigError, match="one run per URL expected"):
        await Tenancy(str(tmp_path), "again").claim()
    await asyncio.sleep(0.3)
    assert not lost
    assert tenancy._tenant((tmp_path / FILE).read_bytes()).run == "run"
    await ours.release()
    assert list(tmp_path.iterdir()) == []


async def _after(barrier, work):
    await barrier.wait()
    await work()


async def test_storage_that_does_not_answer_refuses_nobody(tmp_path, caplog):
    place = tmp_path / "kept"
    lost, ours = [], Tenancy(str(place), "run")
    place.touch()  # a file where the directory should be
    await ours.claim()
    ours.hold(lost.append)
    await asyncio.sleep(0.3)
    assert len([record for record in caplog.records if "not claimed" in record.message]) == 1, "told once"
    place.unlink()
    await asyncio.sleep(0.5)
    assert (place / FILE).exists()
    for _ in range(20):  # one claim may be overwritten by a beat that is on its way
        if not lost:
            left(place, nonce="another")
            await asyncio.sleep(0.25)
    assert len(lost) == 1
    await ours.release()
    assert (place / FILE).exists(), "it is not ours"
