"""Seeded fleets in bad weather: safety after every step, and when the weather is over, progress.

A seed that fails becomes a golden scenario in the same change. Play one by hand: World(...), storm(...), print(world.trace.tail()).
"""

from __future__ import annotations

import random

import pytest

from resilient.core.machine import Asked, Stop
from resilient.core.rescue import newest_common
from resilient.sim.faults import FAULTS, KINDS, heal, storm
from resilient.sim.script import Segment
from resilient.sim.world import Spec, World

BLOCK = 20  # seeds per test: the report stays short


def weather(seed: int) -> tuple[World, list[tuple[float, str]]]:
    """A small fleet and what will happen to it."""
    draw = random.Random(seed)
    nodes = draw.choice([1, 1, 2, 3])
    snapshots = draw.random() < 0.5
    spec = Spec(
        nodes=nodes,
        slots=draw.choice([1, 2, 3]),
        standbys=draw.choice([0, 1, 2, 3]) if nodes == 1 else 3,
        spare_nodes=draw.choice([0, 1]) if nodes > 1 else 0,
        steps=60,
        replicated=draw.random() < 0.5,
        snapshots=snapshots,
        persist_every=draw.choice([0, 10]) if snapshots else 0,
        loss=draw.choice([0.0, 0.0, 0.2]),
    )
    world = World(spec, seed)
    return world, storm(world, draw.randint(1, 6), 6.0, KINDS)


@pytest.mark.parametrize("block", range(10))
def test_after_the_storm_the_run_finishes(block):
    for seed in range(block * BLOCK, (block + 1) * BLOCK):
        world, faults = weather(seed)
        world.run(6.0, world.over)
        heal(world)
        assert world.run(150.0, world.over), f"seed {seed}: no progress after {faults}\n{world.trace.tail()}"
        assert world.finish is not None
        assert world.finish.exit_code == 0, f"seed {seed}: {world.finish} after {faults}\n{world.trace.tail()}"


@pytest.mark.parametrize("block", range(5))
def test_nothing_is_lost_while_a_copy_lives(block):
    """One node, snapshots at every step: whatever happens to processes, no completed step is done again."""
    kinds = ("kill", "kill_successor", "kill_standby", "exception", "torn", "store", "zygote", "stop")
    for seed in range(block * BLOCK, (block + 1) * BLOCK):
        draw = random.Random(seed)
        spec = Spec(slots=draw.choice([2, 3, 4]), standbys=draw.choice([0, 1, 2]), steps=60, replicated=draw.random() < 0.5, snapshots=True)
        world = World(spec, seed)
        storm(world, draw.choice([1, 2, 4]), 6.0, kinds)
        world.run(6.0, world.over)
        heal(world)
        assert world.run(150.0, world.over), f"seed {seed}\n{world.trace.tail()}"
        assert [line.steps_lost for line in world.invariants.closed if line.steps_lost] == [], f"seed {seed}\n{world.trace.tail()}"


def test_kills_in_the_set_up_take_nobody_else_with_them():
    for seed in range(100):
        draw = random.Random(seed)
        replicated = draw.random() < 0.5
        world = World(Spec(slots=4, steps=10, setup_s=0.3, replicated=replicated, snapshots=not replicated), seed)
        faults = storm(world, draw.choice([1, 2, 3]), 1.2, ("kill",))
        assert world.run(60.0, world.over), f"seed {seed}: {faults}\n{world.trace.tail()}"
        assert world.finish is not None
        assert world.finish.exit_code == 0, f"seed {seed}: {faults}\n{world.trace.tail()}"
        assert world.coordinator.round.restart == 0, f"seed {seed}: the group was started again\n{world.trace.tail()}"


def test_twenty_kills_in_one_run():
    for seed in range(5):
        world = World(Spec(slots=4, standbys=1, steps=300, snapshots=True), seed)
        storm(world, 20, 25.0, ("kill",))
        assert world.run(200.0, world.over), world.trace.tail()
        assert world.finish is not None
        assert world.finish.exit_code == 0
        assert not any(line.steps_lost for line in world.invariants.closed)


def test_foreign_scripts_survive_kills():
    for seed in range(10):
        world = World(Spec(nodes=2, slots=2, steps=30, managed=False), seed)
        storm(world, 2, 4.0, ("kill", "node", "zygote"))
        world.run(4.0, world.over)
        heal(world)
        assert world.run(200.0, world.over), f"seed {seed}\n{world.trace.tail()}"
        assert world.finish is not None
        assert world.finish.exit_code == 0, f"seed {seed}: {world.finish}\n{world.trace.tail()}"


def test_the_same_seed_gives_the_same_evening():
    def evening():
        world, _ = weather(7)
        world.run(20.0, world.over)
        return world.trace.lines

    assert evening() == evening()


@pytest.mark.parametrize("copies", [1, 2])
def test_after_the_loss_of_a_node_its_copies_are_made_again_elsewhere(copies):
    world = World(Spec(nodes=6, slots=2, standbys=2, steps=5000, snapshots=True, replicated=False, copies=copies, rack_size=2), seed=1)

    def kept(rank: int, home: str) -> set[str]:
        """Nodes in other racks that hold the rank's last steps."""
        newest = max(world.hosts[home].segments[rank].snapshots)
        living = [h for h in world.hosts.values() if not h.dead and h.name != home and rank in h.held]
        near = [h for h in living if max(h.held[rank].snapshots) >= newest - 1]
        return {h.name for h in near if int(h.name[1:]) // 2 != int(home[1:]) // 2}

    def all_kept() -> bool:
        homes = {rank: host.name for host in world.hosts.values() if not host.dead for rank in host.orders.ranks}
        seated = len(homes) == 12 and all(world.hosts[home].segments.get(rank, Segment()).snapshots for rank, home in homes.items())
        return seated and all(len(kept(rank, home)) >= copies for rank, home in homes.items())

    assert world.run(30.0, all_kept), world.trace.tail()
    peers = {host.name: set(host.orders.peers) for host in world.hosts.values()}
    world.hosts["n3"].kill()
    world.run(0.5)
    assert not world.over()
    assert world.run(30.0, all_kept), world.trace.tail()
    for host in (h for h in world.hosts.values() if not h.dead):
        assert "n3:1" not in host.orders.peers
        assert peers[host.name] - {"n3:1"} <= set(host.orders.peers), "a copy moved that was not lost"


@pytest.mark.parametrize("block", [0, pytest.param(1, marks=pytest.mark.long)])
def test_checkpoints_go_on_after_the_storm_and_a_sigterm_loses_nothing_sealed(block):
    """Intervals chosen by the run, wishes from outside, bad weather; then steps to make up for it, and SIGTERM to one node."""
    for seed in range(block * BLOCK, (block + 1) * BLOCK):
        draw = random.Random(seed)
        nodes = draw.choice([1, 2, 3])
        spec = Spec(
            nodes=nodes,
            slots=draw.choice([1, 2]),
            standbys=3,
            steps=1_000_000,
            replicated=draw.random() < 0.5,
            snapshots=draw.random() < 0.7,
            auto=True,
            loss=draw.choice([0.0, 0.0, 0.2]),
            grace_s=draw.choice([10.0, 25.0]),
            persist_s=draw.choice([0.05, 0.5]),
        )
        world = World(spec, seed)
        faults = storm(world, draw.randint(0, 4), 12.0, KINDS)
        for _ in range(draw.randint(0, 3)):
            world.at(world.now + draw.uniform(0.0, 12.0), lambda world=world: world.decide(Asked()))
        world.run(12.0, world.over)
        heal(world)
        story = f"seed {seed}, {faults}"
        if world.finish is not None:
            assert world.finish.exit_code == 1, story  # a halt, by the storm
            continue
        world.run(60.0, world.over)
        committed = set(world.stored)
        assert committed, f"{story}: no checkpoint\n{world.trace.tail()}"
        world.decide(Asked())
        world.run(10.0, world.over)
        assert world.stored > committed, f"{story}: none when asked for\n{world.trace.tail()}"
        told = world.now
        world.hosts[draw.choice(sorted(world.hosts))].step(Stop(signal=15))
        assert world.run(spec.grace_s + 10.0, world.over), f"{story}: it does not end\n{world.trace.tail()}"
        assert world.now - told <= spec.grace_s + 6.0, story
        coordinator = world.coordinator
        places = coordinator.round.seating.places
        chairs = {rank: coordinator.nodes[place.node].chair(rank) for rank, place in places.items()}
        assert max(world.stored) >= newest_common(chairs), f"{story}: a newer step was in memory\n{world.trace.tail()}"
        if spec.snapshots and not spec.loss:
            reached = min(c.record.step for c in chairs.values())
            assert max(world.stored) >= reached - 1, f"{story}: step {reached} was reached, {world.finish}\n{world.trace.tail()}"


def test_agents_that_are_started_again_at_once_are_heard() -> None:
    """The first report of one may overtake the last of the one before it."""
    for seed in range(40):
        world = World(Spec(nodes=3, slots=1, standbys=1, steps=20), seed)
        for _ in range(3):
            FAULTS["agent_restart"](world)
        heal(world)
        assert world.run(60.0, world.over), f"seed {seed}: no progress\n{world.trace.tail()}"
        assert world.finish is not None
        assert world.finish.exit_code == 0, f"seed {seed}: {world.finish}\n{world.trace.tail()}"
