"""Seeded fleets whose probes see things, of every class, in storms and together with real faults.

Safety is looked at after every step (sim/invariants.py): nobody moves without a reason, nobody comes to a closed node while another has
room, nobody is blamed for a program's fault. When the weather is over the run has to finish.
"""

from __future__ import annotations

import itertools
import random
from functools import partial

import pytest

from resilient.rulebook import shipped
from resilient.sim.faults import FAULTS, KINDS, SIGHTS, heal, storm
from resilient.sim.world import Spec, World

BLOCK = 20
RULES = shipped()


def fleet(seed, **more):
    draw = random.Random(seed)
    nodes = draw.choice([1, 2, 3, 4])
    facts = {
        "nodes": nodes,
        "slots": draw.choice([1, 2, 3]),
        "standbys": 3,
        "spare_nodes": draw.choice([0, 1, 2]),
        "rack_size": draw.choice([0, 0, 2]),
        "steps": 80,
        "replicated": draw.random() < 0.5,
        "snapshots": True,
        "rules": RULES,
        **more,
    }
    return World(Spec(**facts), seed), draw


def finishes(world, story):
    assert world.run(200.0, world.over), f"{story}: no progress\n{world.trace.tail()}"
    assert world.finish is not None
    twice = story.count("program") > 1 and "the same error" in world.finish.message  # at one step: it is the program's, and the run ends
    assert world.finish.exit_code == 0 or twice, f"{story}: {world.finish}\n{world.trace.tail()}"


@pytest.mark.parametrize("block", [0, 1, *(pytest.param(n, marks=pytest.mark.long) for n in range(2, 15))])
def test_whatever_probes_see_the_run_finishes(block):
    for seed in range(block * BLOCK, (block + 1) * BLOCK):
        world, draw = fleet(seed, loss=random.Random(-seed).choice([0.0, 0.0, 0.2]))
        faults = storm(world, draw.randint(1, 8), 8.0, SIGHTS) + storm(world, draw.randint(0, 2), 8.0, KINDS)
        world.run(8.0, world.over)
        heal(world)
        finishes(world, f"seed {seed}, {faults}")


@pytest.mark.parametrize("block", range(2))
def test_moving_costs_no_step(block):
    """Only findings, no other fault: who moves is given its state, whoever holds it."""
    for seed in range(block * BLOCK, (block + 1) * BLOCK):
        draw = random.Random(seed)
        replicated = draw.random() < 0.5
        world, _ = fleet(seed, replicated=replicated, snapshots=not replicated or draw.random() < 0.5)
        faults = storm(world, draw.randint(1, 5), 8.0, ("care", "bad_memory", "port", "echoes", "kill"))
        world.run(8.0, world.over)
        finishes(world, f"seed {seed}, {faults}")
        lost = [line for line in world.invariants.closed if line.steps_lost]
        assert lost == [], f"seed {seed}, {faults}\n{world.trace.tail()}"


def test_a_programs_fault_and_echoes_close_no_node():
    for seed in range(BLOCK):
        world, draw = fleet(seed)
        faults = storm(world, draw.randint(1, 4), 6.0, ("program", "echoes"))
        world.run(6.0, world.over)
        finishes(world, f"seed {seed}, {faults}")
        assert world.invariants.cordoned == set(), f"seed {seed}, {faults}\n{world.trace.tail()}"
        assert world.invariants.moves == 0


def test_a_switch_moves_nobody():
    for seed in range(BLOCK):
        world, _ = fleet(seed, nodes=4, spare_nodes=1)
        world.run(2.0)
        FAULTS["shared"](world)
        world.run(9.0, world.over)
        finishes(world, f"seed {seed}")
        assert world.invariants.moves == 0, f"seed {seed}\n{world.trace.tail()}"
        assert world.invariants.cordoned == set()


def test_a_lost_gpu_is_left_where_there_is_room():
    for seed in range(BLOCK):
        world, _ = fleet(seed, nodes=2, slots=2, standbys=1, spare_nodes=1)
        world.run(2.0)
        FAULTS["lost_gpu"](world)
        world.run(3.0, world.over)
        (node,) = world.invariants.cordoned
        places = world.coordinator.round.seating.places
        assert node not in {place.node for place in places.values()}, f"seed {seed}\n{world.trace.tail()}"
        finishes(world, f"seed {seed}")
        causes = {line.cause for line in world.invariants.closed}
        assert "xid" in causes | {line.cause for line in world.invariants.explained}, f"seed {seed}\n{world.trace.tail()}"


def test_closing_is_paced():
    """Twelve nodes, and every second one of them reports something of its own: they are closed ten seconds apart."""
    world = World(Spec(nodes=12, slots=1, standbys=1, steps=400, rules=RULES), seed=3)
    world.run(2.0)
    kinds = ["row-remap", "fabric", "pcie", "gsp", "retired-pages", "thermal"]
    for i, kind in enumerate(kinds):
        world.at(world.now + 0.1 * i, lambda i=i, kind=kind: world.see(f"n{2 * i}", probe="nvml", kind=kind, class_="cordon"))
    world.run(35.0)
    at = [when for when, text in world.trace.lines if ": closed for" in text]
    assert len(at) == 4
    assert min(b - a for a, b in itertools.pairwise(at)) >= 10.0 - 1e-6


def test_nobody_is_seated_on_a_node_that_is_not_admitted():
    for seed in range(BLOCK):
        world, draw = fleet(seed, nodes=2, spare_nodes=2, gated=True)
        for name in list(world.hosts):
            world.after(draw.uniform(0.0, 5.0), partial(world.admit, name))
        storm(world, draw.randint(0, 3), 8.0, ("node", "kill", "lost_gpu"))
        world.run(8.0, world.over)
        heal(world)
        for name in world.hosts:
            world.admit(name)
        finishes(world, f"seed {seed}")
