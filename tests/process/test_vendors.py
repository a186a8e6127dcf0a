"""Probes of other vendors' devices: against programs on PATH that print recorded forms, and recreated trees of /sys."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

import pytest
from resilient_agents.probe import Absent, Surroundings
from resilient_agents.probes import ascend, tool
from resilient_agents.probes.amd import Amd
from resilient_agents.probes.ascend import Chip, Links, Npus, parse_counts, parse_health, parse_link, parse_list
from resilient_agents.probes.moore_threads import MooreThreads, parse
from resilient_agents.probes.tool import Fails, Hangs, Tool

pytestmark = pytest.mark.process
DATA = Path(__file__).parents[1] / "data" / "vendors"
SCRIPT = """#!/bin/sh
answers={answers}
key=$(echo "$*" | tr ' /' '__')
if [ -e "$answers/hang" ]; then sleep 1000 & wait; fi
if [ -e "$answers/$key" ]; then cat "$answers/$key"; exit 0; fi
echo "this device does not support querying $*" >&2
exit 7
"""


class Program:
    """A program on PATH: what it answers to which arguments."""

    def __init__(self, directory: Path, name: str) -> None:
        self.answers = directory / f"{name}.answers"
        self.answers.mkdir()
        script = directory / name
        script.write_text(SCRIPT.format(answers=self.answers))
        script.chmod(0o755)

    def says(self, arguments: str, file: Path | None, text: str = "") -> None:
        path = self.answers / arguments.replace(" ", "_").replace("/", "_")
        if file is None and not text:
            path.unlink(missing_ok=True)
        else:
            path.write_text(file.read_text() if file else text)


@pytest.fixture
def program(tmp_path, monkeypatch):
    binaries = tmp_path / "bin"
    binaries.mkdir()
    monkeypatch.setenv("PATH", f"{binaries}{os.pathsep}/usr/bin{os.pathsep}/bin")
    return lambda name: Program(binaries, name)


def told(findings):
    return [(finding.kind, finding.code, finding.class_, finding.device) for finding in findings]


# ---------------------------------------------------------------------- tool


def test_a_tool_is_asked(program):
    program("npu-smi").says("info", None, "all well")
    assert Tool("npu-smi").ask("info", timeout_s=20) == "all well"
    with pytest.raises(Fails, match="npu-smi info -x ended with 7: this device does not support"):
        Tool("npu-smi").ask("info", "-x", timeout_s=20)
    with pytest.raises(Absent):
        Tool("no-such-smi", "/no/such/place")


def test_a_tool_that_hangs_is_ended_with_its_children(program):
    npu = program("npu-smi")
    npu.says("hang", None, "yes")
    began = time.monotonic()
    with pytest.raises(Hangs, match=r"has not ended within 0\.3 s"):
        Tool("npu-smi").ask("info", timeout_s=0.3)
    assert time.monotonic() - began < 20
    left = subprocess.run(["pgrep", "-f", str(npu.answers.parent / "npu-smi")], capture_output=True, check=False, text=True).stdout.split()
    assert left == []


def test_a_flood_is_cut(program, monkeypatch):
    monkeypatch.setattr(tool, "OUTPUT_MAX", 1000)
    program("npu-smi").says("info", None, "x" * 5000)
    assert len(Tool("npu-smi").ask("info", timeout_s=20)) == 1000


# -------------------------------------------------------------------- ascend


def test_what_npu_smi_prints_is_understood():
    chips = parse_list((DATA / "ascend/list.txt").read_text())
    assert len(chips) == 8
    assert chips[7] == Chip(card=7, chip=0, number=7, health="OK", pci="0000:3d:00")
    assert chips[0].device == "pci:0000:61:00,npu:0"
    pairs = parse_list((DATA / "ascend/list.910c.txt").read_text())
    assert [(chip.card, chip.chip, chip.number) for chip in pairs] == [(n // 2, n % 2, n) for n in range(16)]
    assert [chip.card for chip in parse_list((DATA / "ascend/list.alarm.txt").read_text()) if chip.health != "OK"] == [5]
    assert parse_health((DATA / "ascend/health.ok.txt").read_text()) == ("OK", (), "")
    assert parse_health((DATA / "ascend/health.alarm.txt").read_text())[:2] == ("Alarm", ("80C98001",))
    assert parse_health("Health Status : Critical\nError Code : 0x80e18402, 80E0020B\n")[1] == ("80E18402", "80E0020B")
    assert parse_counts((DATA / "ascend/ecc.double.txt").read_text())[0]["HBM Double Bit Error Count"] == 2
    assert [parse_link(text) for text in ("link status: UP\n", "link status: DOWN", "no such device")] == [True, False, None]


@pytest.fixture
def npus(program):
    npu = program("npu-smi")
    npu.says("info", DATA / "ascend/list.txt")
    for card in range(8):
        npu.says(f"info -t health -i {card} -c 0", DATA / "ascend/health.ok.txt")
        npu.says(f"info -t ecc -i {card}", DATA / "ascend/ecc.txt")
    return npu


FIVE = "pci:0000:da:00,npu:5"


def test_healthy_npus_for_a_while(npus):
    probe = Npus(Surroundings())
    assert [probe.check(60.0 * n) for n in range(12)] == [[]] * 12


def test_an_alarm_is_told_by_its_code_and_is_over_with_it(npus):
    probe = Npus(Surroundings())
    assert probe.check(0.0) == []
    npus.says("info", DATA / "ascend/list.alarm.txt")
    npus.says("info -t health -i 5 -c 0", DATA / "ascend/health.alarm.txt")
    assert told(probe.check(60.0)) == [("npu-fault", "80C98001", "gpu-reset", FIVE)]
    npus.says("info", DATA / "ascend/list.txt")
    npus.says("info -t health -i 5 -c 0", DATA / "ascend/health.ok.txt")
    assert probe.check(120.0) == []


def test_an_alarm_that_the_list_hides_is_found_in_turn(npus):
    probe = Npus(Surroundings())
    npus.says("info -t health -i 5 -c 0", DATA / "ascend/health.alarm.txt")
    found = [bool(probe.check(60.0 * n)) for n in range(16)]
    assert sum(found) > 8
    assert found == sorted(found)  # and stays


@pytest.mark.parametrize(
    ("status", "code", "class_"),
    [
        ("Alarm", "80E18402", "cordon"),
        ("Warning", "81078605", "ignore"),
        ("Critical", "8FFFFFFF", "cordon"),
        ("Alarm", "8FFFFFFF", "gpu-reset"),
    ],
)
def test_codes_known_and_unknown(npus, status, code, class_):
    npus.says("info", DATA / "ascend/list.alarm.txt")
    npus.says("info -t health -i 5 -c 0", None, f"Health Status : {status}\nError Code : {code}\nError Information : words\n")
    assert told(Npus(Surroundings()).check(0.0)) == [("npu-fault", code, class_, FIVE)]


def test_memory_errors_of_an_npu(npus):
    probe = Npus(Surroundings())
    for n in range(8):
        assert probe.check(60.0 * n) == []
    npus.says("info -t ecc -i 5", DATA / "ascend/ecc.double.txt")
    seen = [told(probe.check(60.0 * n)) for n in range(8, 17)]
    assert ("ecc", "uncorrectable", "app-restart", FIVE) in seen[-1]
    npus.says("info -t ecc -i 5", DATA / "ascend/ecc.isolated.txt")
    seen = [told(probe.check(60.0 * n)) for n in range(17, 26)]
    assert ("ecc", "pages-isolated", "cordon", FIVE) in seen[-1]


def test_an_npu_that_left_the_list(npus):
    probe = Npus(Surroundings())
    assert probe.check(0.0) == []
    npus.says("info", DATA / "ascend/list.seven.txt")
    assert told(probe.check(60.0)) == [("npu-lost", "", "replace", "pci:0000:3d:00,npu:7")]


def test_a_tool_that_hangs_or_talks_nonsense(npus, monkeypatch):
    probe = Npus(Surroundings())
    npus.says("info", DATA / "ascend/list.alarm.txt")
    npus.says("info -t health -i 5 -c 0", DATA / "ascend/health.alarm.txt")
    alarm = ("npu-fault", "80C98001", "gpu-reset", FIVE)
    assert told(probe.check(0.0)) == [alarm]
    monkeypatch.setattr(ascend, "ASK_S", 0.2)
    npus.says("hang", None, "yes")
    assert told(probe.check(60.0)) == [alarm, ("tool-hangs", "npu-smi", "ignore", "")]  # what was the matter still is
    assert told(probe.check(120.0)) == [alarm, ("tool-hangs", "npu-smi", "gpu-reset", "")]
    npus.says("hang", None)
    monkeypatch.setattr(ascend, "ASK_S", 20.0)
    npus.says("info", None, "\x00\xff garbage | | |\n" * 100)
    assert told(probe.check(180.0)) == [alarm, ("npu-smi", "", "ignore", "")]
    npus.says("info", None)
    assert told(probe.check(240.0)) == [alarm, ("npu-smi", "", "ignore", "")]
    npus.says("info", DATA / "ascend/list.alarm.txt")
    npus.says("info -t health -i 5 -c 0", None)
    assert told(probe.check(300.0))[:2] == [alarm, ("npu-smi", "", "ignore", FIVE)]


def test_a_port_that_stays_down(program):
    hccn = program("hccn_tool")
    for number in range(4):
        hccn.says(f"-i {number} -link -g", DATA / "ascend/link.up.txt")
    hccn.says("-i 3 -link -g", DATA / "ascend/link.down.txt")  # never was up: no cable
    probe = Links(Surroundings())
    assert [probe.check(15.0 * n) for n in range(12)] == [[]] * 12
    hccn.says("-i 2 -link -g", DATA / "ascend/link.down.txt")
    seen = [told(probe.check(15.0 * n)) for n in range(12, 20)]
    assert seen[-1] == [("npu-link", "down", "replace", "npu:2")]
    hccn.says("-i 2 -link -g", DATA / "ascend/link.up.txt")
    assert probe.check(300.0) == []


# ------------------------------------------------------------- moore threads


def on_pci(root: Path, vendor: str, count: int = 8) -> None:
    for index in range(count):
        device = root / f"sys/bus/pci/devices/0000:{0x1A + index:02x}:00.0"
        device.mkdir(parents=True, exist_ok=True)
        (device / "vendor").write_text(f"{vendor}\n")
        (device / "class").write_text("0x038000\n")


@pytest.mark.parametrize("name", ["list.json", "list.txt"])
def test_what_mthreads_gmi_prints_is_understood(name):
    gpus = parse((DATA / "moore_threads" / name).read_text())
    assert len(gpus) == 8
    assert "MTT S5000" in gpus[7].values()


def test_gpus_of_moore_threads(program, tmp_path):
    with pytest.raises(Absent):
        MooreThreads(Surroundings(str(tmp_path / "root")))
    on_pci(tmp_path / "root", "0x1ed5")
    gmi = program("mthreads-gmi")
    gmi.says("-q -j", DATA / "moore_threads/list.json")
    probe = MooreThreads(Surroundings(str(tmp_path / "root")))
    assert probe.check(0.0) == []
    gmi.says("-q -j", None)  # an older version
    gmi.says("-q", DATA / "moore_threads/list.txt")
    assert probe.check(60.0) == []
    gmi.says("-q", None, (DATA / "moore_threads/list.txt").read_text().partition("GPU6")[0])
    assert [(finding.kind, finding.class_, finding.text) for finding in probe.check(120.0)] == [
        ("gpu-lost", "replace", "mthreads-gmi lists 6 GPUs of 8")
    ]
    gone = tmp_path / "root/sys/bus/pci/devices/0000:1b:00.0"
    (gone / "vendor").write_text("0xffff\n")
    assert told(probe.check(180.0)) == [("gpu-lost", "", "replace", "pci:0000:1b:00")]


# ----------------------------------------------------------------------- amd


@pytest.fixture
def cards(tmp_path):
    root = tmp_path / "root"
    for index in range(4):
        device = root / f"sys/class/drm/card{index}/device"
        (device / "ras").mkdir(parents=True)
        (device / "vendor").write_text("0x1002\n")
        (device / "uevent").write_text(f"DRIVER=amdgpu\nPCI_CLASS=38000\nPCI_SLOT_NAME=0000:{0x0A + index:02x}:00.0\n")
        for block in ("umc", "gfx", "sdma"):
            (device / f"ras/{block}_err_count").write_text("ue: 0\nce: 1\n" + ("de: 0\n" if block == "umc" else ""))
        (device / "ras/gpu_vram_bad_pages").write_text("0x027f5d43 : 0x00001000 : R\n")
        (device / "pcie_replay_count").write_text("0\n")
        (device / "current_link_width").write_text("16\n")
    (root / "sys/class/drm/card0-DP-1").mkdir()
    return root


def test_gpus_of_amd(cards):
    with pytest.raises(Absent):
        Amd(Surroundings(str(cards / "nowhere")))
    probe = Amd(Surroundings(str(cards)))
    two, device = "pci:0000:0c:00", cards / "sys/class/drm/card2/device"
    assert [probe.check(30.0 * n) for n in range(3)] == [[]] * 3
    (device / "ras/umc_err_count").write_text("ue: 1\nce: 30\nde: 2\n")
    (device / "ras/gpu_vram_bad_pages").write_text("0x1 : 0x1000 : R\n0x2 : 0x1000 : P\n0x3 : 0x1000 : F\n")
    (device / "pcie_replay_count").write_text("500\n")
    assert sorted(told(probe.check(90.0))) == [
        ("ecc", "correctable-rate", "ignore", two),
        ("ecc", "deferred", "ignore", two),
        ("ecc", "page-retirement-failure", "cordon", two),
        ("ecc", "page-retirement-pending", "ignore", two),
        ("ecc", "uncorrectable", "gpu-reset", two),
        ("pcie", "replay", "ignore", two),
    ]
    (device / "current_link_width").write_text("8\n")
    probe.check(10_000.0)
    assert ("pcie", "width", "cordon", two) in told(probe.check(10_060.0))
    (device / "vendor").unlink()
    assert ("gpu-lost", "", "replace", two) in told(probe.check(10_090.0))
