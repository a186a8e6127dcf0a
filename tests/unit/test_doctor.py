"""The doctor's pure parts: what a number or a line of the system is made of, the table, JSON, findings, and matrices known to the last bit."""

from __future__ import annotations

import argparse
import random
import resource
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from resilient_agents import chart as charts
from resilient_agents import doctor
from resilient_agents.chart import Row, compared, table
from resilient_agents.check import Answer, Patient
from resilient_agents.checks import bandwidth, clock, disk, limits, matmul, network, nvidia
from resilient_agents.examination import Subject
from resilient_agents.exercises import matmul as exercise
from resilient_agents.isolation import ending

from resilient.core.messages import Finding
from resilient.errors import ConfigError


def row(name: str = "matmul", **facts) -> Row:
    return Row(**{"source": "check", "name": name, **facts})


def chart(*rows: Row):
    return charts.chart("n7", 1.0, 2.5, rows, quick=True)


# --------------------------------------------------------------------------- rows


def test_the_worst_comes_first_and_columns_stand_below_each_other() -> None:
    told = chart(
        row("limits", what="open files", value="20000", expected=">= 4096"),
        row(what="float32 result", device="gpu:3", state="fail", value="WRONG", expected="exact", text="row 17 first"),
        row("clock", state="warn", value="no"),
        row("nvidia", state="absent", text="no module"),
        row("disk", what="read", number=1234.5678, unit="MB/s", seconds=0.26),
    )
    assert table(told).splitlines() == [
        "        check                  device  value      expected    s",
        "fail    matmul float32 result  gpu:3   WRONG      exact     0.0",
        "          row 17 first",
        "warn    clock                          no                   0.0",
        "pass    limits open files              20000      >= 4096   0.0",
        "absent  nvidia                                              0.0",
        "          no module",
        "pass    disk read                      1235 MB/s            0.3",
        "",
        "node n7 is NOT fit for work: 2 pass, 1 warn, 1 fail, 1 absent; 2.5 s",
    ]
    assert table(told, colours=True).count("\x1b[31m") == 1


def test_warnings_do_not_close_the_gate() -> None:
    assert chart(row(state="warn"), row(state="absent"), row(state="skipped")).sound
    assert not chart(row(), row(state="fail")).sound


def test_findings() -> None:
    seen = Finding(seq=0, kind="xid", code="79", class_="cordon")
    told = chart(
        row(what="result", device="gpu:3", state="fail", layer="gpu", value="WRONG", expected="exact", class_="cordon", text="why"),
        row("clock", state="warn", value="no", expected="yes"),
        row("xid", source="probe", state="fail", finding=seen),
        row("limits"),
    )
    first, second, third = told.findings
    assert (first.kind, first.probe, first.layer, first.code, first.device) == ("doctor", "doctor", "gpu", "matmul", "gpu:3")
    assert (first.class_, first.text) == ("cordon", "matmul result gpu:3: exact expected, WRONG found; why")
    assert (second.code, second.class_) == ("clock", "ignore")
    assert third == seen


def test_json_is_read_back(tmp_path: Path) -> None:
    probed = row("x", source="probe", finding=Finding(seq=0, kind="xid"))
    told = chart(row(number=3.5, unit="TFLOP/s", better="more", class_="replace"), probed)
    path = tmp_path / "healthy.json"
    path.write_bytes(msgspec.json.encode(told))
    assert charts.read(str(path)) == told
    assert b'"class":"replace"' in path.read_bytes()


@given(st.binary(max_size=200))
@settings(max_examples=50, deadline=None)
def test_anything_else_is_refused(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.mktemp("json") / "x"
    path.write_bytes(data)
    with pytest.raises(ConfigError, match="--compare"):
        charts.read(str(path))


def speeds(bus: str, *numbers: float) -> list[Row]:
    devices = [f"pci:0000:{bus}{at}:00,gpu:{at}" for at in range(len(numbers))]
    return [row(what="speed", device=device, number=n, unit="TFLOP/s", better="more") for device, n in zip(devices, numbers, strict=True)]


def test_beside_a_healthy_node() -> None:
    healthy = chart(
        *speeds("1", 100, 100, 100), row("clock", number=0.1, unit="s", better="less"), row("disk", what="tmp read", number=9.0)
    )
    here = [*speeds("2", 81, 79), row("clock", number=0.2, unit="s", better="less"), row("disk", what="tmp read", number=1.0)]
    found = compared(here, healthy)
    states = [(it.name, it.state) for it in found]
    assert states == [("matmul", "pass"), ("matmul", "warn"), ("clock", "warn"), ("disk", "pass"), ("matmul", "warn")]
    assert found[1].expected == ">= 80 TFLOP/s"
    assert (found[4].value, found[4].expected) == ("not here", "as on n7: 100 TFLOP/s")


# --------------------------------------------------------------------------- what is chosen


def test_chosen() -> None:
    known = [Subject("probe", "xid", dict), Subject("check", "disk", dict), Subject("check", "clock", dict)]

    def names(only: list[str], skip: list[str]) -> list[str]:
        return [subject.name for subject in doctor.chosen(known, only, skip)]

    assert names([], []) == ["xid", "disk", "clock"]
    assert names(["checks"], ["disk"]) == ["clock"]
    assert names(["probes", "disk"], []) == ["xid", "disk"]
    with pytest.raises(ConfigError, match=r"'dsk': .*; the nearest is 'disk'"):
        names([], ["dsk"])
    with pytest.raises(ConfigError, match="nothing to be done"):
        names(["probes"], ["xid"])


def test_devices() -> None:
    parser = argparse.ArgumentParser()
    doctor.add_arguments(parser)

    def patient(*words: str) -> Patient:
        return doctor._patient(parser.parse_args(words))

    assert (patient().devices, patient().cpu) == (None, True)
    assert (patient("--devices", "0,3").devices, patient("--devices", "").devices) == ((0, 3), ())
    assert dict(patient("--checkpoint", "file:///ckpt").places)["checkpoint"] == "/ckpt"


def test_never_imports_torch() -> None:
    code = "import sys; from resilient_agents import doctor, preflight, exercise; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_ending() -> None:
    assert (ending(3), ending(-9), ending(-99)) == ("exit code 3", "killed by signal 9 (SIGKILL)", "killed by signal 99")


# --------------------------------------------------------------------------- single checks


@pytest.mark.parametrize(
    ("status", "offset", "state"), [(0x2001, 1000, "pass"), (0x2041, 0, "warn"), (0x1, 2_000_000, "warn"), (0x2001, 2_000_000, "pass")]
)
def test_kept_in_step(status: int, offset: int, state: str) -> None:
    assert clock.kept(status, offset, 1000).state == state


def test_chrony() -> None:
    text = (
        "Reference ID    : A9FEA97B (169.254.169.123)\nSystem time     : 0.000004123 seconds slow of NTP time\nLeap status     : Normal\n"
    )
    assert (clock.tracked(text).state, clock.tracked(text).number) == ("pass", 4.123e-06)
    assert clock.tracked(text.replace("Normal", "Not synchronised")).state == "warn"
    assert clock.tracked(text.replace("0.000004123", "12.5")).state == "warn"


@given(st.text(max_size=300) | st.from_regex(r"System time +: [0-9.]+ seconds (fast|slow)"))
def test_chrony_may_say_anything(text: str) -> None:
    assert clock.tracked(text).state in {"warn", "pass"}


def test_limits() -> None:
    assert [limits.files(n).state for n in (64, 1024, 65536, resource.RLIM_INFINITY)] == ["fail", "warn", "pass", "pass"]
    assert limits.locked(65536, rdma=True).state == "warn"
    assert limits.locked(65536, rdma=False).state == limits.locked(resource.RLIM_INFINITY, rdma=True).state == "pass"
    assert limits.processes(100).state == "warn"


def test_own_name() -> None:
    assert network.own("n7", ["127.0.1.1"], {"127.0.0.1", "10.0.0.7"}).state == "warn"
    assert network.own("n7", ["10.0.0.7", "fe80::1%eth0"], {"10.0.0.7", "fe80::1"}).state == "pass"
    strange = network.own("n7", ["10.0.0.9"], {"10.0.0.7"})
    assert (strange.state, "10.0.0.9" in strange.text) == ("warn", True)


def test_the_nearest_directory(tmp_path: Path) -> None:
    assert disk.nearest(str(tmp_path / "a" / "b")) == str(tmp_path)
    assert disk.nearest("/") == "/"


def test_gpus_expected() -> None:
    assert nvidia.expected(8, 8, None, partitioned=False) == 8
    assert nvidia.expected(8, 2, None, partitioned=False) == 2  # a container with two
    assert nvidia.expected(0, 8, None, partitioned=False) == 8  # one that is not shown the driver's list
    assert nvidia.expected(8, 8, "0,1", partitioned=False) == 2
    assert nvidia.expected(8, 8, "", partitioned=False) == 0
    assert nvidia.expected(8, 8, "0,-1,1", partitioned=False) == 1
    assert nvidia.expected(8, 8, None, partitioned=True) == 1
    assert (nvidia.seen(7, 8, "").state, nvidia.seen(7, 8, "").class_) == ("fail", "gpu-reset")
    assert nvidia.seen(8, 8, "").state == "pass"


def test_gpus_alike() -> None:
    kinds = [{"device": f"gpu:{at}", "name": "H100", "memory": 80e9} for at in range(3)]
    kinds[1] = {**kinds[1], "memory": 40e9}
    assert [it.state for it in nvidia.alike(kinds)] == ["pass", "warn", "pass"]
    assert nvidia.alike([]) == []


def test_driver_version() -> None:
    assert nvidia.version("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.124.06  Release Build\nGCC") == "570.124.06"
    assert nvidia.version("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.54.03  Tue Jun  6") == "535.54.03"
    assert nvidia.version("") == ""


def test_a_slow_device_beside_its_neighbours() -> None:
    def value(tflops: float, wrong: str = "") -> Answer:
        return Answer(value={"float32": {"wrong": wrong, "tflops": tflops, "products": 9}})

    answers = [value(100), value(101), value(80), value(40), value(0, "row 3 first"), Answer(failure="no answer within 25 s")]
    told = {(it.device, it.what): it for it in matmul.judged([f"gpu:{at}" for at in range(6)], answers)}
    assert [told[f"gpu:{at}", "float32 speed"].state for at in range(4)] == ["pass", "pass", "warn", "fail"]
    assert (told["gpu:4", "float32 result"].class_, told["gpu:4", "float32 result"].state) == ("cordon", "fail")
    assert (told["gpu:5", "result"].class_, told["gpu:5", "result"].text) == ("gpu-reset", "no answer within 25 s")
    assert ("gpu:4", "float32 speed") not in told


def test_a_slow_copy() -> None:
    answers = [Answer(value={"gb_s": speed, "wrong": ""}) for speed in (2000.0, 2010.0, 900.0)]
    found = bandwidth.judged("gpu", dict(enumerate(["gpu:0", "gpu:1", "gpu:2"])), answers)
    assert [it.state for it in found] == ["pass", "pass", "fail"]
    (wrong,) = bandwidth.judged("host-mem", {"cpu": "cpu"}, [Answer(value={"gb_s": 9.0, "wrong": "1 of 9 bytes differ"})])
    assert (wrong.state, wrong.value, wrong.class_) == ("fail", "WRONG", "cordon")


# --------------------------------------------------------------------------- matrices


@pytest.mark.parametrize("dtype", list(exercise.EXACT), ids=str)
@pytest.mark.parametrize("size", [64, 500, 1500])
def test_no_partial_sum_leaves_what_the_format_holds(dtype: torch.dtype, size: int) -> None:
    left, right = exercise.matrices(size, dtype, torch.Generator().manual_seed(3))
    assert torch.equal(left.to(dtype).to(torch.int64), left)
    assert torch.equal(right.to(dtype).to(torch.int64), right)
    assert int((left.abs().double() @ right.abs().double()).max()) <= exercise.EXACT[dtype]
    exact = left.double() @ right.double()  # below 2**53
    assert exercise.difference(left, right, exact.to(dtype)) == ""
    assert exact.abs().max() > 20  # it is not all zeros


@pytest.mark.parametrize("dtype", list(exercise.EXACT), ids=str)
def test_every_single_bit_counts(dtype: torch.dtype) -> None:
    left, right = exercise.matrices(64, dtype, torch.Generator().manual_seed(4))
    good = (left.double() @ right.double()).to(dtype)
    bits, chance = torch.finfo(dtype).bits, random.Random(5)
    whole = {32: torch.int32, 16: torch.int16}[bits]
    for bit in range(bits):
        at, found = chance.randrange(64 * 64), good.clone()
        found.view(whole).view(-1)[at] ^= -(1 << bit) if bit == bits - 1 else 1 << bit
        if not torch.equal(found, good):  # the sign of a zero is none
            assert exercise.difference(left, right, found) != "", (bit, at)
