"""NVML probes against GPUs of a text file, through pynvml, ctypes and the dynamic loader (puppets.py)."""

from __future__ import annotations

import importlib
import importlib.util
import select

import pytest
from puppets import HEALTHY, LINKS, Puppets, Watcher, address, compiled, device, entries

pytestmark = [
    pytest.mark.process,
    pytest.mark.skipif(importlib.util.find_spec("pynvml") is None, reason="needs nvidia-ml-py"),
]
GAUGES = ["nvml-clocks", "nvml-ecc", "nvml-fabric", "nvml-gpus", "nvml-nvlink", "nvml-pcie", "nvml-recovery", "nvml-thermal"]


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return compiled(tmp_path_factory.mktemp("nvml"))


@pytest.fixture
def puppets(tmp_path, library):
    return Puppets(tmp_path, library)


@pytest.fixture
def watching(puppets):
    watchers = []

    def watch(**env):
        watchers.append(Watcher(puppets, entries(), **env))
        return watchers[-1]

    yield watch
    for watcher in watchers:
        watcher.end()


@pytest.fixture
def watcher(watching):
    return watching()


def told(findings):
    return [(found["kind"], found["code"], found["class"], found["device"]) for found in findings]


def test_eight_healthy_gpus_for_an_hour(puppets, watcher):
    for minute in range(60):
        puppets.set("*", field_3=HEALTHY["field.3"] + minute // 5, field_94=minute * 2, field_173=minute, temperature=50 + minute % 30)
        puppets.set("*", reasons=(0x0, 0x1, 0x4, 0x4 | 0x2)[minute % 4])
        if minute % 7 == 0:  # idle: the link saves power
            puppets.set("*", utilization=0, pcie_generation=1, reasons=1)
        else:
            puppets.set("*", utilization=99, pcie_generation=5)
        for name in GAUGES:
            assert watcher.look(name, 60.0 * minute, 60.0 * minute + 30) == [], name


RULES = {
    # probe, what GPU 3 shows, when it is looked at after that, (kind, code, class); every other GPU stays as it is
    "reset": ("nvml-recovery", {"field_230": 1}, [10], ("recovery-action", "reset", "gpu-reset")),
    "reboot": ("nvml-recovery", {"field_230": 2}, [10], ("recovery-action", "node-reboot", "replace")),
    "drain": ("nvml-recovery", {"field_230": 3}, [10], ("recovery-action", "drain-p2p", "app-restart")),
    "drain and reset": ("nvml-recovery", {"field_230": 4}, [10], ("recovery-action", "drain-and-reset", "gpu-reset")),
    "imex": ("nvml-recovery", {"field_230": 5}, [10], ("recovery-action", "recover-imex", "replace")),
    "bus": ("nvml-recovery", {"field_230": 6}, [10], ("recovery-action", "bus-reset", "gpu-reset")),
    "system": ("nvml-recovery", {"field_230": 7}, [10], ("recovery-action", "system-reboot", "replace")),
    "double bit": ("nvml-ecc", {"field_4": 1}, [30], ("ecc", "uncorrectable", "gpu-reset")),
    "double bit of its life": ("nvml-ecc", {"field_6": 1}, [30], ("ecc", "uncorrectable-aggregate", "ignore")),
    "corrected in a minute": ("nvml-ecc", {"field_3": 2 + 11}, [30], ("ecc", "correctable-rate", "ignore")),
    "very many corrected": ("nvml-ecc", {"field_3": 20_000_001}, [30, 3000], ("ecc", "correctable", "cordon")),
    "sram": ("nvml-ecc", {"sram_uncorrected": 1}, [30], ("ecc", "sram-uncorrectable", "cordon")),
    "sram beyond": ("nvml-ecc", {"sram_exceeded": 1}, [30], ("ecc", "sram-threshold", "cordon")),
    "remap failed": ("nvml-ecc", {"field_145": 1}, [30], ("ecc", "row-remap-failure", "cordon")),
    "remap pending": ("nvml-ecc", {"field_144": 1}, [30], ("ecc", "row-remap-pending", "gpu-reset")),
    "many remapped": ("nvml-ecc", {"field_143": 512}, [30], ("ecc", "row-remap-many", "cordon")),
    "page pending": ("nvml-ecc", {"field_31": 1}, [30], ("ecc", "page-retirement-pending", "gpu-reset")),
    "pages": ("nvml-ecc", {"field_29": 63}, [30], ("ecc", "pages-retired", "cordon")),
    "pages again": ("nvml-ecc", {"field_30": 16}, [30], ("ecc", "pages-retired-again", "cordon")),
    "c2c": ("nvml-ecc", {"field_231": 1}, [30], ("c2c", "link-error", "ignore")),
    "link down": ("nvml-nvlink", {"link_7": 0}, [30], ("nvlink", "link-down", "gpu-reset")),
    "flit crc": ("nvml-nvlink", {"field_38": 6001}, [30], ("nvlink", "crc", "cordon")),
    "data crc": ("nvml-nvlink", {"field_45": 6001}, [30], ("nvlink", "crc", "cordon")),
    "crc": ("nvml-nvlink", {"field_163": 400}, [30], ("nvlink", "crc", "cordon")),  # on each of 18 links
    "replay": ("nvml-nvlink", {"field_161": 1}, [30], ("nvlink", "replay", "ignore")),
    "recovery": ("nvml-nvlink", {"field_162": 1}, [30], ("nvlink", "recovery", "ignore")),
    "old replay": ("nvml-nvlink", {"field_52": 1}, [30], ("nvlink", "replay", "ignore")),
    "old recovery": ("nvml-nvlink", {"field_59": 1}, [30], ("nvlink", "recovery", "ignore")),
    "link ecc": ("nvml-nvlink", {"field_160": 1}, [30], ("nvlink", "link-ecc", "ignore")),
    "malformed": ("nvml-nvlink", {"field_206": 1}, [30], ("nvlink", "malformed", "cordon")),
    "overrun": ("nvml-nvlink", {"field_207": 1}, [30], ("nvlink", "overrun", "cordon")),
    "recovery failed": ("nvml-nvlink", {"field_214": 1}, [30], ("nvlink", "recovery-failed", "gpu-reset")),
    "lanes": ("nvml-pcie", {"pcie_width": 8}, [30, 60], ("pcie", "width", "cordon")),
    "generation": ("nvml-pcie", {"pcie_generation": 3}, [30, 90, 150], ("pcie", "generation", "cordon")),
    "replays": ("nvml-pcie", {"field_94": 500}, [30], ("pcie", "replay", "ignore")),
    "roll-over": ("nvml-pcie", {"field_95": 1}, [30], ("pcie", "replay-rollover", "cordon")),
    "pcie recoveries": ("nvml-pcie", {"field_169": 100}, [30], ("pcie", "link-recovery", "ignore")),
    "corrected": ("nvml-pcie", {"field_173": 100}, [30], ("aer", "Corrected", "ignore")),
    "non-fatal": ("nvml-pcie", {"field_179": 1}, [30], ("aer", "Non-Fatal", "cordon")),
    "fatal": ("nvml-pcie", {"field_180": 1}, [30], ("aer", "Fatal", "replace")),
    "hot": ("nvml-clocks", {"reasons": 0x48}, range(60, 420, 30), ("throttle", "HwThermalSlowdown", "cordon")),
    "brake": ("nvml-clocks", {"reasons": 0x88}, range(60, 420, 30), ("throttle", "HwPowerBrakeSlowdown", "cordon")),
    "slow": ("nvml-clocks", {"reasons": 0x8}, range(60, 420, 30), ("throttle", "HwSlowdown", "cordon")),
    "warm": ("nvml-clocks", {"reasons": 0x20}, range(60, 420, 30), ("throttle", "SwThermalSlowdown", "ignore")),
    "persistence": ("nvml-clocks", {"persistence": 0}, [30], ("config", "persistence-off", "ignore")),
    "slowdown": ("nvml-thermal", {"temperature": 92}, [10, 40], ("thermal", "slowdown", "ignore")),
    "memory": ("nvml-thermal", {"field_82": 105}, [10, 40], ("thermal", "memory", "ignore")),
    "shutdown": ("nvml-thermal", {"temperature": 95}, [10], ("thermal", "shutdown", "replace")),
    "fabric": ("nvml-fabric", {"fabric_state": 2}, [30, 330], ("fabric", "incomplete", "cordon")),
    "fabric status": ("nvml-fabric", {"fabric_status": 999}, [30], ("fabric", "status", "cordon")),
    "fabric slow": ("nvml-fabric", {"fabric_mask": 0b01}, [30], ("fabric", "degraded-bandwidth", "cordon")),
    "fabric recovers": ("nvml-fabric", {"fabric_mask": 0b0100}, [30], ("fabric", "route-recovery", "cordon")),
    "fabric broken": ("nvml-fabric", {"fabric_mask": 0b010000}, [30], ("fabric", "route-unhealthy", "cordon")),
    "fabric access": ("nvml-fabric", {"fabric_mask": 0b01000000}, [30], ("fabric", "access-timeout", "cordon")),
    "fabric wrong": ("nvml-fabric", {"fabric_mask": 4 << 8}, [30], ("fabric", "misconfigured", "cordon")),
}
BEFORE = {"field_38": 0, "field_45": 0, "field_52": 0, "field_59": 0, "field_160": 0} | {
    f"field_{n}": 0 for n in (206, 207, 208, 214, 215, 295)
}


def test_every_rule(puppets, watcher):
    wrong = {}
    puppets.set("*", **BEFORE)
    for name, (probe, shown, times, expected) in RULES.items():
        assert watcher.look(probe, 0.0, anew=True) == [], name
        puppets.set(3, **shown)
        found = told(watcher.look(probe, *map(float, times)))
        puppets.set(3, **dict.fromkeys(shown))
        over = told(watcher.look(probe, float(max(times)) + 20_000, float(max(times)) + 1_000_000))
        if (*expected, device(3)) not in found or {entry[3] for entry in found} != {device(3)} or over:
            wrong[name] = (found, over)
    assert not wrong


def test_every_rule_has_a_case():
    from resilient_agents.probes.nvml import RULES as rules

    shown = {(probe, *expected) for probe, _, _, expected in RULES.values()}
    windows = {"fewer-links"} | {"replay-often", "receive-errors", "recovery-often", "retries-often"}  # test_errors_in_many_windows
    assert {(rule.probe, rule.kind, rule.code, rule.class_) for rule in rules if rule.code not in windows} == shown
    assert all(rule.source for rule in rules)


@pytest.mark.parametrize(
    ("field", "code"),
    [(161, "replay-often"), (162, "recovery-often"), (208, "receive-errors"), (215, "recovery-often"), (295, "retries-often")],
)
def test_errors_in_many_windows(puppets, watcher, field, code):
    puppets.set("*", **{f"field_{field}": 0})
    for minute in range(15):
        puppets.set(3, **{f"field_{field}": minute})
        assert code not in [found["code"] for found in watcher.look("nvml-nvlink", 60.0 * minute, 60.0 * minute + 30)]
    for minute in (15, 16):
        puppets.set(3, **{f"field_{field}": minute})
        found = watcher.look("nvml-nvlink", 60.0 * minute)
    assert ("nvlink", code, "cordon", device(3)) in told(found)


def test_a_link_that_is_down_is_named(puppets, watcher):
    watcher.look("nvml-nvlink", 0.0)
    puppets.set(3, link_7=0, link_12=0)
    (found,) = watcher.look("nvml-nvlink", 30.0)
    assert found["text"] == "2 NVLinks that were up are down (links 7 12)"
    puppets.set(3, link_7=None, link_12=None)
    assert watcher.look("nvml-nvlink", 60.0) == []


def test_a_gpu_that_came_with_fewer_links(puppets, watcher):
    puppets.set(6, link_7=0)
    assert told(watcher.look("nvml-nvlink", 0.0)) == [("nvlink", "fewer-links", "cordon", device(6))]


def test_a_lost_gpu_stops_nobody(puppets, watcher):
    for name in GAUGES:
        assert watcher.look(name, 0.0) == []
    puppets.set(2, lost=15)
    puppets.set(5, field_4=3, field_230=1)
    assert told(watcher.look("nvml-gpus", 5.0)) == [("gpu-lost", "15", "replace", device(2))]
    assert told(watcher.look("nvml-ecc", 30.0)) == [("ecc", "uncorrectable", "gpu-reset", device(5))]
    assert told(watcher.look("nvml-recovery", 30.0)) == [("recovery-action", "reset", "gpu-reset", device(5))]
    for name in set(GAUGES) - {"nvml-gpus", "nvml-ecc", "nvml-recovery"}:
        assert watcher.look(name, 30.0) == [], name
    puppets.set(2, lost=None)
    assert watcher.look("nvml-gpus", 10.0) == []


def test_what_was_the_matter_with_a_gpu_still_is_when_it_is_lost(puppets, watcher):
    puppets.set(2, field_145=1)
    assert told(watcher.look("nvml-ecc", 0.0)) == [("ecc", "row-remap-failure", "cordon", device(2))]
    puppets.set(2, lost=15)
    assert told(watcher.look("nvml-ecc", 30.0)) == [("ecc", "row-remap-failure", "cordon", device(2))]


@pytest.mark.parametrize(
    ("error", "kind", "class_"), [(16, "gpu-reset-required", "gpu-reset"), (28, "gpu-lost", "replace"), (999, "gpu-lost", "replace")]
)
def test_a_gpu_that_cannot_be_opened(puppets, watcher, error, kind, class_):
    assert watcher.look("nvml-gpus", 0.0) == []
    puppets.set(6, lost=error)
    assert told(watcher.look("nvml-gpus", 5.0)) == [(kind, str(error), class_, device(6))]


def test_a_gpu_that_was_lost_before_we_came(puppets, watcher):
    puppets.set(4, lost=15)
    assert told(watcher.look("nvml-gpus", 0.0)) == [("gpu-lost", "15", "replace", device(4))]


def test_a_gpu_that_the_kernel_has_and_the_library_does_not(puppets, watcher):
    puppets.set("", count=7)  # the eighth, which stands last
    assert told(watcher.look("nvml-gpus", 0.0)) == [("gpu-lost", "absent", "replace", f"pci:{address(7)}")]


def test_a_container_that_was_given_two_gpus_misses_none(puppets, watcher):
    puppets.set("", count=2)
    for index in range(2, 8):
        (puppets.root / f"dev/nvidia{index}").unlink()
    assert watcher.look("nvml-gpus", 0.0) == []


@pytest.mark.parametrize(("error", "kind"), [(18, "driver-mismatch"), (9, "driver"), (999, "driver")])
def test_a_driver_that_cannot_be_reached(puppets, watcher, error, kind):
    puppets.set("", init=error)
    assert told(watcher.look("nvml-gpus", 0.0)) == [(kind, str(error), "cordon", "")]
    assert watcher.look("nvml-ecc", 0.0) == []
    puppets.set("", init=None)
    assert watcher.look("nvml-gpus", 5.0) == []


def test_a_driver_that_goes_away_and_comes_back(puppets, watcher):
    assert watcher.look("nvml-gpus", 0.0) == watcher.look("nvml-ecc", 0.0) == []
    puppets.set("*", lost=9)
    puppets.set("", init=9)
    assert told(watcher.look("nvml-gpus", 5.0)) == [("driver", "9", "cordon", "")]
    assert watcher.look("nvml-ecc", 30.0) == []
    puppets.set("", init=18)
    assert told(watcher.look("nvml-gpus", 10.0)) == [("driver-mismatch", "18", "cordon", "")]
    puppets.set("*", lost=None)
    puppets.set("", init=None)
    puppets.set(3, field_4=1)
    assert watcher.look("nvml-gpus", 15.0) == []
    assert told(watcher.look("nvml-ecc", 60.0)) == [("ecc", "uncorrectable", "gpu-reset", device(3))]


def test_a_call_that_fails_is_not_a_gpu_that_is_lost(puppets, watcher):
    puppets.lines["1.error.nvmlDeviceGetTemperature"] = 999
    puppets.write()
    assert told(watcher.look("nvml-gpus", 0.0)) == [("nvml-error", "999", "ignore", device(1))]


def test_a_single_gpu_needs_no_fabric(tmp_path, library, watching, puppets):
    puppets.set("", count=1)
    puppets.set("*", fabric_state=2)
    assert watching().look("nvml-fabric", 0.0, 1000.0) == []


def test_an_error_that_no_rule_knows_is_counted(puppets, watcher):
    puppets.lines["1.error.nvmlDeviceGetCurrPcieLinkWidth"] = 17
    puppets.write()
    assert told(watcher.look("nvml-pcie", 0.0)) == [("nvml-error", "17", "ignore", device(1))]


def test_an_old_gpu_knows_little_and_is_healthy(puppets, watcher):
    for prefix in ("*.field", "*.link", "*.sram", "*.fabric", "*.threshold", "*.reasons", "*.persistence"):
        puppets.drop(prefix)
    for name in GAUGES:
        assert watcher.look(name, 0.0, 30.0, 60.0) == [], name


def test_a_call_that_is_slow_is_only_slow(puppets, watcher):
    puppets.lines["sleep.nvmlDeviceGetFieldValues"] = 20
    puppets.write()
    assert watcher.look("nvml-recovery", 0.0) == []


def test_a_driver_that_hangs_on_one_gpu_holds_one_probe(puppets, watching):
    one, other = watching(), watching()
    assert one.look("nvml-pcie", 0.0) == other.look("nvml-ecc", 0.0) == []
    puppets.lines["5.hang.nvmlDeviceGetCurrPcieLinkWidth"] = 1
    puppets.write()
    one.send(kind=one.entries["nvml-pcie"], root=one.root, times=[30.0])
    assert other.look("nvml-ecc", 30.0) == []
    assert not select.select([one.process.stdout], [], [], 0.2)[0]
    puppets.drop("5.hang")
    assert select.select([one.process.stdout], [], [], 60)[0]


def test_what_a_hang_means():
    from resilient_agents.probes.nvml import hanging

    found = hanging("nvml-pcie", device(5), 31.4)
    assert told([{"kind": found.kind, "code": found.code, "class": found.class_, "device": found.device}]) == [
        ("nvml-hang", "", "gpu-reset", device(5))
    ]
    assert [hanging("nvml-gpus", "", seconds).class_ for seconds in (31.0, 121.0)] == ["ignore", "gpu-reset"]
    assert found.text == f"NVML has not answered nvml-pcie for 31 s: the driver hangs on {device(5)}"


def test_every_probe_is_registered_under_its_own_name():
    for name, place in entries().items():
        module, _, kind = place.partition(":")
        if name.startswith("nvml-") and name != "nvml-events":  # which needs the text classifier
            probe = getattr(importlib.import_module(module), kind)
            assert probe.name == name
            assert 0 < probe.period_s <= 60
            assert probe.timeout_s > 0


def test_where_there_is_nothing_to_look_at(puppets, watching, tmp_path):
    watcher = watching()
    watcher.root = str(tmp_path / "empty")
    assert "no NVIDIA GPU" in watcher.ask("nvml-ecc")["absent"]
    puppets.library.parent.joinpath("none").mkdir(exist_ok=True)
    without = watching(LD_LIBRARY_PATH=str(puppets.library.parent / "none"))
    answer = without.ask("nvml-ecc")
    assert "libnvidia-ml.so.1 cannot be loaded" in answer.get("absent", "") or answer == {"found": [], "cpu_s": answer.get("cpu_s")}


@pytest.mark.skipif(importlib.util.find_spec("resilient_agents.diagnosis.text") is None, reason="the text classifier is not there")
def test_xids_are_called_out(puppets, watcher):
    assert watcher.look("nvml-events", 0.0) == []
    puppets.set(3, lost=15)
    puppets.set("", event_1="3 8 79", event_2="1 2 0", event_3="2 8 94")
    found = watcher.look("nvml-events", 1.0)
    assert told(found) == [
        ("xid", "79", "replace", device(3)),
        ("ecc", "uncorrectable", "gpu-reset", device(1)),
        ("xid", "94", "app-restart", device(2)),
    ]


def test_others_on_our_gpus_are_named(puppets, watcher):
    for pid, parent in ((100, 1), (200, 100), (300, 1)):
        (puppets.root / f"proc/{pid}").mkdir(parents=True)
        (puppets.root / f"proc/{pid}/stat").write_text(f"{pid} (py (x) thon) S {parent} 0 0\n")
    gb = 1 << 30
    puppets.lines["0.processes"] = f"100:{gb} 200:{gb} 300:{2 * gb} 400:{gb}"
    puppets.lines["1.processes"] = f"200:{gb} 300:1000"
    puppets.write()
    assert watcher.look("nvml-tenants", 0.0) == []
    watcher.send(workers=[100])
    (found,) = watcher.look("nvml-tenants", 30.0)
    assert (found["kind"], found["class"], found["role"], found["device"]) == ("gpu-shared", "ignore", "context", f"{device(0)},pid:300")
    assert "pid 300 2048 MiB" in found["text"]


def test_the_links_of_the_stand_in_are_those_of_the_tests():
    assert sum(key.startswith("link.") for key in HEALTHY) == LINKS
