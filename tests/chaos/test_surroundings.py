"""What surrounds a run goes wrong: the disk is full, read-only, forbidden; the clock is set back; the mark of another run is damaged.

What storage may do to a vault, operation by operation, is in tests/process: test_storage_faults.py, test_s3.py, test_tenancy.py
(`make faults` runs them as well). Here a whole run goes on, ends with the bits of an undisturbed one, and can be gone on with.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import pathlib
import random
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator

import pytest
import sealing
import tally
from launched import digests
from resilient_agents import tenancy
from resilient_agents.tenancy import FILE, Tenancy
from test_killed import WORLD, acknowledged, check, flags, job, launched, undisturbed

from resilient.checkpoint.disk import DiskTier
from resilient.checkpoint.source import Whole
from resilient.checkpoint.tier import SnapshotKey
from resilient.errors import ConfigError, TierUnavailable

pytestmark = pytest.mark.process
STEPS = 60


@pytest.fixture
def small(tmp_path: pathlib.Path) -> Iterator[pathlib.Path]:
    """A file system of 1 MiB: five checkpoints of this job."""
    directory = tmp_path / "small"
    directory.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(directory)]
    if os.geteuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small tmpfs needs root and CAP_SYS_ADMIN")
    yield directory
    subprocess.run(["umount", "-l", str(directory)], check=True)


def remount(small: pathlib.Path, how: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{how}", str(small)], check=True)


TROUBLE: dict[str, tuple[Callable[[pathlib.Path], object], Callable[[pathlib.Path], object], str]] = {
    "disk full": (
        lambda small: (small / "ballast").write_bytes(bytes(free(small))),
        lambda small: (small / "ballast").unlink(),
        "No space left on device",
    ),
    "disk read-only": (lambda small: remount(small, "ro"), lambda small: remount(small, "rw"), "Read-only file system"),
}


def free(small: pathlib.Path) -> int:
    found = os.statvfs(small)
    return found.f_bavail * found.f_bsize


@pytest.mark.long
@pytest.mark.parametrize("trouble", TROUBLE)
def test_a_disk_that_takes_nothing_for_a_while(small: pathlib.Path, tmp_path: pathlib.Path, trouble: str) -> None:
    begin, end, reason = TROUBLE[trouble]
    kept, out = small / "kept", tmp_path / "out"
    with launched(tmp_path, flags(kept), job(out, "fsdp", STEPS, "--hold", "30"), "run") as run:
        run.until(lambda: len(acknowledged(run)) >= 3, "three checkpoints")
        begin(small)
        before = acknowledged(run)
        out.mkdir(exist_ok=True)
        (out / "go").touch()
        run.until(lambda: reason in run.text(), "the trouble to be told")
        check(kept, before | acknowledged(run))
        end(small)
        assert run.wait() == 0, run.text()
    (line, *_) = [line for line in run.text().splitlines() if reason in line]
    assert str(small) in line
    assert tuple(digests(out, WORLD)) == undisturbed("fsdp", STEPS)
    check(kept, acknowledged(run))
    tally.count("resilient-run, fsdp", trouble, "survived")


@pytest.fixture
def public() -> Iterator[pathlib.Path]:
    """A directory that everybody may enter; pytest's own are for their owner."""
    with tempfile.TemporaryDirectory() as name:
        pathlib.Path(name).chmod(0o755)
        yield pathlib.Path(name)


def test_permission_is_denied(public: pathlib.Path) -> None:
    """To somebody else than root, who may everything: a file that may not be read is no damage, and nothing is written that may not be."""
    if os.geteuid():
        pytest.skip("only root can become somebody else")
    copy, newer = (sealing.sealed(public, 0, step, b"payload", world_size=1) for step in (5, 6))
    kept = public / "kept"
    tier = DiskTier(str(kept))
    tier.commit(5, [tier.write(SnapshotKey(0, 5), Whole(copy))], run="run")
    file = kept / "step-00000005/rank-00000.distcp"

    def trial() -> list[str]:
        found = []
        for work in (
            lambda: tier.write(SnapshotKey(0, 6), Whole(newer)),
            lambda: tier.drop(SnapshotKey(0, 5)),
            lambda: tier.get(SnapshotKey(0, 5), bytearray(1 << 16)),
        ):
            try:
                work()
            except TierUnavailable as error:
                found.append(str(error))
            else:
                found.append("")
        return found

    file.chmod(0)
    denied = as_nobody(trial)
    file.chmod(0o644)
    assert all("Permission denied" in text and str(kept) in text and "\n" not in text for text in denied), denied
    assert as_nobody(trial)[2] == ""
    tier.verify(5)
    assert tier.steps() == (5,)
    for _ in denied:
        tally.count("persistent tier", "permission denied (another user)", "survived")


def as_nobody(work: Callable[[], list[str]]) -> list[str]:
    """What it gives in a process of another user."""
    read_end, write_end = os.pipe()
    pid = os.fork()
    if not pid:
        code = 1
        with contextlib.suppress(BaseException):
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
            os.write(write_end, "\0".join(work()).encode())
            code = 0
        os._exit(code)
    os.close(write_end)
    with os.fdopen(read_end, "rb") as pipe:
        said = pipe.read().decode()
    assert os.waitpid(pid, 0)[1] == 0, said
    return said.split("\0")


@pytest.mark.long
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_the_clock_is_set_back_by_an_hour(tmp_path: pathlib.Path, kind: str) -> None:
    """In the middle of a run, in all of its processes; a rank and then everything is killed after that, and the same command goes on."""
    kept, out = tmp_path / "kept", tmp_path / "out"
    steps = 150
    with launched(tmp_path, flags(kept), job(out, kind, steps, "--hold", "100"), "first", clock="4") as run:
        run.until(lambda: (t := [e["t"] for e in run.events()]) and max(t) - t[-1] > 3000, "the clock to be set back")
        run.until(lambda: len(acknowledged(run)) >= 3, "three checkpoints")
        run.signal(1)
        run.until(run.incidents, "the incident to be closed")
        run.kill_all()
        promised = acknowledged(run)
    check(kept, promised)
    out.mkdir(exist_ok=True)
    (out / "go").touch()
    begin = time.time()
    with launched(tmp_path, flags(kept), job(out, kind, steps), "second", clock="0") as run:
        assert run.wait() == 0, run.text()
    assert run.events()[-1]["t"] < begin - 3000
    assert run.events("round_started")[0]["step"] == max(promised), "the newest step, whatever its date"
    assert tuple(digests(out, WORLD)) == undisturbed(kind, steps)
    check(kept, promised | acknowledged(run))
    tally.count(f"resilient-run, {kind}", "clock set back by an hour", "survived")


@pytest.mark.long
@pytest.mark.parametrize("trials", [200])
async def test_the_mark_of_a_living_run_is_damaged(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, trials: int) -> None:
    """IN-USE.json: whatever has become of it, its owner goes on and mends it, and a second run is refused."""
    monkeypatch.setattr(tenancy, "BEAT_S", 0.1)
    monkeypatch.setattr(tenancy, "SILENCE_S", 1.0)
    monkeypatch.setattr(tenancy, "POLL_S", 0.05)
    number = int(os.environ.get("CHAOS_SEED", random.SystemRandom().randrange(10**6)))
    print(f"seed {number}")
    dice = random.Random(number)

    def damage(data: bytes) -> tuple[str, bytes]:
        at = dice.randrange(len(data))
        return dice.choice(
            [
                ("a byte flipped", data[:at] + bytes([data[at] ^ dice.randrange(1, 256)]) + data[at + 1 :]),
                ("cut short", data[:at]),
                ("zeros", bytes(len(data))),
            ]
        )

    async def one(place: pathlib.Path) -> None:
        first, second, lost = Tenancy(str(place), "first"), Tenancy(str(place), "second"), asyncio.Queue[str]()
        await first.claim()
        deed, spoilt = damage(read(place / FILE))
        (place / FILE).write_bytes(spoilt)
        first.hold(lost.put_nowait)
        refused = ""
        try:
            await second.claim()
            second.hold(lost.put_nowait)
        except ConfigError as error:
            refused = str(error)
        await asyncio.sleep(3 * tenancy.BEAT_S)
        one_stays = lost.empty() and "one run per URL expected" in refused and "\n" not in refused
        await first.release()
        await second.release()
        tally.count("IN-USE.json", deed, "found" if one_stays else "WRONG")
        assert one_stays, (deed, refused, lost)

    gate = asyncio.Semaphore(10)

    async def guarded(place: pathlib.Path) -> None:
        async with gate:
            await one(place)

    async with asyncio.TaskGroup() as group:
        for number in range(trials):
            group.create_task(guarded(tmp_path / "kept" / str(number)))


def read(path: pathlib.Path) -> bytes:
    return path.read_bytes()
