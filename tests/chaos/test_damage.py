"""Damage to every kind of file and segment of a checkpoint: never wrong data, and the copy before it is used.

Each trial damages one place of real files, loads as a run does that starts (newest step first, all ranks, then the step before), and
compares every byte with what was there before the damage. Positions come from a printed seed (CHAOS_SEED=n repeats them). CI tries some
hundred; `make faults` as many thousands.
"""

from __future__ import annotations

import contextlib
import os
import pathlib
import random
import shutil
from collections.abc import Callable, Iterator

import msgspec
import numpy as np
import pytest
import tally
import test_estate
from launched import Launched
from test_vault import PAYLOAD, Worker, layout, right, until, vault

from resilient.checkpoint import afar
from resilient.checkpoint import tally as piecewise
from resilient.checkpoint.disk import DiskTier
from resilient.checkpoint.layout import Row, Twins
from resilient.checkpoint.layout import decode as described
from resilient.checkpoint.peer import Peer
from resilient.checkpoint.ring import OwnSegment, Ring
from resilient.checkpoint.slot import Slot
from resilient.checkpoint.snapshot import parse
from resilient.checkpoint.source import Whole
from resilient.checkpoint.tier import SnapshotKey
from resilient.core.machine import VaultDo
from resilient.core.messages import Fetch
from resilient.errors import CheckpointError

pytestmark = pytest.mark.process
WORLD, STEPS = 2, (2, 4, 6)
LARGE = 64 << 10
FEW, MANY = 12, 300  # trials of each kind
TRIALS = [pytest.param(FEW, id="some"), pytest.param(MANY, id="many", marks=[pytest.mark.long, pytest.mark.timeout(900)])]


@pytest.fixture
def dice() -> random.Random:
    number = int(os.environ.get("CHAOS_SEED", random.SystemRandom().randrange(10**6)))
    print(f"seed {number}")
    return random.Random(number)


# --------------------------------------------------------------------------- what can happen to bytes


def flipped(data: bytes, dice: random.Random, number: int) -> bytes:
    """One byte: the first, the last, then any."""
    spoilt = bytearray(data)
    spoilt[(0, len(data) - 1)[number] if number < 2 else dice.randrange(len(data))] ^= dice.randrange(1, 256)
    return bytes(spoilt)


def cut(data: bytes, dice: random.Random, number: int) -> bytes:
    return data[: (0, len(data) - 1)[number] if number < 2 else dice.randrange(len(data))]


def blanked(data: bytes, dice: random.Random, number: int) -> bytes:
    """A page or sixteen that were never written."""
    size = (LARGE, 4096)[number % 2]
    begin = dice.randrange(len(data)) // 4096 * 4096
    return data[:begin] + bytes(len(data[begin : begin + size])) + data[begin + size :]


def grown(data: bytes, dice: random.Random, number: int) -> bytes:
    return data + dice.randbytes(1 if number == 0 else dice.randrange(1, 5000))


DEEDS: dict[str, Callable[[bytes, random.Random, int], bytes]] = {
    "a byte flipped": flipped,
    "cut short": cut,
    "zeros": blanked,
    "bytes appended": grown,
}


@contextlib.contextmanager
def replaced(path: pathlib.Path, data: bytes | None) -> Iterator[None]:
    """For a while these are the file's bytes; None: it is not there."""
    before = path.read_bytes()
    try:
        path.unlink() if data is None else path.write_bytes(data)
        yield
    finally:
        path.write_bytes(before)


# --------------------------------------------------------------------------- the persistent tier


class Kept:
    """Checkpoints under one directory, and what is in them."""

    def __init__(self, directory: pathlib.Path) -> None:
        self.directory = directory
        self.truth = {step: loaded(DiskTier(str(directory)), step) for step in STEPS}

    def file(self, step: int, name: str) -> pathlib.Path:
        return self.directory / f"step-{step:08d}" / name

    def outcome(self) -> str:
        """What a run that starts now makes of it."""
        tier = DiskTier(str(self.directory))
        for step in sorted(tier.steps(), reverse=True):
            try:
                found = loaded(tier, step)
            except CheckpointError as error:
                assert "\n" not in str(error)
                assert str(self.directory) in str(error), f"which file is it? {error}"
                continue
            if found != self.truth[step]:
                return "WRONG"
            if step != STEPS[-1]:
                return "found" if step == STEPS[-2] else "WRONG"
            try:
                tier.verify(step)
            except CheckpointError as error:
                assert "\n" not in str(error)
                return "verify"
            return "harmless"
        return "WRONG"

    def tried(self, place: str, deed: str) -> str:
        outcome = self.outcome()
        tally.count(place, deed, outcome)
        return outcome


def loaded(tier: DiskTier, step: int) -> tuple[bytes, ...]:
    """The snapshots of all ranks."""
    found = []
    for rank in range(WORLD):
        into = bytearray(4 << 20)
        found.append(bytes(into[: tier.get(SnapshotKey(rank, step), into)]))
    return tuple(found)


def written(where: pathlib.Path, steps: dict[int, tuple[bytes, ...]], *, level: int = 0) -> Kept:
    """These snapshots as checkpoints under another directory."""
    tier = DiskTier(str(where), level=level)
    for step, copies in steps.items():
        tier.commit(step, [tier.write(SnapshotKey(rank, step), Whole(copy)) for rank, copy in enumerate(copies)], run="another")
    return Kept(where)


def foreign(where: pathlib.Path, copy: bytes) -> bytes:
    """The snapshot as another run of the same program, with other data, would have it."""
    found = parse(copy)
    path = where / "foreign"
    path.write_bytes(bytes(len(copy)))
    slot = Slot(str(path))
    sizes = {"rank": found.rank, "world_size": found.world_size, "round": found.round, "payload_bytes": len(found.payload)}
    view = slot.begin(run="another", layout=found.layout, own=found.own, **sizes)
    view[:] = found.payload
    for begin, length in described(found.layout).places():
        view[begin : begin + length] = bytes(255 - byte for byte in view[begin : begin + length])
    slot.seal(found.step)
    other = memoryview(bytearray(len(copy)))
    slot.stage(other)
    slot.close()
    return bytes(other)


@pytest.fixture(scope="module", params=["fsdp", pytest.param("ddp", marks=pytest.mark.long)])
def real(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Kept:
    """The checkpoints of a run."""
    where = tmp_path_factory.mktemp(request.param)
    features = "bn,dropout,sched" if request.param == "ddp" else "dropout,sched"
    arguments = ["--out", str(where / "out"), "--kind", request.param, "--steps", "7", "--features", features, "--pause", "0.1"]
    flags = ["--nproc-per-node", str(WORLD), "--checkpoint", str(where / "kept"), "--checkpoint-every", "2"]
    with Launched(where, flags, "job.py", arguments) as run:
        assert run.wait() == 0, run.text()
    shutil.rmtree(where / "kept" / "step-00000007", ignore_errors=True)
    for step in STEPS:
        assert (where / "kept" / f"step-{step:08d}" / "COMMIT.json").exists(), run.text()
    return Kept(where / "kept")


@pytest.fixture(params=["", "zstd "])
def kept(request: pytest.FixtureRequest, real: Kept, tmp_path: pathlib.Path) -> tuple[str, Kept]:
    """As they are, and compressed."""
    return (request.param, real if not request.param else written(tmp_path / "packed", real.truth, level=3))


@pytest.mark.parametrize("trials", TRIALS)
def test_a_damaged_file_of_a_checkpoint(kept: tuple[str, Kept], dice: random.Random, trials: int) -> None:
    kind, there = kept
    assert there.outcome() == "harmless"
    for name in ("rank-00000.distcp", "rank-00001.distcp", ".metadata", "COMMIT.json"):
        path = there.file(STEPS[-1], name)
        data, place = path.read_bytes(), f"{kind}{'rank-*.distcp' if name.startswith('rank') else name}"
        for deed, damage in DEEDS.items():
            for number in range(trials):
                spoilt = damage(data, dice, number)
                if spoilt == data:
                    continue  # there were zeros before
                with replaced(path, spoilt):
                    outcome = there.tried(place, deed)
                assert outcome in ({"verify"} if name == ".metadata" else {"found", "harmless"}), (name, deed, number)
                # white space between two words of the manifest; nothing else
                assert outcome != "harmless" or (name == "COMMIT.json" and spoilt.split() == data.split()), (name, deed, number)
        with replaced(path, None):
            assert there.tried(place, "missing") == ("verify" if name == ".metadata" else "found")
    assert there.outcome() == "harmless", "all of it is as it was"


def test_files_that_were_exchanged(kept: tuple[str, Kept], tmp_path: pathlib.Path) -> None:
    """Another rank's, another step's, another run's: each of them sound, and together nobody's state."""
    kind, there = kept
    level = 3 if kind else 0
    other = written(
        tmp_path / "other", {step: tuple(foreign(tmp_path, c) for c in copies) for step, copies in there.truth.items()}, level=level
    )
    assert other.truth[6] != there.truth[6]
    newest, before = STEPS[-1], STEPS[-2]
    names = ("rank-00000.distcp", "rank-00001.distcp", "COMMIT.json", ".metadata")
    for name in names:
        place = f"{kind}{'rank-*.distcp' if name.startswith('rank') else name}"
        expected = "verify" if name == ".metadata" else "found"
        for what, source in (("of another step", there.file(before, name)), ("of another run", other.file(newest, name))):
            same = source.read_bytes() == there.file(newest, name).read_bytes()  # an index of the same shapes may be
            with replaced(there.file(newest, name), source.read_bytes()):
                assert there.tried(place, what) == ("harmless" if same else expected), (name, what)
    one, two = (there.file(newest, name) for name in names[:2])
    with replaced(one, two.read_bytes()), replaced(two, one.read_bytes()):
        assert there.tried(f"{kind}rank-*.distcp", "of another rank") == "found"
    whole = [other.file(newest, name).read_bytes() for name in names]
    for left in range(2):  # a torn mixture: all of another run's but one rank's file
        with contextlib.ExitStack() as stack:
            for number, data in enumerate(whole):
                if number != left:
                    stack.enter_context(replaced(there.file(newest, names[number]), data))
            assert there.tried(f"{kind}rank-*.distcp", "torn mixture of two runs") == "found"
    with contextlib.ExitStack() as stack:  # both steps' directories have each other's name
        for name in names:
            data = [there.file(step, name).read_bytes() for step in (before, newest)]
            stack.enter_context(replaced(there.file(newest, name), data[0]))
            stack.enter_context(replaced(there.file(before, name), data[1]))
        tier = DiskTier(str(there.directory))
        assert list(tier.list()) == [SnapshotKey(rank, STEPS[0]) for rank in range(WORLD)]
        for step in (before, newest):
            with pytest.raises(CheckpointError, match=f"step {step} expected"):
                loaded(tier, step)
        tally.count(f"{kind}step-*", "two steps exchanged", "found")
    assert there.outcome() == "harmless"


@pytest.mark.parametrize("trials", TRIALS)
def test_a_damaged_file_read_by_another_number_of_ranks(
    kept: tuple[str, Kept], dice: random.Random, tmp_path: pathlib.Path, trials: int
) -> None:
    """Cut anew for one rank that has all of it: every byte of every file is used."""
    kind, there = kept
    tier = DiskTier(str(there.directory))
    _, layout = tier.checkpoint(STEPS[-1]).tail(0)
    rows = tuple(Row(row.key, row.dtype, row.shape, (0,) * len(row.shape), row.shape) for row in layout.rows)
    whole = msgspec.structs.replace(layout, rows=rows, twins=Twins(0))

    def cut_anew(step: int) -> bytes:
        def room(num_bytes: int) -> Ring:
            (tmp_path / "slot").write_bytes(bytes(num_bytes))
            return Ring.open([str(tmp_path / "slot")])

        tier.reshape(SnapshotKey(0, step), whole, room, run="run", world_size=1)
        return (tmp_path / "slot").read_bytes()

    truth = {step: cut_anew(step) for step in STEPS}
    for rank in range(WORLD):
        path = there.file(STEPS[-1], f"rank-{rank:05d}.distcp")
        data = path.read_bytes()
        for deed, damage in DEEDS.items():
            for number in range(trials):
                spoilt = damage(data, dice, number)
                if spoilt == data:
                    continue
                with replaced(path, spoilt):
                    try:
                        outcome = "harmless" if cut_anew(STEPS[-1]) == truth[STEPS[-1]] else "WRONG"
                    except CheckpointError as error:
                        assert "\n" not in str(error)
                        outcome = "found" if cut_anew(STEPS[-2]) == truth[STEPS[-2]] else "WRONG"
                tally.count(f"{kind}rank-*.distcp, resharded", deed, outcome)
                assert outcome != "WRONG", (rank, deed, number)


# --------------------------------------------------------------------------- memory


class Segment:
    """One file of the memory tier, and what can be read of it: each of it as it was, or refused."""

    def __init__(self, place: str, path: str, read: Callable[[str], dict[tuple[str, int], bytes]]) -> None:
        self.place, self.path, self._read = place, pathlib.Path(path), read
        self.truth = read(path)
        assert self.truth

    def tried(self, where: pathlib.Path, deed: str, data: bytes) -> str:
        """Opened anew, as a worker does, or an agent that takes it over."""
        copy = where / "spoilt"
        copy.write_bytes(data)
        try:
            found = self._read(str(copy))
        except CheckpointError as error:
            assert "\n" not in str(error)
            found = {}
        sound = all(self.truth.get(key) == value for key, value in found.items())
        outcome = "WRONG" if not sound else "harmless" if found == self.truth else "found"
        tally.count(self.place, deed, outcome)
        return outcome


def slots(rank: int, step: int) -> Callable[[str], dict[tuple[str, int], bytes]]:
    def read(path: str) -> dict[tuple[str, int], bytes]:
        ring, values = Ring.open([path]), {}
        try:
            found = ring.get(step).read(run="run", rank=rank, step=step)
            values = {"own": found.own, "layout": found.layout, "payload": bytes(found.payload)}
            del found
        finally:
            ring.close()
        return {(name, step): value for name, value in values.items()}

    return read


def owns(rank: int, own_bytes: int, starts: tuple[int, ...], gate: int) -> Callable[[str], dict[tuple[str, int], bytes]]:
    def read(path: str) -> dict[tuple[str, int], bytes]:
        own, found = OwnSegment(path, own_bytes, run="run", rank=rank), {}
        for kind, steps, reader in (("start", starts, own.read_start), ("gate", (gate,), own.read_gate)):
            for step in steps:
                with contextlib.suppress(CheckpointError):
                    found[kind, step] = reader(step)
        own.close()
        return found

    return read


@pytest.mark.parametrize("trials", TRIALS)
async def test_a_damaged_segment(tmp_path: pathlib.Path, dice: random.Random, trials: int) -> None:
    """Own state, both slots, what was fetched for a seated rank, and a peer's copies of all of them."""
    async with vault(tmp_path / "n1") as holder, vault(tmp_path / "n0") as origin, vault(tmp_path / "n2") as newcomer:
        worker = Worker(origin, layout(0))
        origin.do(VaultDo(peers=(holder.address,), ranks=(0,)))
        for step in (4, 5):
            worker.step(step)
            await until(lambda step=step: step in holder.seals(0)[2] and holder.seals(0)[1] == step + 1, poke=origin.poke)
        seated = Worker(newcomer, layout(0, payload=64))  # too small for what comes
        wanted = Fetch(rank=0, step=5, tier="peer", source=holder.address)
        newcomer.do(VaultDo(fetch=(wanted,), ranks=(0,)))
        await until(lambda: newcomer.known().fetched == (wanted,))
        places = {"own": origin.own_segment(0), "peer's own": holder.own_segment(0)}
        segments = [Segment(f"memory: {name}", path, owns(0, size, (4, 5), 6)) for name, (path, size) in places.items()]
        for name, keeper in (("slot", origin), ("peer's slot", holder)):
            segments += [Segment(f"memory: {name}", keeper.snapshot_path(0, step), slots(0, step)) for step in (4, 5)]
        segments.append(Segment("memory: fetched", newcomer.snapshot_path(0, 5), slots(0, 5)))
        assert str(segments[-1].path).endswith("fetched")
        for segment in segments:
            data = segment.path.read_bytes()
            for deed, damage in DEEDS.items():
                for number in range(trials):
                    spoilt = damage(data, dice, number)
                    if spoilt != data:
                        assert segment.tried(tmp_path, deed, spoilt) != "WRONG", (segment.place, deed, number)
        by_place = {(segment.place, key): segment for segment in segments for key in segment.truth}
        one, two = (by_place["memory: slot", ("payload", step)] for step in (4, 5))
        assert one.tried(tmp_path, "of another step", two.path.read_bytes()) == "found"
        worker.own.close()
        del seated


async def test_a_segment_of_another_rank_or_run(tmp_path: pathlib.Path) -> None:
    """The same program, the same step, the same sizes."""
    async with vault(tmp_path / "n0") as origin:
        workers = [Worker(origin, layout(rank)) for rank in range(2)]
        for worker in workers:
            worker.step(5)
        paths = [origin.snapshot_path(rank, 5) for rank in range(2)]
        mine = Segment("memory: slot", paths[0], slots(0, 5))
        assert mine.tried(tmp_path, "of another rank", read(paths[1])) == "found"
        path, own_bytes = origin.own_segment(0)
        own = Segment("memory: own", path, owns(0, own_bytes, (5,), 6))
        assert own.tried(tmp_path, "of another rank", read(origin.own_segment(1)[0])) == "found"
        data = read(mine.path)
        assert mine.tried(tmp_path, "of another run", foreign(tmp_path, data[: parse(data).num_bytes])) == "found"


@pytest.mark.parametrize("trials", TRIALS)
async def test_a_peer_gives_out_nothing_damaged(tmp_path: pathlib.Path, dice: random.Random, trials: int) -> None:
    """Damage in the pages that the holder has mapped, while it serves them; the copy of the step before is still given."""
    async with vault(tmp_path / "n1") as holder, vault(tmp_path / "n0") as origin:
        worker = Worker(origin, layout(0))
        origin.do(VaultDo(peers=(holder.address,), ranks=(0,)))
        for step in (4, 5):
            worker.step(step)
            await until(lambda step=step: step in holder.seals(0)[2], poke=origin.poke)
        peer, into = Peer(holder.address, token="secret", run="run", name="test"), bytearray(2 * PAYLOAD)
        path = pathlib.Path(holder.snapshot_path(0, 5))
        data = read(path)
        for deed, damage in (("a byte flipped", flipped), ("zeros", blanked)):
            for number in range(trials):
                spoilt = damage(data, dice, number)
                if spoilt == data:
                    continue
                in_place(path, spoilt)
                try:
                    count = await peer.get(SnapshotKey(0, 5), into)
                    found = parse(memoryview(into)[:count], rank=0, step=5, stamped=True)
                    sound = right(found.payload[:PAYLOAD], 5) and found.own == parse(data).own
                    outcome = "harmless" if sound else "WRONG"
                except CheckpointError as error:
                    assert "\n" not in str(error)
                    count = await peer.get(SnapshotKey(0, 4), into)
                    outcome = "found" if right(parse(memoryview(into)[:count], stamped=True).payload[:PAYLOAD], 4) else "WRONG"
                finally:
                    in_place(path, data)
                tally.count("memory: peer's slot, served", deed, outcome)
                assert outcome != "WRONG", (deed, number)
        peer.close()


@pytest.mark.parametrize("near", [False, True], ids=["there", "here"])
@pytest.mark.parametrize("trials", TRIALS)
async def test_nothing_damaged_is_cut_for_another_world(
    tmp_path: pathlib.Path, dice: random.Random, trials: int, near: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two old ranks' snapshots, in another node's memory or here, are wanted whole by a new one; damage before and after the first reading."""
    whole = np.arange(6001, dtype="float32").reshape(-1, 17)
    monkeypatch.setattr(test_estate, "WHOLE", {"model.w": whole, "model.b": whole[0], "model.one": np.array(0.5)})
    monkeypatch.setattr(piecewise, "PIECE", 4096)  # so that a tensor has several
    monkeypatch.setattr(afar, "PAUSE_S", 0.001)
    async with vault(tmp_path / "n1") as there, vault(tmp_path / "n0") as here:
        keeper = here if near else there
        for rank in range(2):
            test_estate.leave(keeper, "rows", rank, 2)
        chest = here._memory.chest(7)
        here.do(test_estate.elders(2, there.address))
        for rank in range(2):
            path = pathlib.Path(keeper.snapshot_path(rank, test_estate.STEP))
            data = read(path)
            for deed, damage in (("a byte flipped", flipped), ("zeros", blanked)):
                for number in range(trials):
                    if number % 2:
                        there._server._leaves.clear()
                    spoilt = damage(data[: parse(data).num_bytes], dice, number) + data[parse(data).num_bytes :]
                    in_place(path, spoilt)
                    segments = await test_estate.cut(here, "copies", 7, 9, 2)
                    in_place(path, data)
                    outcome = "found"
                    if not segments.refused:
                        found = chest.sealed("snapshot", 9)[test_estate.STEP].read(rank=7, step=test_estate.STEP)
                        rows = test_estate.described("copies", 7, 9)
                        right_ones = (test_estate.part(row) for row in rows.rows)
                        held = (bytes(found.payload[at : at + length]) for at, length in rows.places())
                        outcome = "harmless" if [*right_ones] == [*held] and found.own == b"own 1" else "WRONG"
                        del found
                    for slot in chest.slots("snapshot"):
                        slot.unseal()
                    place = "here" if near else "there"
                    tally.count(f"memory: old snapshot {place}, cut anew", deed, outcome)
                    assert outcome != "WRONG", (rank, deed, number)
                    assert outcome == "found" or spoilt == data or not near, (rank, deed, number)


def read(path: str | pathlib.Path) -> bytes:
    return pathlib.Path(path).read_bytes()


def in_place(path: pathlib.Path, data: bytes) -> None:
    """The same pages that are mapped."""
    with path.open("r+b") as file:
        file.write(data)
