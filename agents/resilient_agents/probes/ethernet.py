"""Ethernet: interfaces that have lost their carrier, run slower than they did, or come and go.

Contract: reads <root>/sys/class/net; only interfaces with a device behind them (no bridges, tunnels, veth pairs). One that is down is told
if it has been up since the probe was made; five lost carriers in a day are flapping (limits.py). What lasts is told until it is over.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Final, NamedTuple

from resilient.core.messages import Finding
from resilient_agents.probe import Absent
from resilient_agents.probes import limits, reading
from resilient_agents.probes.deltas import Deltas

if TYPE_CHECKING:
    from resilient.core.messages import Class
    from resilient_agents.probe import Surroundings

TREE: Final = "/sys/class/net"


class Interface(NamedTuple):
    """What sysfs says of one."""

    name: str
    up: bool
    wanted: bool  # somebody has switched it on
    speed: int  # Mb/s, 0 = not said
    downs: int | None  # carrier_down_count


def interfaces(root: str) -> list[Interface]:
    """All real ones below `root`, a directory like /sys/class/net."""
    found = []
    for name in reading.names(root):
        path = f"{root}/{name}"
        if not os.path.exists(f"{path}/device"):
            continue
        downs = reading.number(f"{path}/carrier_down_count")
        changes = reading.number(f"{path}/carrier_changes")
        found.append(
            Interface(
                name=name,
                up=reading.number(f"{path}/carrier") == 1 and reading.text(f"{path}/operstate") in ("up", "unknown"),
                wanted=bool((reading.number(f"{path}/flags") or 0) & 1),
                speed=max(0, reading.number(f"{path}/speed") or 0),
                downs=downs if downs is not None or changes is None else changes // 2,
            )
        )
    return found


class Ethernet:
    """All interfaces of a node."""

    name = "ethernet"
    period_s = 5.0
    lasting = True

    def __init__(self, surroundings: Surroundings) -> None:
        """Raises Absent without a real interface."""
        self._tree = surroundings.path(TREE)
        if not interfaces(self._tree):
            raise Absent(f"{self._tree}: no interface with a device behind it")
        self._speeds: dict[str, int] = {}  # of those that have been up
        self._drops = Deltas(limits.ETH_FLAP_WINDOW_S.value)

    def check(self, now: float) -> list[Finding]:
        """What is the matter with them."""
        findings = []
        for seen in interfaces(self._tree):
            best = self._speeds.get(seen.name)
            if seen.up:
                self._speeds[seen.name] = max(best or 0, seen.speed)
            if not seen.up and best is not None:
                class_: Class = "replace" if seen.wanted else "ignore"  # somebody has switched it off
                findings.append(_fact("eth-link", "down", seen.name, class_, f"interface {seen.name} was up and has no carrier"))
            elif seen.up and best and 0 < seen.speed < best:
                findings.append(
                    _fact("link-rate", "slow", seen.name, "cordon", f"interface {seen.name} runs at {seen.speed} Mb/s, it did at {best}")
                )
            drops = self._drops.grown(seen.name, seen.downs, now) if seen.downs is not None else 0
            if drops >= limits.ETH_FLAPS.value:
                text = f"interface {seen.name} lost its carrier {drops} times within {limits.ETH_FLAP_WINDOW_S.value / 3600:.0f} h"
                findings.append(_fact("link-flap", "", seen.name, "cordon", text, drops))
        return findings


def _fact(kind: str, code: str, name: str, class_: Class, text: str, count: int = 1) -> Finding:
    return Finding(seq=0, kind=kind, layer="nic", code=code, device=f"dev:{name}", class_=class_, text=text, count=count)
