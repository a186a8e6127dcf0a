"""Ascend: the NPUs of Huawei, as npu-smi and hccn_tool show them.

Think of a ward that is visited through its head nurse: she has a list with one line for each bed (`npu-smi info`); for a bed that is not
"OK", and for one other in turn, she is asked for the chart (`-t health`, `-t ecc`), which has the codes that say what it is.

Contract: `parse_*` take any text whatever, give what they recognise of it and never raise; `Npus` and `Links` are probes. What a code
means is data (diagnosis/facts/ascend.csv), as are limits (ascend.toml). An NPU that has left the list is lost; a list that cannot be had
says nothing. npu:N is the physical id where the table has it, otherwise the number in the list's order.
Unknown, for lack of hardware: docs/probes/vendors.md.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, ClassVar, Final, cast

from resilient.core.messages import Class, Finding
from resilient_agents.devices import pci
from resilient_agents.diagnosis import catalogue
from resilient_agents.probe import Surroundings
from resilient_agents.probes.rules import Judge, load
from resilient_agents.probes.tool import Fails, Hangs, Tool

NPU_SMI: Final = "/usr/local/bin/npu-smi"
HCCN_TOOL: Final = "/usr/local/Ascend/driver/tools/hccn_tool"
ASK_S: Final = 20.0  # for one call; npu-smi asks every chip for its list
CHARTS_MAX: Final = 4  # chips that are not OK and are asked at one look; the rest in turn
LINK_DOWN_S: Final = 20.0  # MindCluster: a port that is down as long counts
CHIPS_MAX: Final = 256

_WORD = re.compile(r"\S{1,64}")
_CODE = re.compile(r"(?<![0-9A-Za-z])(?:0[xX])?([0-9A-Fa-f]{8})(?![0-9A-Za-z])")
_COUNT = re.compile(r"([A-Za-z0-9 ()-]{1,60}?)\s*:\s*(\d{1,15})\s*\Z")


@dataclass(frozen=True, slots=True)
class Chip:
    """One line of the list."""

    card: int  # npu-smi's -i
    chip: int  # npu-smi's -c
    number: int  # npu:N
    health: str  # "OK", "Warning", "Alarm", "Critical", "UNKNOWN"
    pci: str = ""

    @property
    def device(self) -> str:
        """As findings name it."""
        return f"pci:{self.pci},npu:{self.number}" if self.pci else f"npu:{self.number}"


def parse_list(text: str) -> tuple[Chip, ...]:
    """The chips of `npu-smi info`: two lines each, a card's name and health, then a chip's number and address."""
    chips: list[Chip] = []
    card: tuple[int, str] | None = None
    for line in text.splitlines():
        cells = [cell.strip()[:200] for cell in line[:1000].split("|")[1:-1]]
        if len(cells) < 2:
            continue
        words = _WORD.findall(cells[0])
        numbers = [int(word) for word in words if word.isascii() and word.isdigit() and len(word) <= 4]
        address = pci(cells[1])
        if address and card is not None and numbers and len(numbers) == len(words):
            number = numbers[1] if len(numbers) > 1 else len(chips)
            chips.append(Chip(card=card[0], chip=numbers[0], number=number, health=card[1], pci=address))
        elif len(words) > 1 and len(numbers) >= 1 and words[0] == str(numbers[0]) and not words[1].isdigit() and cells[1].isalpha():
            card = (numbers[0], cells[1])
        if len(chips) == CHIPS_MAX:
            break
    return tuple(chips)


def parse_health(text: str) -> tuple[str, tuple[str, ...], str]:
    """Status, codes and what the tool says of them, of `npu-smi info -t health -i N -c C`."""
    facts: dict[str, str] = {}
    for line in text.splitlines():
        name, _, value = line[:2000].partition(":")
        facts.setdefault(name.strip(), value.strip())
    codes = tuple(dict.fromkeys(code.upper() for code in _CODE.findall(facts.get("Error Code", ""))))
    said = facts.get("Error Information", "")
    return facts.get("Health Status") or facts.get("Health", ""), codes, "" if said == "NA" else said[:300]


def parse_counts(text: str) -> dict[int, dict[str, float]]:
    """The numbers of `npu-smi info -t ecc -i N`, by chip: a chip's number stands below its counts."""
    chips: dict[int, dict[str, float]] = {}
    counts: dict[str, float] = {}
    for line in text.splitlines():
        if not (match := _COUNT.match(line[:200].strip())):
            continue
        name = match[1].strip()
        if name == "Chip ID":
            chips[int(match[2])], counts = counts, {}
        elif name.endswith(("Error Count", "Pages Count", "Err Cnt")):
            counts[name] = float(match[2])
        if len(chips) == CHIPS_MAX:
            break
    return chips


def parse_link(text: str) -> bool | None:
    """Whether `hccn_tool -i N -link -g` says that the link is up; None: it does not say."""
    match = re.search(r"link status:\s*(UP|DOWN)\b", text[:4000])
    return None if match is None else match[1] == "UP"


def codes() -> dict[str, tuple[str, Class]]:
    """Code -> meaning, class."""
    return {code: (row["meaning"], cast("Class", row["class"])) for code, row in catalogue.table("ascend").items()}


class Npus:
    """Whether all NPUs are there and well."""

    name: ClassVar = "ascend-npus"
    period_s: ClassVar = 60.0
    scope: ClassVar = "node"
    lasting: ClassVar = True
    timeout_s: ClassVar = (2 + 2 * (CHARTS_MAX + 1)) * ASK_S

    def __init__(self, surroundings: Surroundings) -> None:
        """Raises Absent where there is no npu-smi."""
        self.tool = Tool("npu-smi", surroundings.path(NPU_SMI))
        self.judge = Judge(self.name, load("ascend.toml"))
        self.codes = codes()
        self._first: dict[str, Chip] = {}  # as they were seen first, by device
        self._hung = 0
        self._turn = 0
        self._charts: dict[str, list[Finding]] = {}  # what a chip's chart said last
        self._found: list[Finding] = []  # what is the matter, as far as it could be read last

    def check(self, now: float) -> list[Finding]:
        """See probe.py."""
        try:
            chips = parse_list(self.tool.ask("info", timeout_s=ASK_S))
        except Hangs as error:
            self._hung += 1
            return [*self._found, hanging(self.name, "npu-smi", self._hung, str(error))]
        except Fails as error:
            return [*self._found, self._trouble("", str(error))]
        self._hung = 0
        if not chips:
            return [*self._found, self._trouble("", "npu-smi info prints no list that is understood")]
        there = {chip.device: chip for chip in chips}
        self._first = self._first or there
        found = [
            self._finding("npu-lost", "", device, "replace", "the NPU is not in npu-smi's list any more")
            for device in self._first.keys() - there.keys()
        ]
        readings: dict[str, dict[str, float]] = {}
        for chip in self._whom(chips):
            self._charts[chip.device] = self._chart(chip)
            readings[chip.device] = self._counts(chip)
        for device in list(self._charts):
            if device not in there:
                del self._charts[device]
        self._found = found + [finding for chart in self._charts.values() for finding in chart] + self.judge.look(now, readings)
        return self._found

    def _whom(self, chips: tuple[Chip, ...]) -> list[Chip]:
        """Whose charts are read at this look: those that are not OK, those that were not, and one in turn."""
        self._turn = (self._turn + 1) % len(chips)
        ill = [chip for chip in chips if chip.health != "OK" or self._charts.get(chip.device)]
        turned = ill[self._turn % len(ill) :] + ill[: self._turn % len(ill)] if ill else []
        return list(dict.fromkeys([*turned[:CHARTS_MAX], chips[self._turn]]))

    def _chart(self, chip: Chip) -> list[Finding]:
        try:
            status, found, said = parse_health(
                self.tool.ask("info", "-t", "health", "-i", str(chip.card), "-c", str(chip.chip), timeout_s=ASK_S)
            )
        except (Hangs, Fails) as error:
            said_before = [finding for finding in self._charts.get(chip.device, []) if finding.kind != "npu-smi"]
            return [*said_before, self._trouble(chip.device, str(error))]
        status = status or chip.health
        findings = []
        for code in found:
            meaning, class_ = self.codes.get(code, (said or "a code that is in no public list", unknown(status)))
            findings.append(self._finding("npu-fault", code, chip.device, class_, f"{code}: {meaning} (health {status})"))
        if not found and status not in ("OK", ""):
            findings.append(self._finding("npu-health", status, chip.device, unknown(status), f"health {status} without a code; {said}"))
        return findings

    def _counts(self, chip: Chip) -> dict[str, float]:
        try:
            return parse_counts(self.tool.ask("info", "-t", "ecc", "-i", str(chip.card), timeout_s=ASK_S)).get(chip.chip, {})
        except (Hangs, Fails):
            return {}  # not every product has it

    def _trouble(self, device: str, text: str) -> Finding:
        """With the tool, not with a chip."""
        return self._finding("npu-smi", "", device, "ignore", text, role="context")

    def _finding(self, kind: str, code: str, device: str, class_: Class, text: str, role: Any = "cause") -> Finding:
        return Finding(seq=0, kind=kind, text=text, probe=self.name, layer="npu", code=code, device=device, class_=class_, role=role)


class Links:
    """Whether the NPUs' own network ports are up, one NPU at each look."""

    name: ClassVar = "ascend-links"
    period_s: ClassVar = 15.0
    scope: ClassVar = "node"
    lasting: ClassVar = True
    timeout_s: ClassVar = 3 * ASK_S

    def __init__(self, surroundings: Surroundings) -> None:
        """Raises Absent where there is no hccn_tool."""
        self.tool = Tool("hccn_tool", surroundings.path(HCCN_TOOL))
        self._up: set[int] = set()  # those that have been seen up: a port without a cable is no fault
        self._down: dict[int, float] = {}  # since when
        self._turn = -1
        self._hung = 0
        self._count = CHIPS_MAX

    def check(self, now: float) -> list[Finding]:
        """See probe.py."""
        self._turn = (self._turn + 1) % self._count
        for number in dict.fromkeys([*sorted(self._down)[:1], self._turn]):
            try:
                up = parse_link(self.tool.ask("-i", str(number), "-link", "-g", timeout_s=ASK_S))
            except Hangs as error:
                self._hung += 1
                return [*self._late(now), hanging(self.name, "hccn_tool", self._hung, str(error))]
            except Fails:
                if number == self._turn and number:  # there is none of this number: so many there are
                    self._count = number
                continue
            self._hung = 0
            self._note(number, up, now)
        return self._late(now)

    def _late(self, now: float) -> list[Finding]:
        return [self._finding(number, now - since) for number, since in sorted(self._down.items()) if now - since > LINK_DOWN_S]

    def _note(self, number: int, up: bool | None, now: float) -> None:  # noqa: FBT001 - as parse_link gives it
        if up:
            self._up.add(number)
            self._down.pop(number, None)
        elif up is False and number in self._up:
            self._down.setdefault(number, now)

    def _finding(self, number: int, seconds: float) -> Finding:
        text = f"the network port of the NPU has been down for {seconds:.0f} s"
        return Finding(
            seq=0, kind="npu-link", text=text, probe=self.name, layer="nic", code="down", device=f"npu:{number}", class_="replace"
        )


def unknown(status: str) -> Class:
    """What a health status asks for whose code is in no list: ours, as the vendor says nothing."""
    return "cordon" if status == "Critical" else "gpu-reset" if status == "Alarm" else "ignore"


def hanging(probe: str, tool: str, times: int, text: str) -> Finding:
    """A tool that does not come back: once may be the machine's load, twice in a row is the driver."""
    class_: Class = "gpu-reset" if times > 1 else "ignore"
    return Finding(
        seq=0, kind="tool-hangs", text=text, probe=probe, layer="driver", code=tool, class_=class_, role="cause" if times > 1 else "context"
    )
