"""What an audit of replicas costs the agent (`pytest -m bench -s tests/bench/test_audits.py`).

One vault with a rank whose state is 1.1 GB (fp32 weights and Adam): the process's CPU seconds from the worker's word
until the rank's digest is known, beside one pass of xxh3 over the same bytes, which is the least that it can be; and what a minute of
audits, each followed by the rest that the watchman (hashing.py) is owed for it, takes beside a minute of the watchman alone: seconds of
a core are counted, not the clock's.
"""

from __future__ import annotations

import asyncio
import pathlib
import statistics
import sys
import time

import pytest
import xxhash

sys.path.insert(0, str(pathlib.Path(__file__).parent))
sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "process"))
from resilient_agents.vault import Vault
from told import bound, told

from resilient.checkpoint import memory
from resilient.checkpoint.layout import Layout as Shared
from resilient.checkpoint.layout import Row, Twins
from resilient.checkpoint.ring import Ring
from resilient.checkpoint.slot import Slot
from resilient.checkpoint.snapshot import slot_bytes
from resilient.core.machine import VaultDo
from resilient.core.messages import Layout

pytestmark = [pytest.mark.bench, pytest.mark.timeout(600)]
WIDTH, LAYERS, TIMES, MINUTE_S = 912, 9, 9, 12.0
SHAPES = [(3 * WIDTH, WIDTH), (WIDTH, WIDTH), (4 * WIDTH, WIDTH), (WIDTH, 4 * WIDTH), (WIDTH,), (WIDTH,)]
ROWS = tuple(
    Row(f"optimizer.state.blocks.{layer}.{n}.{kind}", "float32", shape, (0,) * len(shape), shape)
    for layer in range(LAYERS)
    for n, shape in enumerate(SHAPES)
    for kind in ("weight", "exp_avg", "exp_avg_sq")
)
BYTES = sum(row.num_bytes for row in ROWS)
EVERY_S = 5.0  # a twelfth of the default interval, so that a measurement need not last for minutes


class Rank:
    """A worker that seals the same state again and again."""

    def __init__(self, keeper: Vault) -> None:
        made = keeper.allocate(Layout(rank=0, digest="", replicated=True, own_bytes=4096, snapshot_bytes=slot_bytes(64 << 10, 64, BYTES)))
        self.ring = Ring.open(made.slots)
        self.layout = Shared(ROWS, Twins(0, 2)).encode()
        self.step = 0

    def seal(self) -> int:
        self.step += 1
        words = {"run": "run", "rank": 0, "world_size": 2, "round": 1, "layout": self.layout, "own": b""}
        view = self.ring.begin(payload_bytes=BYTES, **words)
        view[0] = self.step % 256
        self.ring.seal(self.step)
        return self.step


async def audit(keeper: Vault, rank: Rank) -> None:
    done = asyncio.Event()
    keeper.watch(lambda: None, copied=lambda _: done.set())
    keeper.audits.begin(0, rank.seal())
    await done.wait()


async def minute(keeper: Vault, rank: Rank, every_s: float) -> float:
    """CPU seconds of a minute in which a snapshot is sealed each second and an audit is due at each `every_s` (0: none)."""
    begin, cpu, audited = time.monotonic(), time.process_time(), 0.0
    while (now := time.monotonic() - begin) < MINUTE_S:
        if every_s and now >= audited:
            audited += every_s
            await audit(keeper, rank)
        else:
            rank.seal()
        for _ in range(20):
            keeper.poke()
            await asyncio.sleep(0.05)
    return (time.process_time() - cpu) * 60.0 / (time.monotonic() - begin)


async def measure(directory: pathlib.Path) -> tuple[list[float], list[float], list[float]]:
    keeper = Vault(run="run", directory=directory, key=memory.new_key(), checkpoint_url="", checkpoint_every=0, token="t" * 16, node="n0")
    await keeper.start()
    try:
        rank = Rank(keeper)
        keeper.do(VaultDo(ranks=(0,), world_size=2))
        cost, least = [], []
        for _ in range(TIMES):
            cpu = time.process_time()
            await audit(keeper, rank)
            cost.append(time.process_time() - cpu)
            slot = Slot(keeper.snapshot_path(0, rank.step), writable=False, populate=True)
            cpu, body = time.process_time(), slot.body()
            for at in range(0, len(body), 4 << 20):
                xxhash.xxh3_128(body[at : at + (4 << 20)]).digest()
            least.append(time.process_time() - cpu)
            del body
            slot.close()
        keeper._hashing._again_at = 0.0
        minutes = [await minute(keeper, rank, every_s) for every_s in (0.0, EVERY_S, 0.0, EVERY_S)]
        return cost, least, minutes
    finally:
        await keeper.close()


def test_what_an_audit_costs() -> None:
    directory = pathlib.Path("/dev/shm")
    cost, least, minutes = asyncio.run(measure(directory))
    one, pass_s = statistics.median(cost), statistics.median(least)
    rows = [
        {"what": "an audit, CPU s", "median": round(one, 3), "max": round(max(cost[2:]), 3)},
        {
            "what": "the first of each slot: its pages are mapped",
            "median": round(statistics.median(cost[:2]), 3),
            "max": round(max(cost[:2]), 3),
        },
        {"what": "a pass of xxh3, CPU s", "median": round(pass_s, 3), "max": round(max(least), 3)},
        {
            "what": "the vault without audits, CPU s a minute",
            "median": round(statistics.median(minutes[::2]), 2),
            "max": round(max(minutes[::2]), 2),
        },
        {"what": f"with one each {EVERY_S:g} s", "median": round(statistics.median(minutes[1::2]), 2), "max": round(max(minutes[1::2]), 2)},
    ]
    bounds = [
        bound("an audit / a pass of xxh3", one / pass_s, at_most=1.3),
        bound("one a minute, % of a core", 100 * one / 60, at_most=1.0),
    ]
    told("audits", rows, bytes=BYTES, tensors=len(ROWS), bounds=bounds)
