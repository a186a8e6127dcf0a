"""Mounts: file systems that could be written to and cannot any more, and those that have gone.

Contract: reads <root>/proc/self/mounts (or /proc/mounts). A disk's or network's file system that is read-only from the start was meant so,
unless its options say `errors=remount-ro` and it is mounted where somebody writes: then it is counted. One that turns from rw to ro is
told until it is rw again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

from resilient.core.messages import Finding
from resilient_agents.probe import Absent
from resilient_agents.probes import reading

if TYPE_CHECKING:
    from resilient_agents.probe import Surroundings

SHUT_DOWN: Final = frozenset({"shutdown", "emergency_ro"})  # options of ext4 and xfs
_VIRTUAL: Final = """
proc sysfs devtmpfs devpts tmpfs ramfs cgroup cgroup2 securityfs debugfs tracefs bpf pstore efivarfs configfs fusectl mqueue hugetlbfs
autofs binfmt_misc rpc_pipefs nsfs squashfs iso9660 overlay
"""
VIRTUAL: Final = frozenset(_VIRTUAL.split())


class Mount(NamedTuple):
    """One line."""

    device: str
    point: str
    kind: str
    options: frozenset[str]

    @property
    def read_only(self) -> bool:
        """Whether nobody can write."""
        return "ro" in self.options or bool(SHUT_DOWN & self.options)


def parse(lines: list[str]) -> dict[str, Mount]:
    """Mount point -> what lies there (the uppermost), of /proc/mounts."""
    found = {}
    for line in lines:
        words = line.split(" ")
        if len(words) >= 4:
            point = words[1].replace("\\040", " ").replace("\\011", "\t").replace("\\134", "\\")
            found[point] = Mount(words[0], point, words[2], frozenset(words[3].split(",")))
    return found


class Mounts:
    """All of a node's."""

    name = "mounts"
    period_s = 5.0
    lasting = True

    def __init__(self, surroundings: Surroundings) -> None:
        """Raises Absent without a table."""
        self._path = next((p for name in ("self/mounts", "mounts") if reading.lines(p := surroundings.path(f"/proc/{name}"))), "")
        if not self._path:
            raise Absent(f"{surroundings.path('/proc/mounts')}: nothing to read")
        self._writable = {point for point, mount in self._real().items() if not mount.read_only}

    def check(self, now: float) -> list[Finding]:
        """Which have turned."""
        del now
        findings = []
        mounts = self._real()
        for point, mount in mounts.items():
            if not mount.read_only:
                self._writable.add(point)
            elif point in self._writable or SHUT_DOWN & mount.options:
                text = f"{point} ({mount.kind} on {mount.device}) was writable and is read-only"
                name = mount.device.rpartition("/")[2]
                findings.append(
                    Finding(seq=0, kind="fs-readonly", layer="fs", code="ro", device=f"dev:{name}", class_="replace", text=text)
                )
        self._writable &= set(mounts)  # one that was unmounted and comes back read-only was meant so
        return findings

    def _real(self) -> dict[str, Mount]:
        return {point: mount for point, mount in parse(reading.lines(self._path)).items() if mount.kind not in VIRTUAL}
