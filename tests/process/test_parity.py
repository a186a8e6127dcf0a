"""Parity: a node is lost, and its snapshots are put together from what the others of its group keep."""

from __future__ import annotations

import contextlib
import random
from pathlib import Path

import pytest
from launched import Launched, digests
from test_faults import SLOW, free_port, job
from test_recovery import undisturbed
from test_vault import until, vault

from resilient.checkpoint.layout import Layout as Described
from resilient.checkpoint.layout import Row, Twins, padded
from resilient.checkpoint.parity import PARITY
from resilient.checkpoint.ring import OwnSegment, Ring
from resilient.checkpoint.snapshot import slot_bytes
from resilient.checkpoint.tier import SnapshotKey
from resilient.core.ledger import Copy
from resilient.core.machine import VaultDo
from resilient.core.messages import Fetch, Layout, Member, Rebuild
from resilient.core.rebuild import sources
from resilient.errors import SnapshotMissing

pytestmark = pytest.mark.process

SIZES = (5_000_000, 300_000, 4_999_000, 9_500_064, 100)  # bytes of payload, by rank


def content(rank: int, step: int) -> bytes:
    return random.Random(1000 * rank + step).randbytes(SIZES[rank % len(SIZES)])


class Node:
    """A vault with the ranks that sit there."""

    def __init__(self, keeper, ranks: tuple[int, ...]) -> None:
        self.vault, self.ranks, self.rings, self.own = keeper, ranks, {}, {}
        for rank in ranks:
            room = slot_bytes(300, 100, padded(len(content(rank, 0))))
            segments = keeper.allocate(Layout(rank=rank, digest="", replicated=False, own_bytes=100, snapshot_bytes=room))
            self.rings[rank] = Ring.open(segments.slots)
            self.own[rank] = OwnSegment(segments.own, segments.own_bytes, run="run", rank=rank)

    def seal(self, step: int) -> None:
        for rank, ring in self.rings.items():
            payload = content(rank, step)
            described = Described((Row("w", "uint8", (len(payload),), (0,), (len(payload),)),), Twins(rank)).encode()
            own = b"%d of %d" % (step, rank)
            self.own[rank].write_start(step, own)
            room = padded(len(payload))
            view = ring.begin(run="run", rank=rank, world_size=9, round=1, layout=described, own=own, payload_bytes=room)
            view[: len(payload)] = payload
            view[len(payload) :] = bytes(room - len(payload))
            ring.seal(step)


class Nodes:
    """Several, and what a coordinator would tell them."""

    def __init__(self) -> None:
        self.nodes: dict[str, Node] = {}

    def orders(self) -> None:
        group = tuple(Member(vault=node.vault.address, ranks=node.ranks) for node in self.nodes.values())
        ring = [node.vault.address for node in self.nodes.values()]
        for place, node in enumerate(self.nodes.values()):
            node.vault.do(VaultDo(peers=(ring[(place + 1) % len(ring)],), ranks=node.ranks, group=group))

    def seal(self, step: int) -> None:
        for node in self.nodes.values():
            node.seal(step)

    def poke(self) -> None:
        for node in self.nodes.values():
            node.vault.poke()

    def kept(self, step: int) -> bool:
        return all(node.vault.copied(rank) == step for node in self.nodes.values() for rank in node.ranks)

    async def keep(self, step: int) -> None:
        self.seal(step)
        await until(lambda: self.kept(step), poke=self.poke)

    def fetch(self, rank: int, step: int) -> Fetch:
        """What a coordinator would say whose nodes these are, now that the rank's is lost."""
        copies = {r: (Copy(node=name, seated=True, snapshots=n.rings[r].steps()),) for name, n in self.nodes.items() for r in n.ranks}
        found = sources([rank], {name: node.vault.known().parities for name, node in self.nodes.items()}, copies)
        if step not in found.get(rank, {}):
            raise SnapshotMissing(f"{rank} {step}: {found}")
        at = {name: node.vault.address for name, node in self.nodes.items()}
        stripes, others = found[rank][step]
        rebuild = Rebuild(stripes=tuple((at[n], r) for n, r in stripes), others=tuple((r, at[n]) for r, n in others))
        return Fetch(rank=rank, step=step, tier="peer", source="", round=2, rebuild=rebuild)


@contextlib.asynccontextmanager
async def nodes(where: Path, *ranks: tuple[int, ...], **words):
    async with contextlib.AsyncExitStack() as stack:
        found = Nodes()
        for number, held in enumerate(ranks):
            found.nodes[f"n{number}"] = Node(await stack.enter_async_context(vault(where / f"n{number}", **words)), held)
        found.orders()
        yield found


async def right(newcomer, fetch: Fetch) -> bool:
    """Whether the newcomer's vault puts it together, every byte right; False if it is refused."""
    newcomer.do(VaultDo(fetch=(fetch,), ranks=(fetch.rank,)))
    refused = len(newcomer.known().refused)
    await until(lambda: fetch in newcomer.known().fetched or len(newcomer.known().refused) > refused)
    if fetch not in newcomer.known().fetched:
        return False
    slot = newcomer._memory.slot(SnapshotKey(fetch.rank, fetch.step))
    found = slot.read(run="run", rank=fetch.rank, step=fetch.step, stamped=True)
    payload = content(fetch.rank, fetch.step)
    assert found.payload[: len(payload)] == payload
    assert found.own == b"%d of %d" % (fetch.step, fetch.rank)
    return True


@pytest.mark.parametrize("ranks", [((0,), (1,)), ((0,), (1,), (2,)), ((0, 1), (2, 3), (4,), (5, 6))], ids=["two", "three", "four"])
async def test_whichever_node_is_lost_its_snapshots_come_back(tmp_path, ranks):
    for lost in range(len(ranks)):
        where = tmp_path / f"without-{lost}"
        where.mkdir()
        async with nodes(where, *ranks) as group, vault(where / "new") as newcomer:
            for step in (1, 2, 3):
                await group.keep(step)
            for node in group.nodes.values():
                assert {parity.step for parity in node.vault.known().parities} == {2, 3}
                held = [chest for rank, chest in node.vault._memory.chests.items() if rank >= PARITY]
                others = [len(content(rank, 0)) for other in group.nodes.values() if other is not node for rank in other.ranks]
                room = sum(slot.num_bytes for chest in held for slot in chest.snapshots.slots)
                assert room <= 2 * len(held) * (max(others) / (len(ranks) - 1) + 3 * 4096)
            gone = group.nodes.pop(f"n{lost}")
            await gone.vault._server.close()
            fetches = [group.fetch(rank, step) for rank in gone.ranks for step in (2, 3)]
            for fetch in fetches:
                assert await right(newcomer, fetch)
            survivor = next(iter(group.nodes.values())).vault  # it fetches from itself, too
            assert await right(survivor, fetches[-1])


async def test_the_last_parity_stays_until_the_next_one_is_whole(tmp_path):
    """One rank has not sealed the third step yet: nobody lays it, and the second one serves, all but the first having its older slot."""
    async with nodes(tmp_path, (0,), (1,), (2,)) as group, vault(tmp_path / "new") as newcomer:
        for step in (1, 2):
            await group.keep(step)
        for name in ("n0", "n1"):
            group.nodes[name].seal(3)
        n2 = group.nodes["n2"]  # it has the others' third step, and so is the only one that could lay a parity of it
        await until(lambda: {p.step for p in n2.vault.known().parities} == {2, 3}, poke=group.poke)
        assert {p.step for p in group.nodes["n0"].vault.known().parities} == {1, 2}
        assert group.nodes["n0"].vault.copied(0) == 2
        del group.nodes["n2"]
        assert await right(newcomer, group.fetch(2, 2))
        with pytest.raises(SnapshotMissing):
            group.fetch(2, 3)


async def test_a_changed_group_is_laid_anew_by_itself(tmp_path):
    async with nodes(tmp_path, (0,), (1,), (2,)) as group, vault(tmp_path / "new") as keeper, vault(tmp_path / "newer") as newcomer:
        await group.keep(1)
        await group.keep(2)
        lost = group.nodes.pop("n1")
        assert await right(keeper, group.fetch(1, 2))
        await lost.vault._server.close()
        group.nodes["new"] = Node(keeper, (1,))
        group.orders()
        keeper.watch(lambda: None)
        group.nodes["new"].seal(2)  # as a restored worker does
        await until(lambda: group.kept(2), poke=group.poke)  # nothing else has been sealed since
        del group.nodes["n0"]
        assert await right(newcomer, group.fetch(0, 2))


def flip(slot, share: float) -> None:
    slot._memory[slot.sealed_bytes() - 64 - int(share * 100_000)] ^= 1


@pytest.mark.parametrize("where", ["parity", "content", "stripe"])
async def test_a_bit_flipped_anywhere_is_found_and_the_step_before_is_right(tmp_path, where):
    """In what a keeper has, in what it says of that, in another rank's snapshot: what is put together is not what was sealed."""
    async with nodes(tmp_path, (0,), (1,), (2,)) as group, vault(tmp_path / "new") as newcomer:
        for step in (1, 2):
            await group.keep(step)
        del group.nodes["n0"]
        fetch = group.fetch(0, 2)
        if where == "stripe":
            flip(group.nodes["n2"].rings[2].get(2), 0.5)
        else:
            slot = group.nodes["n1"].vault._memory.slot(SnapshotKey(PARITY, 2))
            if where == "parity":
                flip(slot, 0.1)
            else:
                slot._memory[slot._words[14] - 4000] ^= 1  # between header and payload
        assert not await right(newcomer, fetch)
        (refused,) = newcomer.known().refused
        assert (refused.tier, refused.rank, refused.step) == ("peer", 0, 2)
        assert "not what was" in refused.reason
        assert await right(newcomer, group.fetch(0, 1))


async def test_a_member_that_is_overtaken_or_stops_holds_up_no_later_step(tmp_path):
    async with nodes(tmp_path, (0,), (1,), (2,)) as group:
        await group.keep(1)
        n1 = group.nodes["n1"].vault
        port = n1.port
        await n1._server.close()
        for step in (2, 3, 4):
            group.seal(step)
            for _ in range(5):
                group.poke()
        again = type(n1._server)(n1._memory, n1._notes, token="secret", run="run")
        again.heard = n1._parities.heard
        await again.start(port=port)
        await until(lambda: group.kept(4), poke=group.poke)
        await again.close()


@pytest.mark.parametrize("losses", [1, pytest.param(2, marks=pytest.mark.long)])
def test_a_lost_nodes_shard_comes_back_from_parity(tmp_path: Path, losses: int) -> None:
    """Three nodes, no whole copy of any shard anywhere; one is killed, another one takes its place; and once more, when parity is laid anew."""
    steps = 40 + 40 * (losses - 1)
    one = {"OMP_NUM_THREADS": "1"}  # as torchrun has it for several ranks on one node: sums of floats depend on it
    expected = undisturbed("fsdp", "dropout,sched", world=3, steps=steps)
    head = ["--nnodes", "3", "--nproc-per-node", "1", "--parity", "3", "--rdzv-backend", "c10d", "--log-level", "info"]
    meet = [*head, "--rdzv-endpoint", f"127.0.0.1:{free_port()}", "--rdzv-id", "three"]
    arguments = job(tmp_path, *SLOW, "--hold", "5", kind="fsdp", steps=steps)
    with contextlib.ExitStack() as stack:
        started = []

        def start() -> Launched:
            started.append(Launched(tmp_path, meet, "job.py", arguments, name=f"node{len(started)}", standalone=False, env=one))
            return stack.enter_context(started[-1])

        first = [start() for _ in range(3)]
        host = first[0].until(lambda: next((run for run in first if run.events("run_started")), None), "the run to start")
        living = [run for run in first if run is not host]
        host.until(lambda: host.status()["ranks"] and all(row["step"] >= 0 for row in host.status()["ranks"]), "the first step")
        (tmp_path / "go").touch()
        for loss in range(losses):
            host.until_step(8 + 40 * loss)
            living.pop(0).kill_all()
            living.append(start())
            host.until(lambda loss=loss: len(host.incidents()) > loss, "the incident to be closed")
        assert host.wait() == 0, host.text()
        for run in started[3:]:
            assert "was put together from parity" in run.text(), run.text()
    for incident in host.incidents():
        assert incident["cause"] == "node_lost"
        assert incident["steps_lost"] <= 1, incident
    assert tuple(digests(tmp_path, 3)) == expected
