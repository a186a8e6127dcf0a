"""PCI: error counters of the bus (AER), and links that have become narrower.

Contract: reads <root>/sys/bus/pci/devices, of bridges (their counters alone), accelerators, network and storage controllers (base classes
0x01, 0x02, 0x03, 0x08, 0x12). A counter's first reading is its zero. A link is narrow if it was wider since the probe was made, or if most
devices of its model are wider; a card in a short slot is not. Speed is only told of network controllers: accelerators slow an idle link
down to save power.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

from resilient.core.messages import Finding
from resilient_agents.probe import Absent
from resilient_agents.probes import limits, reading
from resilient_agents.probes.deltas import Deltas

if TYPE_CHECKING:
    from resilient_agents.probe import Surroundings

TREE: Final = "/sys/bus/pci/devices"
WATCHED: Final = frozenset({0x01, 0x02, 0x03, 0x08, 0x12})
BRIDGE: Final = 0x06  # the port above a device counts what the device cannot any more
WIDTH_MAX: Final = 32  # a device that does not answer reads as all ones, or as nothing
NETWORK: Final = 0x02
AER: Final = {"aer_dev_fatal": "Fatal", "aer_dev_nonfatal": "Non-Fatal", "aer_dev_correctable": "Corrected"}
FIND_S: Final = 600.0  # devices come and go seldom
HOUR_S: Final = 3600.0


class Link(NamedTuple):
    """One device's link."""

    address: str  # pci:dddd:bb:dd
    model: str
    base: int
    width: int
    speed: float  # GT/s


def base_class(text: str | None) -> int:
    """Of "0x030200"."""
    try:
        return int(text or "0", 16) >> 16
    except ValueError:
        return 0


def short(address: str) -> str:
    """Of "0000:3b:00.0"."""
    return "pci:" + address.lower().rsplit(".", 1)[0]


def totals(rows: dict[str, int]) -> int:
    """Of an aer_dev_* file, whose last line is the sum of the others ("TOTAL_ERR_FATAL 0")."""
    whole = [value for name, value in rows.items() if name.startswith("TOTAL")]
    return whole[0] if whole else sum(rows.values())


def narrow(links: list[Link], widest: dict[str, int]) -> list[tuple[Link, int]]:
    """Links that have been wider, or whose siblings mostly are; with how wide it should be."""
    found = []
    for link in links:
        siblings = sorted(other.width for other in links if other.model == link.model)
        usual = siblings[(len(siblings) - 1) // 2]
        most = sum(width >= usual for width in siblings) * 2 > len(siblings)
        wanted = max(widest.get(link.address, 0), usual if most else 0)
        if 0 < link.width < wanted:
            found.append((link, wanted))
    return found


class Pci:
    """All devices of a node that matter."""

    name = "pci"
    period_s = 30.0  # the kernel's log is sooner; this is for nodes where it is closed to us
    lasting = True

    def __init__(self, surroundings: Surroundings) -> None:
        """Raises Absent where nothing is to be watched."""
        self._tree = surroundings.path(TREE)
        self._devices = self._find()
        if not self._devices:
            raise Absent(f"{self._tree}: no accelerator, network or storage controller with a link or error counters")
        self._found_at = 0.0
        self._aer = Deltas(HOUR_S)
        self._widest: dict[str, int] = {}
        self._fastest: dict[str, float] = {}

    def check(self, now: float) -> list[Finding]:
        """What is the matter with them."""
        if now - self._found_at > FIND_S:
            self._found_at, self._devices = now, self._find()
        findings = [finding for name in self._devices for finding in self._errors(name, now)]
        links = [link for name in self._devices if (link := self._link(name)) is not None]
        for link in [link for link in links if not 0 < link.width <= WIDTH_MAX and link.address in self._widest]:
            text = f"{link.address}: the device does not answer (it had a link x{self._widest[link.address]})"
            findings.append(
                Finding(seq=0, kind="pcie-link-down", layer="pcie", code="lost", device=link.address, class_="replace", text=text)
            )
        links = [link for link in links if 0 < link.width <= WIDTH_MAX]
        for link, wanted in narrow(links, self._widest):
            text = f"{link.address}: the link is x{link.width}, x{wanted} expected"
            findings.append(Finding(seq=0, kind="pcie-width", layer="pcie", device=link.address, class_="cordon", text=text))
        for link in links:
            self._widest[link.address] = max(link.width, self._widest.get(link.address, 0))
            best = self._fastest[link.address] = max(link.speed, self._fastest.get(link.address, 0.0))
            if link.base == NETWORK and 0 < link.speed < best:
                text = f"{link.address}: the link runs at {link.speed:g} GT/s, it did at {best:g}"
                findings.append(Finding(seq=0, kind="pcie-speed", layer="pcie", device=link.address, class_="cordon", text=text))
        return findings

    def _find(self) -> dict[str, int]:
        """Device -> its base class."""
        classes = {name: base_class(reading.text(f"{self._tree}/{name}/class")) for name in reading.names(self._tree)}
        has = ("current_link_width", *AER)
        return {
            name: base
            for name, base in classes.items()
            if base in (*WATCHED, BRIDGE) and any(reading.text(f"{self._tree}/{name}/{file}") is not None for file in has)
        }

    def _link(self, name: str) -> Link | None:
        path = f"{self._tree}/{name}"
        width = reading.number(f"{path}/current_link_width")
        if width is None or self._devices[name] == BRIDGE:
            return None
        model = f"{reading.text(f'{path}/vendor')}:{reading.text(f'{path}/device')}"
        speed = (reading.text(f"{path}/current_link_speed") or "").split(" ", 1)[0]
        return Link(short(name), model, self._devices[name], width, float(speed) if speed.replace(".", "", 1).isdigit() else 0.0)

    def _errors(self, name: str, now: float) -> list[Finding]:
        findings = []
        for file, severity in AER.items():
            rows = reading.pairs(f"{self._tree}/{name}/{file}")
            if not rows:
                continue
            grown = self._aer.grown(f"{name} {file}", totals(rows), now)
            if severity == "Corrected":
                if grown > limits.AER_CORRECTED_PER_H.value:
                    text = f"{short(name)}: {grown} corrected bus errors within an hour"
                    findings.append(
                        Finding(seq=0, kind="aer-corrected", layer="pcie", code="rate", device=short(name), class_="cordon", text=text)
                    )
            elif grown:
                text = f"{short(name)}: {grown} {severity.lower()} bus error(s) within an hour"
                findings.append(Finding(seq=0, kind="aer", layer="pcie", code=severity, device=short(name), class_="replace", text=text))
        return findings
