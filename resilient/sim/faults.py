"""Faults: bad weather for a simulated fleet, drawn from the world's seed.

Think of a stage villain with a timetable: every entrance is decided before the curtain rises, so the same seed brings the same villain
at the same moment.

Contract: `storm` draws faults and schedules them; `heal` ends every lasting one (cut links, message loss, stopped processes), so that
progress can be demanded afterwards. The node that hosts the coordinator is never killed: its loss ends the run by design.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final

import msgspec

from resilient.core.machine import Probed
from resilient.core.messages import Class, Finding, Role

if TYPE_CHECKING:
    from resilient.sim.script import Script
    from resilient.sim.world import Host, World

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

SIGHTS: Final = ("lost_gpu", "bad_memory", "care", "port", "program", "wrote", "echoes", "shared")  # what probes may see


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


# ---------------------------------------------------------------------- what probes see; the fault itself may follow, or not


def _saw(host: Host, *findings: Finding) -> None:
    host.step(Probed(findings=findings))


def _on_a_seat(world: World, act: Callable[[Script, str], None]) -> None:
    """Of one rank: its process, and its device."""
    _one(world, seated(world), lambda s: act(s, f"gpu:{next(p.local_rank for p in s.host.agent.crew.places.values() if p.rank == s.rank)}"))


def _lost_gpu(world: World) -> None:
    """The kernel says so; NCCL's words, and the process's end, come before or after, or never."""

    def act(script: Script, device: str) -> None:
        host, rank = script.host, script.rank
        cause = Finding(seq=0, probe="kernel-log", kind="xid", code="79", layer="gpu", device=device, class_="replace", text="lost")
        world.after(world.random.uniform(0.0, 1.0), lambda: _saw(host, cause))
        if world.random.random() < 0.6:
            world.after(world.random.uniform(0.0, 1.0), lambda: script.exit(-6) if script.alive and script.rank == rank else None)

    _on_a_seat(world, act)


def _bad_memory(world: World) -> None:
    """Uncorrected errors; after a while somebody has reset the GPU."""

    def act(script: Script, device: str) -> None:
        host = script.host
        seen = Finding(seq=0, probe="nvml-ecc", kind="ecc-uncorrected", layer="gpu", device=device, class_="gpu-reset", text="bad")
        _saw(host, seen)
        world.after(world.random.uniform(0.1, 20.0), lambda: _saw(host, msgspec.structs.replace(seen, clears=True)))

    _on_a_seat(world, act)


def _care(world: World) -> None:
    """Something that needs a person some day."""
    kind = world.random.choice(["row-remap", "fabric", "driver-mismatch"])
    seen = Finding(seq=0, probe="nvml", kind=kind, layer="gpu", class_="cordon", text="care")
    _on_a_seat(world, lambda s, device: _saw(s.host, msgspec.structs.replace(seen, device=device)))


def _port(world: World) -> None:
    """Down, and up again: before anybody was moved for it, or after."""
    host = world.hosts[world.random.choice(sorted(world.hosts))]
    down = Finding(seq=0, probe="infiniband", kind="ib-link", layer="nic", device="dev:mlx5_0", class_="replace", text="down")
    _saw(host, down)
    world.after(world.random.uniform(0.1, 10.0), lambda: _saw(host, msgspec.structs.replace(down, clears=True)))


def _program(world: World) -> None:
    """A bad address: the kernel names the GPU, the process ends."""

    def act(script: Script, device: str) -> None:
        seen = Finding(seq=0, probe="kernel-log", kind="xid", code="31", layer="gpu", device=device, class_="user", text="MMU fault")
        wrote = Finding(
            seq=0, probe="worker-log", kind="cuda-error", code="700", device=f"rank:{script.rank}", class_="user", text="illegal"
        )
        _saw(script.host, seen, wrote)
        if world.random.random() < 0.5:
            script.throw(f"error {world.random.random()}", "RuntimeError: CUDA error: an illegal memory access was encountered")

    _on_a_seat(world, act)


def _wrote(world: World) -> None:
    """A worker writes that its port is broken; it dies of it, or goes on."""

    def act(script: Script, _: str) -> None:
        wrote = Finding(seq=0, probe="worker-log", kind="nccl-error", device=f"rank:{script.rank}", class_="replace", text="port error")
        _saw(script.host, wrote)
        if world.random.random() < 0.5:
            world.after(world.random.uniform(0.0, 0.5), lambda: script.exit(-6) if script.alive else None)

    _on_a_seat(world, act)


def _echoes(world: World) -> None:
    """A hundred lines, none of which is the cause of anything."""
    host = world.hosts[world.random.choice(sorted(world.hosts))]
    classes: tuple[Class, ...] = ("replace", "gpu-reset", "cordon", "app-restart")
    roles: tuple[Role, ...] = ("symptom", "context", "cascade")
    drawn = [(world.random.choice(classes), world.random.choice(roles)) for _ in range(100)]
    _saw(host, *(Finding(seq=0, probe="kernel-log", kind="sxid", code=str(i), class_=c, role=r) for i, (c, r) in enumerate(drawn)))


def _shared(world: World) -> None:
    """A switch: all nodes see it within a second."""
    for host in list(world.hosts.values()):
        down = Finding(seq=0, probe="infiniband", kind="ib-link", layer="nic", device="dev:mlx5_1", class_="replace", text="down")
        world.after(world.random.uniform(0.0, 1.0), lambda host=host, down=down: _saw(host, down))  # type: ignore[misc]
        up = msgspec.structs.replace(down, clears=True)
        world.after(world.random.uniform(5.0, 8.0), lambda host=host, up=up: _saw(host, up))  # type: ignore[misc]


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
    "lost_gpu": _lost_gpu,
    "bad_memory": _bad_memory,
    "care": _care,
    "port": _port,
    "program": _program,
    "wrote": _wrote,
    "echoes": _echoes,
    "shared": _shared,
}
