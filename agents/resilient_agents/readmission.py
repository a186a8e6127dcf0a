"""Readmission: a device that was broken and is said to be well again is examined before anybody comes to its node.

Think of a horse that limped yesterday: that it stands on four legs this morning is good news, and it is walked around the yard before
anybody sits on it.

Contract: `heard` is given what the probes tell before the agent is, so that the node is closed before the news of the recovery can open
it. A cause of class gpu-reset, replace or cordon from a probe whose word is proof is remembered; when it is over, the node is not admitted
until `preflight.recheck` of that device has passed. One that does not pass is a finding "doctor", and the node stays out until the device
recovers once more and passes. Examinations come one after the other, each in a process of its own with a time limit; their pids are in
`pids`. Nothing is examined whose layer the examination cannot judge: that its probe sees it well is all there is to know.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import TYPE_CHECKING, Final

from msgspec.structs import replace

from resilient import rulebook
from resilient.core import machine as m
from resilient.core.messages import NONE, Finding
from resilient.core.rules import Book
from resilient_agents import preflight
from resilient_agents.devices import NOBODY
from resilient_agents.sieve import NODE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from resilient.config import Options
    from resilient.core.rules import Rules

UNJUDGED: Final = frozenset({"nic", "fs", "storage", "nfs", "process", "training"})
OPEN_MAX: Final = 256
TEXT_MAX: Final = 300
log = logging.getLogger("resilient.probes")


def wanted(options: Options, devices: Mapping[str, int]) -> Readmission | None:
    """Where nodes are examined before they take part, they are before they do again."""
    if options.preflight == "off":
        return None
    return Readmission(rulebook.load(options.policy), devices, options.preflight_timeout_s)


class Readmission:
    """One node's."""

    def __init__(self, rules: Rules, devices: Mapping[str, int], timeout_s: float) -> None:
        """devices: as findings name them -> local rank."""
        self.pids: set[int] = set()
        self._book = Book(rules)
        self._devices = devices
        self._timeout_s = timeout_s
        self._put: Callable[[m.AgentEvent], None] = lambda _: None
        self._ill: dict[tuple[str, str], None] = {}  # (kind, device), in the order of their coming
        self._due: dict[str, None] = {}  # devices that wait for their examination
        self._failed: dict[str, tuple[Finding, ...]] = {}  # device -> what was told of it
        self._task: asyncio.Task[None] | None = None

    def start(self, put: Callable[[m.AgentEvent], None]) -> None:
        """`put` is given what the agent is to know."""
        self._put = put

    def heard(self, findings: Iterable[Finding]) -> None:
        """What the probes are about to tell the agent."""
        for finding in findings:
            if finding.clears:
                over = finding.kind, finding.device
                if over in self._ill:
                    del self._ill[over]
                    self._due[finding.device] = None
            elif self._severe(finding):
                self._ill[finding.kind, finding.device] = None
                if len(self._ill) > OPEN_MAX:
                    del self._ill[next(iter(self._ill))]
        if self._due and (self._task is None or self._task.done()):
            self._shut(next(iter(self._due)))
            self._task = asyncio.create_task(self._examine())
            self._task.add_done_callback(_ended)

    async def close(self) -> None:
        """End what is under way."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    def _severe(self, finding: Finding) -> bool:
        ruling = self._book.ruling(finding)
        return ruling.proof and ruling.class_ in NODE and finding.role == "cause" and finding.layer not in UNJUDGED

    def _shut(self, device: str) -> None:
        self._put(m.Admitted(passed=False, why=f"{device or 'the node'} is being examined after its recovery"))

    async def _examine(self) -> None:
        while self._due:
            device = next(iter(self._due))
            del self._due[device]
            self._shut(device)
            verdict = await preflight.recheck(self._local_rank(device), self._timeout_s, self.pids)
            self._judge(device, verdict)
        failed = ", ".join(it or "the node" for it in self._failed)
        why = f"{failed} failed the examination after its recovery" if failed else ""
        self._put(m.Admitted(passed=not self._failed, why=why))

    def _local_rank(self, device: str) -> int:
        """Whose it is, NONE = no one's in particular: then all are examined."""
        known = [self._devices[name] for name in device.split(",") if name in self._devices]
        return known[0] if known and known[0] != NOBODY else NONE

    def _judge(self, device: str, verdict: preflight.Verdict) -> None:
        before = self._failed.pop(device, ())
        told = [replace(it, class_="ignore", role="context", clears=True, text=f"over: {it.text}") for it in before]
        if not verdict.sound:
            bad = tuple(it for it in verdict.findings if it.class_ in NODE)
            text = f"{device or 'the node'}: examined after its recovery: {verdict.text}"[:TEXT_MAX]
            self._failed[device] = bad or (
                Finding(seq=0, kind="doctor", probe="doctor", layer="node", device=device, class_="cordon", text=text),
            )
            told += self._failed[device]
        if told:
            now = time.monotonic()
            self._put(m.Probed(findings=tuple(replace(it, t=now) for it in told)))


def _ended(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        log.error("a fault of ours: this node takes no further ranks", exc_info=error)
