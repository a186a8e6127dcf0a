"""The probes of a host, on machines that are written for the test: what is the matter, what is not, and what is missing."""

from __future__ import annotations

import os
import pathlib

import pytest
from hypothesis import given
from hypothesis import strategies as st
from resilient_agents.probe import Absent, Roster, Surroundings, Watched
from resilient_agents.probes import disk, ethernet, host_memory, infiniband, mounts, pci, peermem, processes, reading
from resilient_agents.probes.clock import Clock, jumped
from resilient_agents.probes.deltas import Deltas
from resilient_agents.probes.disk import Disk, Room, judge
from resilient_agents.probes.edac import Edac
from resilient_agents.probes.ethernet import Ethernet
from resilient_agents.probes.host_memory import Cgroup, HostMemory, cgroups
from resilient_agents.probes.infiniband import InfiniBand
from resilient_agents.probes.mounts import Mounts
from resilient_agents.probes.pci import Link, Pci
from resilient_agents.probes.peermem import Peermem
from resilient_agents.probes.processes import Descriptors, Processes
from resilient_agents.probes.storage import Storage

ALL = [Cgroup, Descriptors, Edac, Ethernet, HostMemory, InfiniBand, Mounts, Pci, Peermem, Processes]


class Machine:
    """A tree of small files."""

    def __init__(self, root: pathlib.Path) -> None:
        self.root = root
        self.roster = Roster()

    def write(self, files: dict[str, object], under: str = "") -> None:
        for name, value in files.items():
            path = self.root / under.lstrip("/") / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"{value}\n")

    def port(self, device: str, **files: object) -> None:
        usual = {
            "state": "4: ACTIVE",
            "phys_state": "5: LinkUp",
            "rate": "400 Gb/sec (4X NDR)",
            "link_layer": "InfiniBand",
            "counters/link_downed": 0,
        }
        self.write({**usual, **{name.replace("__", "/"): value for name, value in files.items()}}, f"sys/class/infiniband/{device}/ports/1")

    def nic(self, name: str, **files: object) -> None:
        usual = {
            "carrier": 1,
            "operstate": "up",
            "flags": "0x1003",
            "speed": 100000,
            "carrier_changes": 2,
            "carrier_down_count": 1,
            "device/vendor": "0x15b3",
        }
        self.write({**usual, **files}, f"sys/class/net/{name}")

    def card(self, address: str, **files: object) -> None:
        usual = {
            "class": "0x030200",
            "vendor": "0x10de",
            "device": "0x2330",
            "current_link_width": 16,
            "max_link_width": 16,
            "current_link_speed": "32.0 GT/s PCIe",
        }
        self.write({**usual, **files}, f"sys/bus/pci/devices/{address}")

    def made(self, kind):
        return kind(Surroundings(root=str(self.root), roster=lambda: self.roster))


@pytest.fixture
def machine(tmp_path):
    return Machine(tmp_path)


def told(findings):
    return [(f.kind, f.code, f.device, f.class_) for f in findings]


@pytest.mark.parametrize("kind", ALL)
def test_where_there_is_nothing_to_look_at_a_probe_says_so(machine, kind):
    with pytest.raises(Absent):
        machine.made(kind)


# ------------------------------------------------------------------ InfiniBand


def test_a_healthy_fabric_is_silent_and_a_port_without_a_cable_is_no_fault(machine):
    for i in range(4):
        machine.port(f"mlx5_{i}")
    machine.port("mlx5_9", state="1: DOWN", phys_state="3: Disabled", rate="10 Gb/sec (4X SDR)")
    probe = machine.made(InfiniBand)
    assert [told(probe.check(now)) for now in (0.0, 60.0)] == [[], []]


def test_a_port_that_was_active_and_is_down_is_told_while_it_lasts(machine):
    machine.port("mlx5_0")
    machine.port("mlx5_1")
    probe = machine.made(InfiniBand)
    probe.check(0.0)
    machine.port("mlx5_1", state="1: DOWN", phys_state="2: Polling")
    (found,) = probe.check(5.0)
    assert told([found]) == [("ib-link", "down", "dev:mlx5_1", "replace")] and "Polling (cable or far side)" in found.text
    machine.port("mlx5_1")
    assert probe.check(10.0) == []


def test_a_port_that_is_down_from_the_start_is_only_counted(machine):
    machine.port("mlx5_0")
    machine.port("mlx5_1", state="1: DOWN", phys_state="2: Polling")
    assert told(machine.made(InfiniBand).check(0.0)) == [("ib-link", "down", "dev:mlx5_1", "ignore")]


def test_a_port_slower_than_most_is_told_and_two_sorts_are_not(machine):
    for i in range(3):
        machine.port(f"mlx5_{i}")
    machine.port("mlx5_3", rate="200 Gb/sec (2X NDR)")
    machine.port("mlx5_4", rate="25 Gb/sec (1X EDR)", link_layer="Ethernet")
    assert told(machine.made(InfiniBand).check(0.0)) == [("ib-rate", "slow", "dev:mlx5_3", "cordon")]
    machine.port("mlx5_2", rate="200 Gb/sec (2X NDR)")
    assert machine.made(InfiniBand).check(0.0) == []


def test_one_drop_is_a_drop_and_three_in_ten_minutes_are_flapping(machine):
    machine.port("mlx5_0", counters__link_downed=7)
    probe = machine.made(InfiniBand)
    assert probe.check(0.0) == []
    machine.port("mlx5_0", counters__link_downed=8)
    assert told(probe.check(5.0)) == [("ib-flap", "", "dev:mlx5_0", "app-restart")]
    machine.port("mlx5_0", counters__link_downed=10)
    assert told(probe.check(10.0)) == [("ib-flap", "", "dev:mlx5_0", "cordon")]
    assert told(probe.check(1300.0)) == []


def test_counters_begin_at_their_first_reading_and_may_be_reset(machine):
    counter = "counters__local_link_integrity_errors"
    machine.port("mlx5_0", **{counter: 500})
    probe = machine.made(InfiniBand)
    assert probe.check(0.0) == []
    machine.port("mlx5_0", **{counter: 501})
    assert told(probe.check(31.0)) == [("ib-errors", "local_link_integrity_errors", "dev:mlx5_0", "cordon")]
    machine.port("mlx5_0", **{counter: 0})
    assert probe.check(150.0) == []


def test_transport_retries_are_a_fault_and_congestion_is_not(machine):
    machine.port("mlx5_0", hw_counters__req_transport_retries_exceeded=0, hw_counters__np_cnp_sent=0)
    probe = machine.made(InfiniBand)
    probe.check(0.0)
    machine.port("mlx5_0", hw_counters__req_transport_retries_exceeded=1, hw_counters__np_cnp_sent=10**6)
    assert {(f.code, f.class_) for f in probe.check(31.0)} == {("req_transport_retries_exceeded", "replace"), ("np_cnp_sent", "ignore")}


def test_a_card_that_goes_is_told(machine):
    machine.port("mlx5_0")
    machine.port("mlx5_1")
    probe = machine.made(InfiniBand)
    probe.check(0.0)
    (machine.root / "sys/class/infiniband/mlx5_1/ports/1").rename(machine.root / "away")
    (machine.root / "sys/class/infiniband/mlx5_1/ports").rmdir()
    assert told(probe.check(5.0)) == [("ib-link", "gone", "dev:mlx5_1", "replace")]


# ------------------------------------------------------------------ Ethernet


def test_an_interface_that_lost_its_carrier_is_told_unless_somebody_switched_it_off(machine):
    machine.nic("eth0")
    machine.nic("eth1", carrier=0, operstate="down")
    machine.write({"carrier": 1, "operstate": "up"}, "sys/class/net/docker0")  # nothing behind it
    probe = machine.made(Ethernet)
    assert probe.check(0.0) == []
    machine.nic("eth0", carrier=0, operstate="down")
    assert told(probe.check(5.0)) == [("eth-link", "down", "dev:eth0", "replace")]
    machine.nic("eth0", carrier=0, operstate="down", flags="0x1002")
    assert told(probe.check(10.0)) == [("eth-link", "down", "dev:eth0", "ignore")]


def test_an_interface_that_became_slower_or_flaps_is_told(machine):
    machine.nic("eth0")
    probe = machine.made(Ethernet)
    probe.check(0.0)
    machine.nic("eth0", speed=25000)
    assert told(probe.check(5.0)) == [("link-rate", "slow", "dev:eth0", "cordon")]
    machine.nic("eth0", carrier_down_count=6)
    assert told(probe.check(10.0)) == [("link-flap", "", "dev:eth0", "cordon")]


# ------------------------------------------------------------------ PCI, EDAC


def test_error_counters_of_the_bus(machine):
    aer = {
        "aer_dev_fatal": "Undefined 0\nDLP 1\nTOTAL_ERR_FATAL 1",
        "aer_dev_nonfatal": "TOTAL_ERR_NONFATAL 0",
        "aer_dev_correctable": "RxErr 5\nTOTAL_ERR_COR 5",
    }
    machine.card("0000:3b:00.0", **aer)
    probe = machine.made(Pci)
    assert probe.check(0.0) == []
    machine.card("0000:3b:00.0", **{**aer, "aer_dev_fatal": "DLP 2\nTOTAL_ERR_FATAL 2", "aer_dev_correctable": "TOTAL_ERR_COR 9"})
    assert told(probe.check(10.0)) == [("aer", "Fatal", "pci:0000:3b:00", "replace")]
    machine.card("0000:3b:00.0", **{**aer, "aer_dev_fatal": "TOTAL_ERR_FATAL 2", "aer_dev_correctable": "TOTAL_ERR_COR 5000"})
    assert ("aer-corrected", "rate", "pci:0000:3b:00", "cordon") in told(probe.check(20.0))


def test_a_narrower_link_is_told_and_a_short_slot_is_not(machine):
    for i in range(4):
        machine.card(f"0000:{i:02x}:00.0")
    machine.card("0000:80:00.0", device="0x1234", current_link_width=8)
    probe = machine.made(Pci)
    assert probe.check(0.0) == []
    machine.card("0000:02:00.0", current_link_width=4)
    assert told(probe.check(10.0)) == [("pcie-width", "", "pci:0000:02:00", "cordon")]
    machine.card("0000:02:00.0", current_link_speed="2.5 GT/s PCIe")  # a GPU that is idle
    assert probe.check(20.0) == []


def test_one_that_is_narrow_from_the_start_is_seen_by_its_siblings():
    links = [Link(f"pci:{i}", "a:b", 3, 8 if i == 2 else 16, 32.0) for i in range(5)]
    assert [(link.address, wanted) for link, wanted in pci.narrow(links, {})] == [("pci:2", 16)]


def test_memory_controllers_count_from_the_start(machine):
    machine.write({"mc0/ue_count": 3, "mc0/ce_count": 10**6, "mc1/ue_count": 0, "mc1/ce_count": 0}, "sys/devices/system/edac/mc")
    probe = machine.made(Edac)
    assert probe.check(0.0) == []
    machine.write({"mc0/ue_count": 4, "mc1/ce_count": 900}, "sys/devices/system/edac/mc")
    assert told(probe.check(30.0)) == [("edac", "UE", "dev:mc0", "cordon")]


# ------------------------------------------------------------------ memory


def test_kills_of_the_node_and_of_our_own_cgroup(machine):
    machine.write({"meminfo": "MemTotal: 100 kB\nMemAvailable: 9000000 kB", "vmstat": "oom_kill 4", "self/cgroup": "0::/job"}, "proc")
    machine.write({"memory.events": "low 0\noom_kill 1", "pids.current": 7, "pids.events": "max 0"}, "sys/fs/cgroup/job")
    node, run = machine.made(HostMemory), machine.made(Cgroup)
    assert node.check(0.0) == run.check(0.0) == []
    machine.write({"meminfo": "MemAvailable: 9000 kB", "vmstat": "oom_kill 6"}, "proc")
    machine.write({"memory.events": "oom_kill 2", "pids.events": "max 3"}, "sys/fs/cgroup/job")
    assert [(f.kind, f.count, f.class_) for f in node.check(1.0)] == [("oom-detail", 2, "ignore"), ("memory-low", 1, "ignore")]
    assert [(f.kind, f.code, f.count, f.class_) for f in run.check(1.0)] == [
        ("oom-host", "memcg", 1, "app-restart"),
        ("pid-limit", "pids.max", 3, "app-restart"),
    ]
    assert run.check(2.0) == []


def test_version_1_of_cgroups(machine):
    machine.write({"self/cgroup": "4:memory:/a/b\n8:pids:/\n0::/"}, "proc")
    machine.write({"a/b/memory.oom_control": "oom_kill_disable 0\nunder_oom 0\noom_kill 0"}, "sys/fs/cgroup/memory")
    probe = machine.made(Cgroup)
    machine.write({"a/b/memory.oom_control": "oom_kill 1"}, "sys/fs/cgroup/memory")
    assert [f.kind for f in probe.check(0.0)] == ["oom-host"]
    assert cgroups("1:cpu,cpuacct:/x\njunk") == {"cpu": "/x", "cpuacct": "/x"}


# ------------------------------------------------------------------ disks, mounts, storage


@pytest.mark.parametrize(
    ("room", "kind", "class_"),
    [
        (Room("/data", 10 << 30, 100 << 30, 10**6, 10**7), None, None),
        (Room("/data", 200 << 20, 100 << 30, 10**6, 10**7), "disk-low", "ignore"),
        (Room("/data", 1 << 20, 100 << 30, 10**6, 10**7), "disk-full", "app-restart"),
        (Room("/data", 10 << 30, 100 << 30, 3, 10**7), "disk-full", "app-restart"),
        (Room("/btrfs", 10 << 30, 100 << 30, 0, 0), None, None),
        (Room("/dev/shm", 1 << 20, 64 << 20, 10**6, 10**7, memory=True), "shm-full", "app-restart"),
        (Room("/dev/shm", 30 << 20, 64 << 20, 10**6, 10**7, memory=True), None, None),
        (Room("/small", 300 << 10, 4 << 20, 100, 200), "disk-low", "ignore"),
        (Room("/none", 0, 0, 0, 0), None, None),
    ],
)
def test_what_is_full(room, kind, class_):
    found = judge(room)
    assert (found.kind, found.class_, found.role) == (kind, class_, "context") if kind else found is None


def test_real_places_are_looked_at_and_missing_ones_are_not_missed(machine, tmp_path):
    machine.roster = Roster(run_dir=str(tmp_path), checkpoint=str(tmp_path / "not yet"), memory_dir="/dev/shm")
    assert all(f.class_ for f in machine.made(Disk).check(0.0))
    assert disk.room(str(tmp_path / "not yet"), "x", memory=False) is None


MOUNTS = """/dev/nvme0n1p2 / ext4 rw,relatime,errors=remount-ro 0 0
/dev/sr0 /cdrom xfs ro 0 0
tmpfs /run tmpfs ro 0 0
nas:/data /mnt/my\\040data nfs4 rw,vers=4.2 0 0"""


def test_a_remount_is_told_until_it_is_over_and_what_was_read_only_was_meant_so(machine):
    machine.write({"self/mounts": MOUNTS}, "proc")
    probe = machine.made(Mounts)
    assert probe.check(0.0) == []
    machine.write({"self/mounts": MOUNTS.replace("rw,relatime", "ro,relatime")}, "proc")
    assert told(probe.check(5.0)) == [("fs-readonly", "ro", "dev:nvme0n1p2", "replace")]
    machine.write({"self/mounts": MOUNTS.replace("rw,relatime", "rw,shutdown")}, "proc")
    assert len(probe.check(10.0)) == 1
    machine.write({"self/mounts": MOUNTS}, "proc")
    assert probe.check(15.0) == []
    assert set(mounts.parse(MOUNTS.splitlines())) == {"/", "/cdrom", "/run", "/mnt/my data"}


def test_storage_that_answers_and_storage_that_does_not(machine, tmp_path):
    probe = machine.made(Storage)
    assert probe.check(0.0) == []  # no directory
    machine.roster = Roster(checkpoint=str(tmp_path / "kept"))
    assert probe.check(0.0) == []  # not made yet
    (tmp_path / "kept").mkdir()
    assert probe.check(0.0) == [] and os.listdir(tmp_path / "kept") == []
    (tmp_path / "kept").rmdir()
    (tmp_path / "kept").write_text("a file")
    assert [(f.kind, f.code, f.class_) for f in probe.check(0.0)] == [("io-error", "ENOTDIR", "ignore")]
    assert [probe.hangs(seconds).class_ for seconds in (31.0, 200.0)] == ["ignore", "replace"]


# ------------------------------------------------------------------ clock, processes, descriptors, peermem


def test_a_clock_that_jumps():
    assert jumped(100.0, 100.5) is None
    assert "back by 3600.0 s" in jumped(7200.0, 3600.0).text
    assert Clock(Surroundings()).check(0.0) == []


def stat(pid: int, state: str, name: str = "python3", start: int = 5) -> str:
    return f"{pid} ({name}) {state} 1 1 1 0 -1 0 0 0 0 0 1 1 0 0 20 0 1 0 {start} 0 0"


def test_a_process_that_stands_in_the_kernel_for_long_is_told_and_threads_of_the_kernel_are_not(machine):
    machine.write(
        {
            "7/stat": stat(7, "D", "a) Z (b"),
            "7/cmdline": "train",
            "8/stat": stat(8, "D", "kworker"),
            "8/cmdline": "",
            "9/stat": stat(9, "S"),
        },
        "proc",
    )
    (machine.root / "proc/8/cmdline").write_text("")
    probe = machine.made(Processes)
    looks = [told(probe.check(60.0 * i)) for i in range(6)]
    assert looks[:4] == [[]] * 4 and looks[4] == looks[5] == [("hung-task", "D", "pid:7", "replace")]
    machine.write({"7/stat": stat(7, "S")}, "proc")
    assert probe.check(400.0) == []
    assert processes.parse("junk") is None


def test_descriptors_that_run_out(machine):
    machine.write(
        {
            "sys/fs/file-nr": "100 0 1000",
            "7/limits": "Limit Soft Hard Units\nMax open files            16                   1024                 files",
        },
        "proc",
    )
    for i in range(16):
        machine.write({str(i): ""}, "proc/7/fd")
    machine.roster = Roster(workers=(Watched(worker="w", rank=2, pid=7),))
    probe = machine.made(Descriptors)
    found = probe.check(0.0)
    assert [(f.device, f.rank, f.role) for f in found if f.device] == [("pid:7", 2, "context")]
    machine.write({"sys/fs/file-nr": "950 0 1000"}, "proc")
    assert "file-max" in {f.code for f in probe.check(1.0)}


def test_the_card_reaches_the_gpu_or_it_does_not(machine):
    machine.write({"modules": "nvidia 1 2", "driver/nvidia/version": "NVRM version: NVIDIA UNIX x86_64 Kernel Module 550"}, "proc")
    machine.port("mlx5_0")
    probe = machine.made(Peermem)
    assert [f.class_ for f in probe.check(0.0)] == ["ignore"]
    machine.write({"modules": "nvidia 1 2\nnvidia_peermem 16384 0"}, "proc")
    assert probe.check(1.0) == []
    assert peermem.reachable([], "NVIDIA UNIX Open Kernel Module for x86_64")


# ------------------------------------------------------------------ strange trees


@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=80), st.integers(1, 100))
def test_a_counter_never_grows_by_less_than_nothing_nor_by_more_than_it_has(values, window):
    deltas = Deltas(float(window))
    for now, value in enumerate(values):
        assert 0 <= deltas.grown("c", value, float(now)) <= value


def test_growth_is_that_of_the_window():
    deltas = Deltas(600.0)
    assert [deltas.grown("c", value, now) for now, value in ((0.0, 5), (5.0, 6), (300.0, 7), (500.0, 7), (899.0, 7), (2000.0, 7))] == [
        0,
        1,
        2,
        2,
        1,
        0,
    ]


JUNK = st.sampled_from(["", "\0\0", "9" * 400, "-1", "4:", "Gb/sec", "0x", "nan", "\ufffd" * 50, "a b c d e f", "(((", "1 (x) D"])
PLACES = [
    *(f"sys/class/infiniband/d/ports/1/{n}" for n in ("state", "phys_state", "rate", "counters/link_downed", "counters/symbol_error")),
    *(f"sys/class/net/e/{n}" for n in ("device/x", "carrier", "operstate", "speed", "flags", "carrier_changes")),
    *(f"sys/bus/pci/devices/0000:3b:00.0/{n}" for n in ("current_link_width", "current_link_speed", "aer_dev_fatal", "vendor")),
    *("sys/devices/system/edac/mc/mc0/ue_count", "proc/meminfo", "proc/vmstat", "proc/self/cgroup", "proc/self/mounts", "proc/1/stat"),
    *("proc/sys/fs/file-nr", "proc/modules", "proc/driver/nvidia/version", "sys/fs/cgroup/memory.events", "sys/fs/cgroup/pids.current"),
]


@given(st.lists(JUNK, min_size=len(PLACES), max_size=len(PLACES)), st.lists(JUNK, min_size=len(PLACES), max_size=len(PLACES)))
def test_no_tree_is_too_strange(tmp_path_factory, first, second):
    machine = Machine(tmp_path_factory.mktemp("strange"))
    machine.write({"sys/bus/pci/devices/0000:3b:00.0/class": "0x020000"})
    machine.write(dict(zip(PLACES, first, strict=True)))
    probes = []
    for kind in ALL:
        try:
            probes.append(machine.made(kind))
        except Absent:
            continue
    for now, values in ((0.0, first), (100.0, second)):
        machine.write(dict(zip(PLACES, values, strict=True)))
        for probe in probes:
            assert isinstance(probe.check(now), list)


def test_reading_what_is_not_there(tmp_path):
    assert reading.text(str(tmp_path / "none")) is reading.number(str(tmp_path / "none")) is None
    assert reading.lines(str(tmp_path)) == reading.names(str(tmp_path / "none")) == []
    (tmp_path / "hex").write_text("0x1003\n")
    assert reading.number(str(tmp_path / "hex")) == 0x1003
    assert infiniband.rate("") == 0.0 and ethernet.interfaces(str(tmp_path)) == [] and host_memory.KIB == 1024
