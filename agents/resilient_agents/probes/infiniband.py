"""InfiniBand and RoCE: ports that are down, slow or unsteady, and counters that should stand still.

Think of the harbour master: a quay that was never used may stay closed; one that was open this morning and is closed now is news, and so
is one that takes smaller ships than its neighbours.

Contract: reads <root>/sys/class/infiniband. A port is told as down if it has been ACTIVE since the probe was made, or was down at its
start beside a sibling of the same link layer that is ACTIVE and a cable says that it should be (phys_state Polling or LinkErrorRecovery).
Three drops in ten minutes are flapping. Limits, counters and their sources: limits.py. What lasts is told until it is over.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from resilient.core.messages import Finding
from resilient_agents.probe import Absent
from resilient_agents.probes import limits, reading
from resilient_agents.probes.deltas import Deltas

if TYPE_CHECKING:
    from resilient.core.messages import Class
    from resilient_agents.probe import Surroundings

TREE: Final = "/sys/class/infiniband"
ACTIVE: Final = 4
POLLING, DISABLED, RECOVERY = 2, 3, 6
COUNTERS_S: Final = 30.0  # a reading of all counters is 20 calls of the firmware per port
STICKY_S: Final = 600.0  # gpud: a flap stays told for 10 min


@dataclass(frozen=True, slots=True)
class Port:
    """What sysfs says of one."""

    name: str  # "mlx5_0", or "mlx5_0:2" where a device has several
    path: str
    state: int
    phys_state: int
    rate: float  # Gb/s, 0 = not said
    layer: str  # "InfiniBand" or "Ethernet"
    downed: int | None  # link_downed


def rate(text: str) -> float:
    """Of "400 Gb/sec (4X NDR)"."""
    try:
        return float(text.split(" ", 1)[0])
    except ValueError:
        return 0.0


def ports(root: str) -> list[Port]:
    """All ports below `root`, a directory like /sys/class/infiniband."""
    found = []
    for device in reading.names(root):
        numbers = reading.names(f"{root}/{device}/ports")
        for number in numbers:
            path = f"{root}/{device}/ports/{number}"
            found.append(
                Port(
                    name=device if len(numbers) == 1 else f"{device}:{number}",
                    path=path,
                    state=reading.number(f"{path}/state") or 0,
                    phys_state=reading.number(f"{path}/phys_state") or 0,
                    rate=rate(reading.text(f"{path}/rate") or ""),
                    layer=reading.text(f"{path}/link_layer") or "InfiniBand",
                    downed=reading.number(f"{path}/counters/link_downed"),
                )
            )
    return found


def slow(seen: list[Port]) -> list[tuple[Port, float]]:
    """Active ports below the rate of most of their siblings; with that rate. Two rates in equal numbers are a choice, not a fault."""
    found = []
    for layer in sorted({port.layer for port in seen}):
        active = [port for port in seen if port.layer == layer and port.state == ACTIVE and port.rate]
        rates = sorted(port.rate for port in active)
        usual = rates[(len(rates) - 1) // 2] if rates else 0.0
        enough = sum(port.rate == usual for port in active) * 2 > len(active)
        found += [(port, usual) for port in active if enough and port.rate < usual]
    return found


class InfiniBand:
    """All ports of a node."""

    name = "infiniband"
    period_s = 5.0
    timeout_s = 15.0  # gpud's request limit
    lasting = True

    def __init__(self, surroundings: Surroundings) -> None:
        """Raises Absent without a device."""
        self._tree = surroundings.path(TREE)
        if not reading.names(self._tree):
            raise Absent(f"{self._tree}: no device")
        self._was_active: set[str] = set()
        self._drops = Deltas(limits.FLAP_WINDOW_S.value)
        self._counters: dict[str, Deltas] = {}
        self._flapping: dict[str, tuple[float, Finding]] = {}
        self._counted: list[Finding] = []
        self._count_at = 0.0

    def check(self, now: float) -> list[Finding]:
        """What is the matter with them."""
        seen = ports(self._tree)
        if now >= self._count_at:
            self._count_at = now + COUNTERS_S
            self._counted = [finding for port in seen for finding in self._count(port, now)]
        return [*self._states(seen), *self._unsteady(seen, now), *self._counted]

    def _states(self, seen: list[Port]) -> list[Finding]:
        findings = []
        active = {port.layer for port in seen if port.state == ACTIVE}
        here = {port.name for port in seen}
        for port in seen:
            if port.state == ACTIVE:
                self._was_active.add(port.name)
            elif port.name in self._was_active:
                findings.append(_fact("ib-link", "down", port.name, "replace", f"port {port.name} was ACTIVE and is {_states(port)}"))
            elif port.layer in active and port.phys_state in (POLLING, RECOVERY):
                text = f"port {port.name} is {_states(port)} while others of this node are ACTIVE"
                findings.append(_fact("ib-link", "down", port.name, "ignore", text))  # it may never have had a cable
        gone = sorted(self._was_active - here)
        findings += [_fact("ib-link", "gone", name, "replace", f"port {name} was ACTIVE and is not there any more") for name in gone]
        for port, usual in slow(seen):
            text = f"port {port.name} runs at {port.rate:g} Gb/s, its neighbours at {usual:g}"
            findings.append(_fact("ib-rate", "slow", port.name, "cordon", text))
        return findings

    def _unsteady(self, seen: list[Port], now: float) -> list[Finding]:
        for port in seen:
            drops = self._drops.grown(port.name, port.downed, now) if port.downed is not None else 0
            if drops >= limits.FLAPS.value:
                text = f"port {port.name} went down {drops} times within {limits.FLAP_WINDOW_S.value:.0f} s"
                self._flapping[port.name] = (now, _fact("ib-flap", "", port.name, "cordon", text, drops))
            elif drops:
                text = f"port {port.name} went down {drops} time(s) within {limits.FLAP_WINDOW_S.value:.0f} s"
                self._flapping[port.name] = (now, _fact("ib-flap", "", port.name, "app-restart", text, drops))
        self._flapping = {name: (at, f) for name, (at, f) in self._flapping.items() if now - at < STICKY_S}
        return [finding for _, finding in self._flapping.values()]

    def _count(self, port: Port, now: float) -> list[Finding]:
        findings = []
        for row in limits.COUNTERS:
            value = reading.number(f"{port.path}/{row.name}")
            if value is None:
                continue
            deltas = self._counters.setdefault(row.name, Deltas(row.window_s))
            grown = deltas.grown(port.name, value, now)
            if grown > row.above:
                code = row.name.rpartition("/")[2]
                text = f"port {port.name}: {code} grew by {grown} within {row.window_s:.0f} s ({row.meaning})"
                findings.append(_fact("ib-errors", code, port.name, row.class_, text))
        return findings


def _states(port: Port) -> str:
    names = {1: "DOWN", 2: "INIT", 3: "ARMED", 4: "ACTIVE", 5: "ACTIVE_DEFER"}
    physical = {1: "Sleep", 2: "Polling", 3: "Disabled", 4: "Training", 5: "LinkUp", 6: "LinkErrorRecovery", 7: "Phy Test"}
    hint = {POLLING: " (cable or far side)", DISABLED: " (configuration)"}.get(port.phys_state, "")
    return f"{names.get(port.state, port.state)}, {physical.get(port.phys_state, port.phys_state)}{hint}"


def _fact(kind: str, code: str, port: str, class_: Class, text: str, count: int = 1) -> Finding:
    return Finding(seq=0, kind=kind, layer="nic", code=code, device=f"dev:{port}", class_=class_, text=text, count=count)
