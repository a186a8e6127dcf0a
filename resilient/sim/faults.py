"""Faults: bad weather for a simulated fleet, drawn from the world's seed.

Think of a stage villain with a timetable: every entrance is decided before the curtain rises, so the same seed brings the same villain
at the same moment.

Contract: `storm` draws faults and schedules them; `heal` ends every lasting one (cut links, message loss, stopped processes), so that
progress can be demanded afterwards. The node that hosts the coordinator is never killed: its loss ends the run by design.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from resilient.sim.script import Script
    from resilient.sim.world import World

KINDS: Final = (
    "kill",
    "kill_two",
    "kill_standby",
    "kill_successor",
    "stop",
    "spin",
    "exception",
    "torn",
    "store",
    "zygote",
    "node",
    "agent_restart",
    "cut",
    "reset",
)


def storm(world: World, count: int, seconds: float, kinds: Sequence[str] = KINDS) -> list[tuple[float, str]]:
    """Schedule `count` faults within the next `seconds`; returns what will come when."""
    drawn = sorted((world.now + world.random.uniform(0.0, seconds), world.random.choice(kinds)) for _ in range(count))
    for when, kind in drawn:
        world.at(when, lambda kind=kind: FAULTS[kind](world))  # type: ignore[misc]
    return drawn


def heal(world: World) -> None:
    """Everything that lasts is over."""
    world.loss = 0.0
    for host in list(world.hosts.values()):
        if host.dead:
            world.start_node(host.name)
        host.cut = False
        for script in host.scripts.values():
            if script.alive and script.os_state == "T":
                script.go_on()


def seated(world: World) -> list[Script]:
    """Processes that hold a chair."""
    return [s for s in _scripts(world) if any(p.worker and p.worker.name == s.name for p in s.host.agent.crew.places.values())]


def standbys(world: World) -> list[Script]:
    """Processes that hold none."""
    taken = set(seated(world))
    return [s for s in _scripts(world) if s not in taken]


def _scripts(world: World) -> list[Script]:
    return [s for h in world.hosts.values() if not h.dead for s in h.scripts.values() if s.alive]


def _one(world: World, scripts: Sequence[Script], act: Callable[[Script], None]) -> None:
    if scripts:
        act(world.random.choice(scripts))


def _kill(world: World) -> None:
    _one(world, seated(world), lambda s: s.exit(-9))


def _kill_two(world: World) -> None:
    _kill(world)
    world.after(world.random.uniform(0.0, 0.004), lambda: _kill(world))


def _kill_standby(world: World) -> None:
    _one(world, standbys(world), lambda s: s.exit(-9))


def _kill_successor(world: World) -> None:
    """Kill a rank, and soon whoever takes its chair: a fault during a recovery."""

    def act(script: Script) -> None:
        rank = script.rank
        script.exit(-9)
        soon = world.random.uniform(0.005, 0.3)
        world.after(soon, lambda: _one(world, [s for s in seated(world) if s.rank == rank], lambda s: s.exit(-9)))

    _one(world, seated(world), act)


def _stop(world: World) -> None:
    _one(world, seated(world), lambda s: s.stop())


def _spin(world: World) -> None:
    """An endless loop, where the watch is on: before a rank's first step of a round it would take `first_step_timeout_s`."""
    _one(world, [s for s in seated(world) if s.phase == "running" and s.marks[3] > 0 and s.fence < s.round], lambda s: s.spin())


def _exception(world: World) -> None:
    name = f"error {world.random.random()}"
    _one(world, seated(world), lambda s: s.throw(name, f"ValueError: {name}"))


def _torn(world: World) -> None:
    """Something tracked was changed by the broken step, seen when another rank dies."""

    def act(script: Script) -> None:
        script.torn = script.phase == "running"
        _one(world, [s for s in seated(world) if s is not script], lambda s: s.exit(-9))

    _one(world, seated(world), act)


def _node(world: World) -> None:
    names = [h.name for h in world.hosts.values() if not h.dead and h.name != "n0"]
    if names:
        name = world.random.choice(names)
        world.hosts[name].kill()
        world.after(world.random.uniform(0.1, 5.0), lambda: world.start_node(name) if world.hosts[name].dead else None)


def _agent_restart(world: World) -> None:
    """So fast that the coordinator sees a new boot before it misses the old one."""
    names = [h.name for h in world.hosts.values() if not h.dead and h.name != "n0"]
    if names:
        name = world.random.choice(names)
        world.hosts[name].kill()
        world.start_node(name)


def _cut(world: World, *, reset: bool = False) -> None:
    name = world.random.choice(sorted(world.hosts))
    if name != "n0" and not world.hosts[name].dead and not world.hosts[name].cut:
        world.cut(name, world.random.uniform(0.05, 15.0), reset=reset)


FAULTS: Final[dict[str, Callable[[World], None]]] = {
    "kill": _kill,
    "kill_two": _kill_two,
    "kill_standby": _kill_standby,
    "kill_successor": _kill_successor,
    "stop": _stop,
    "spin": _spin,
    "exception": _exception,
    "torn": _torn,
    "store": lambda world: world.kill_store(),
    "zygote": lambda world: _one(world, _scripts(world), lambda s: world.kill_zygote(s.host.name)),
    "node": _node,
    "agent_restart": _agent_restart,
    "cut": _cut,
    "reset": lambda world: _cut(world, reset=True),
}
