"""What a dead agent left in memory: who is given it, what of it is believed, and when it goes."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import shutil
import sys
from pathlib import Path

import msgspec
import pytest
from resilient_agents.vault import Vault
from test_vault import killed, layout, right, seed

from resilient.checkpoint import deed, memory
from resilient.checkpoint.ring import OwnSegment, Ring
from resilient.checkpoint.slot import Slot
from resilient.core.machine import VaultDo

pytestmark = pytest.mark.process

OWNER = """
import asyncio, sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from resilient.checkpoint import memory
from resilient.core.machine import VaultDo
from resilient_agents.vault import Vault
from test_vault import Worker, layout, until
async def main(directory, node, *ranks):
    ranks = tuple(map(int, ranks))
    vault = Vault(run="run", directory=directory, key=memory.new_key(), checkpoint_url="", checkpoint_every=0, token="t", node=node, keep_s=600)
    await vault.start()
    workers = [Worker(vault, layout(rank)) for rank in ranks]
    if ranks:
        vault.do(VaultDo(ranks=ranks, world_size=4, round=3, step=0, node_rank=1))
    for step in (5, 6):
        for worker in workers:
            worker.step(step)
        for worker in workers:
            await until(lambda: all(slot.is_stamped() for slot in worker.ring.slots if slot.sealed_step() >= 0), poke=vault.poke)
    vault.poke()
    print("ready", flush=True)
    await asyncio.sleep(600)
asyncio.run(main(*sys.argv[2:]))
"""


def dead(directory: Path, node: str = "n0", *ranks: int) -> None:
    """An agent lived here, and was killed."""
    directory.mkdir(exist_ok=True)
    with killed([sys.executable, "-c", OWNER, str(Path(__file__).parent), str(directory), node, *map(str, ranks)]):
        pass


def two_dead(directory: Path) -> None:
    """Two agents lived here at the same time."""
    directory.mkdir()
    command = [sys.executable, "-c", OWNER, str(Path(__file__).parent), str(directory)]
    with killed([*command, "n0", "0", "1"]), killed([*command, "n1", "2", "3"]):
        pass


@contextlib.asynccontextmanager
async def heir(directory: Path, node: str = "n0", *, run: str = "run", keep_s: float = 600.0, alone: bool = True):
    """Its successor; how it is closed is the test's affair."""
    found = Vault(
        run=run,
        directory=directory,
        key=memory.new_key(),
        checkpoint_url="",
        checkpoint_every=0,
        token="t",
        node=node,
        keep_s=keep_s,
        alone=alone,
    )
    await found.start()
    try:
        yield found
    finally:
        await found.close(unlink=True)


def steps(keeper: Vault) -> dict[int, tuple[int, ...]]:
    """rank -> snapshots that it has."""
    return {holding.rank: holding.snapshots for holding in keeper.known().holdings}


def left(directory: Path) -> list[str]:
    return sorted(path.name.rpartition(".")[2] for path in directory.glob("resilient.*"))


async def test_a_successor_has_all_that_was_sealed(tmp_path):
    dead(tmp_path / "shm", "n0", 2, 3)
    async with heir(tmp_path / "shm") as keeper:
        known = keeper.known()
        assert steps(keeper) == {2: (5, 6), 3: (5, 6)}
        assert all(holding.native and (holding.own_steps, holding.gate_step) == ((5, 6), 7) for holding in known.holdings)
        assert (known.past, keeper.heir.position) == (1, 1)
        before = Path(keeper.snapshot_path(2, 6))
        segments = keeper.allocate(layout(2))
        assert str(before) in segments.slots, "the chair's new worker is given the same files"
        ring = Ring.open(segments.slots)
        assert right(ring.get(6).read(run="run", rank=2, stamped=True).payload, 6)
        ring.close()
    assert left(tmp_path / "shm") == []


async def test_no_flipped_byte_is_believed(tmp_path):
    """Any byte of any segment: what is told of afterwards is right, or it is told of no more."""
    number = random.SystemRandom().randrange(1 << 30)
    print(f"seed {number}")
    dice, lost = random.Random(number), 0
    dead(tmp_path / "shm", "n0", 0)
    for trial in range(40):
        copy = tmp_path / f"copy{trial}"
        shutil.copytree(tmp_path / "shm", copy, ignore=shutil.ignore_patterns("*.socket"))
        file = dice.choice(sorted(copy.glob("*rank-0.*")))
        data = bytearray(file.read_bytes())
        data[dice.choice((dice.randrange(256), dice.randrange(len(data))))] ^= 1 << dice.randrange(8)
        file.write_bytes(data)
        async with heir(copy) as keeper:
            lost += steps(keeper) != {0: (5, 6)} or keeper.seals(0)[:2] != (6, 7)
            for step in steps(keeper).get(0, ()):
                slot = Slot(keeper.snapshot_path(0, step), writable=False)
                found = slot.read(run="run", rank=0, step=step, stamped=True)
                assert right(found.payload, step), (file, trial)
                del found
                slot.close()
            path, own_bytes = keeper.own_segment(0)
            own = OwnSegment(path, own_bytes, run="run", rank=0, writable=False)
            assert all(own.read_start(step) == seed(step) for step in own.starts.steps())
            own.close()
    assert lost > 10, "most flips hit what counts"


async def test_torn_and_truncated_ones_are_nobodys(tmp_path):
    dead(tmp_path / "shm", "n0", 0, 1)
    slots = sorted((tmp_path / "shm").glob("*rank-0.slot-*"))
    ring = Ring.open([str(path) for path in slots])
    ring.begin(run="run", rank=0, world_size=1, round=1, layout=b"", own=b"", payload_bytes=64)  # its writer was killed here
    ring.close()
    (short,) = (tmp_path / "shm").glob("*rank-1.own")
    os.truncate(short, 1000)
    os.truncate(next((tmp_path / "shm").glob("*rank-1.slot-1")), 100)
    async with heir(tmp_path / "shm") as keeper:
        assert steps(keeper)[0] == (6,)
        assert len(steps(keeper)[1]) == 1
        assert keeper.allocate(layout(1)).error == "", "and there is room again"
    assert left(tmp_path / "shm") == []


async def test_nobody_else_is_given_it_and_it_goes_when_it_is_old(tmp_path):
    directory = tmp_path / "shm"
    dead(directory, "n0", 0)
    files = left(directory)
    async with heir(directory, run="another") as keeper, heir(directory, run="run", keep_s=0.0) as careless:
        assert steps(keeper) == steps(careless) == {}
    assert left(directory) == files
    (key,) = memory.owners(directory)
    slip = deed.read(directory, key)
    assert slip is not None
    deed.write(directory, key, msgspec.structs.replace(slip, seen_s=deed.now_s() - 601.0))
    async with heir(directory) as keeper:
        assert steps(keeper) == {}
    assert left(directory) == []


async def test_two_heirs_at_once(tmp_path):
    directory = tmp_path / "shm"
    two_dead(directory)
    async with contextlib.AsyncExitStack() as stack:
        names = ("n1", "n0", "n0")
        keepers = await asyncio.gather(*(stack.enter_async_context(heir(directory, name, alone=False)) for name in names))
        held = [sorted(steps(keeper)) for keeper in keepers]
        assert held[0] == [2, 3]
        assert sorted(held[1:]) == [[], [0, 1]]
    assert left(directory) == []


async def test_the_only_node_is_given_what_two_have_left(tmp_path):
    directory = tmp_path / "shm"
    two_dead(directory)
    async with heir(directory) as keeper:
        assert sorted(steps(keeper)) == [0, 1, 2, 3]


async def test_an_heir_that_dies_as_well_has_an_heir(tmp_path):
    directory = tmp_path / "shm"
    dead(directory, "n0", 0)
    dead(directory, "n0")  # took it over, and sealed nothing
    async with heir(directory, alone=False) as keeper:
        assert steps(keeper) == {0: (5, 6)}
        assert keeper.known().holdings[0].native
    assert left(directory) == []


async def test_an_agent_that_ends_without_its_run_leaves_what_is_in_memory(tmp_path):
    directory = tmp_path / "shm"
    dead(directory, "n0", 0)
    async with heir(directory) as keeper:
        (key,) = set(memory.owners(directory)) - {keeper.heir._key}
        await keeper.close(unlink=False)
        assert set(memory.segments(directory, key)) == {"deed", "lock", "rank-0.own", "rank-0.slot-0", "rank-0.slot-1"}
        assert set(left(directory)) == {"own", "slot-0", "slot-1", "deed", "lock"}, "neither pages nor a socket"


async def test_nothing_is_taken_from_a_worker_that_still_writes(tmp_path, monkeypatch):
    directory = tmp_path / "shm"
    dead(directory, "n0", 0)
    (key,) = memory.owners(directory)
    page = memory.segment_path(directory, key, "page.n0.1")
    code = "import sys, time; from resilient.wire.page import Page; page = Page(sys.argv[1], create=True); page.occupy()"
    with killed([sys.executable, "-c", f"{code}; print('ready', flush=True); time.sleep(600)", page]) as worker:
        monkeypatch.setattr(deed, "DYING_S", 0.2)
        async with heir(directory) as keeper:
            assert steps(keeper) == {}
        monkeypatch.setattr(deed, "DYING_S", 60.0)
        asyncio.get_running_loop().call_later(0.3, worker.kill)
        async with heir(directory) as keeper:
            assert steps(keeper) == {0: (5, 6)}


async def test_who_lives_comes_before_what_waits_for_the_dead(tmp_path, monkeypatch):
    directory = tmp_path / "shm"
    dead(directory, "n0", 0)
    found = memory.room.left(directory)
    monkeypatch.setattr(memory.room, "left", lambda _: found._replace(num_bytes=0 if list(directory.glob("*rank-0.own")) else 1 << 40))
    async with heir(directory, run="another") as keeper:
        assert keeper.allocate(layout(7)).error == ""
        assert not list(directory.glob("*rank-0.*"))


async def test_what_was_sealed_of_a_future_that_will_not_be_is_never_mixed_in(tmp_path):
    """The run goes on from step 5; a copy of step 6 that no worker here will write over must not be found later."""
    directory = tmp_path / "shm"
    dead(directory, "n0", 0)
    async with heir(directory) as keeper:
        keeper.do(VaultDo(ranks=(1,), world_size=4, round=4, step=5))
        assert steps(keeper) == {0: (5,)}
        keeper.do(VaultDo(ranks=(1,), world_size=4, round=4, step=3))
        assert steps(keeper) == {0: (5,)}, "said once in a round"
