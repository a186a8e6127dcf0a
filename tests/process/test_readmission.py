"""A device that was broken and recovered: nobody comes to its node before a real examination has passed."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from ill import installed
from launched import Launched
from outside import ROOT, alive
from resilient_agents import preflight
from resilient_agents.readmission import Readmission
from test_injected import job, machine

from resilient.core.machine import Admitted, Probed
from resilient.core.messages import Finding
from resilient.rulebook import shipped

pytestmark = [pytest.mark.process, pytest.mark.timeout(180)]
DEVICE = "pci:0000:40:03"
BROKEN = "pcieport 0000:40:03.0: AER: device recovery failed"
WELL = "pcieport 0000:40:03.0: AER: device recovery successful"


def broken(**more) -> Finding:
    return Finding(seq=0, **{"kind": "aer", "probe": "kernel-log", "layer": "pcie", "device": DEVICE, "class_": "replace", **more})


def well(**more) -> Finding:
    return broken(**{"class_": "ignore", "role": "context", "clears": True, **more})


class Node:
    def __init__(self, limit_s: float = 60.0) -> None:
        self.events: list = []
        self.gate = Readmission(shipped(), {DEVICE: 0}, limit_s)
        self.gate.start(self.events.append)

    async def until(self, found: Callable[[], bool]) -> None:
        end = time.monotonic() + 60
        while not found():
            assert time.monotonic() < end, self.events
            await asyncio.sleep(0.01)

    @property
    def admitted(self) -> Admitted:
        return [event for event in self.events if isinstance(event, Admitted)][-1]

    @property
    def told(self) -> list[Finding]:
        return [finding for event in self.events if isinstance(event, Probed) for finding in event.findings]


@pytest.fixture
def tell(tmp_path, monkeypatch) -> Callable[[str], object]:
    path = installed(tmp_path / "ill", {"if-told": "FailsIfTold"})
    monkeypatch.setattr(preflight, "RECHECK", ("if-told",))  # ours take seconds each
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{ROOT / 'agents'}:{path}")
    monkeypatch.setenv("ILL_FILE", str(tmp_path / "told"))
    return (tmp_path / "told").write_text


async def test_it_is_examined_after_each_recovery(tell: Callable[[str], object]) -> None:
    node = Node()
    node.gate.heard([broken()])
    assert node.events == []
    node.gate.heard([well()])
    assert node.events == [Admitted(passed=False, why=f"{DEVICE} is being examined after its recovery")]
    await node.until(lambda: bool(node.gate.pids))
    (pid,) = node.gate.pids
    assert alive(pid)
    await node.until(lambda: node.admitted.passed)
    assert node.told == [] and node.gate.pids == set() and not alive(pid)
    tell("fail")
    node.gate.heard([broken()])
    node.gate.heard([well()])
    assert not node.admitted.passed
    await node.until(lambda: "failed the examination" in node.admitted.why)
    (found,) = node.told
    assert (found.kind, found.probe, found.class_, found.clears) == ("doctor", "doctor", "replace", False)
    assert "3 legs" in found.text
    tell("")
    node.gate.heard([broken(), well()])
    await node.until(lambda: node.admitted.passed)
    assert [(it.kind, it.device, it.clears) for it in node.told] == [("doctor", "dev:table", False), ("doctor", "dev:table", True)]


async def test_one_without_end_does_not_let_anybody_in(tell: Callable[[str], object]) -> None:
    tell("slow")
    node = Node(limit_s=1.0)
    node.gate.heard([broken(), well()])
    await node.until(lambda: "failed the examination" in node.admitted.why)
    assert {it.class_ for it in node.told} == {"cordon"}
    node.gate.heard([broken(), well()])
    await node.until(lambda: bool(node.gate.pids))
    (pid,) = node.gate.pids
    await node.gate.close()
    assert not alive(pid)


@pytest.mark.parametrize(
    "before",
    [
        broken(class_="app-restart"),
        broken(role="symptom"),
        broken(probe="worker-log"),
        broken(device="pci:0000:41:00"),
        broken(kind="ib-link", layer="nic"),
    ],
)
async def test_what_asks_for_no_examination(before: Finding) -> None:
    node = Node()
    node.gate.heard([before, well(kind=before.kind, layer=before.layer) if before.kind != "aer" else well()])
    assert node.events == [] and node.gate.pids == set()


@pytest.mark.long
def test_nobody_is_seated_while_the_node_is_examined(tmp_path: Path) -> None:
    root = machine(tmp_path / "host")
    ill = installed(tmp_path / "ill", {"matmul": "FailsIfTold"})
    env = {"PYTHONPATH": f"{ROOT}:{ROOT / 'agents'}:{ill}", "ILL_FILE": str(tmp_path / "told")}
    flags = ["--nproc-per-node", "2", "--standbys", "1", "--probe-socket", "", "--probe-root", str(root), "--preflight", "quick"]
    with Launched(tmp_path, flags, "job.py", job(tmp_path, steps=100), env=env) as run:

        def said(line: str) -> None:
            with (root / "dev/kmsg").open("a") as log:
                log.write(f"4,1,1,-;{line}\n")

        run.until_standbys(1)
        (tmp_path / "go").touch()
        run.until_step(6)
        (tmp_path / "told").write_text("slow")
        said(BROKEN)
        run.until(lambda: [row for row in run.events("finding") if row["kind"] == "aer"], "the broken device")
        said(WELL)
        run.until(lambda: [row for row in run.events("finding") if row["kind"] == "aer" and row["clears"]], "its recovery")
        run.signal(1, signal.SIGKILL)
        run.until(lambda: [row for row in run.events("finding") if row["kind"] == "no_room"], "nobody is seated")
        (row,) = [row for row in run.events("finding") if row["kind"] == "no_room"]
        assert "not admitted: " in row["text"] and "is being examined after its recovery" in row["text"]
        assert run.wait() == 0, run.text()
        (incident,) = run.incidents()
        assert incident["steps_lost"] == 0
