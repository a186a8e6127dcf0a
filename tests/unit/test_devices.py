"""Which GPU is which worker's."""

from __future__ import annotations

import pytest
from resilient_agents.devices import NOBODY, Gpu, index_of, local_rank, pci, present, seats, visible

GPUS = tuple(Gpu(index=n, pci=f"0000:{0x1A + n:02x}:00", uuid=f"GPU-{n}{n}aa-bb") for n in range(8))
ALL = dict.fromkeys(range(8))


@pytest.mark.parametrize(
    ("address", "written"),
    [
        ("00000000:1A:00.0", "0000:1a:00"),
        ("0000:1a:00.0", "0000:1a:00"),
        ("1A:00", "0000:1a:00"),
        ("00010000:C1:00.0", "10000:c1:00"),
        ("0008:01:00", "0008:01:00"),
        ("", ""),
        ("gpu", ""),
        ("1a:00.9", ""),
    ],
)
def test_an_address_is_written_in_one_way(address, written):
    assert pci(address) == written


@pytest.mark.parametrize(
    ("variable", "seen"),
    [
        (None, [0, 1, 2, 3, 4, 5, 6, 7]),
        ("", []),
        ("-1", []),
        ("4", [4]),
        ("6, 2,0", [6, 2, 0]),
        ("2,9,3", [2]),  # CUDA stops at what is not there
        ("2,-1,3", [2]),
        ("1,1", [1]),
        ("GPU-33aa", [3]),
        ("GPU-33aa-bb,0", [3, 0]),
        ("GPU-", []),  # could be any
        ("GPU-zz", []),
        ("MIG-GPU-55aa-bb/1/0,MIG-GPU-55aa-bb/2/0", [5, 5]),
        ("nonsense,0", []),
    ],
)
def test_what_a_process_sees(variable, seen):
    assert [gpu.index for gpu in visible(GPUS, variable)] == seen


@pytest.mark.parametrize(
    ("device", "index"),
    [
        ("pci:0000:1d:00", 3),
        ("pci:0000:1d:00,gpu:5", 3),
        ("gpu:5", 5),
        ("pci:0000:99:00,gpu:5", None),  # another GPU's number is not taken for it
        ("rank:3", None),
        ("gpu:x", None),
        ("", None),
    ],
)
def test_which_gpu_a_finding_names(device, index):
    assert index_of(device, GPUS) == index


def test_all_at_once():
    table = seats(GPUS, {0: "4,6", 1: "4,6"})
    assert table["gpu:4"] == table[f"pci:{GPUS[4].pci}"] == 0
    assert table["gpu:6"] == 1
    assert table["gpu:0"] == table[f"pci:{GPUS[0].pci}"] == NOBODY
    assert len(table) == 16
    assert seats(GPUS, {0: "4", 1: "4"})["gpu:4"] == 0


def test_what_the_kernel_module_shows(tmp_path):
    assert present(str(tmp_path)) == ()
    (tmp_path / "dev").mkdir()
    for minor, name in enumerate(["0000:c1:00.0", "0000:1a:00.0", "0000:47:00.0", "0000:86:00.0"]):
        directory = tmp_path / "proc/driver/nvidia/gpus" / name
        directory.mkdir(parents=True)
        excluded, uuid = ("Yes" if minor == 2 else "No"), ("GPU-????????-????" if minor == 1 else f"GPU-{minor}abc")
        (directory / "information").write_text(f"GPU UUID: \t {uuid}\nDevice Minor: \t {minor}\nGPU Excluded:\t {excluded}\n")
        if minor != 3:  # not given to this container
            (tmp_path / f"dev/nvidia{minor}").touch()
    assert present(str(tmp_path)) == (Gpu(index=0, pci="0000:1a:00"), Gpu(index=1, pci="0000:c1:00", uuid="GPU-0abc"))


@pytest.mark.parametrize(
    ("device", "shown", "rank"),
    [
        ("gpu:3", ALL, 3),
        ("pci:0000:1f:00", ALL, 5),
        ("gpu:3", dict.fromkeys(range(4), "4,5,6,7"), None),
        ("gpu:6", dict.fromkeys(range(4), "4,5,6,7"), 2),
        ("gpu:6", {0: "6", 1: "5"}, 0),  # one GPU shown to each
        ("gpu:5", {0: "6", 1: "5"}, 1),
        ("gpu:7", {0: "6", 1: "5"}, None),
        ("gpu:1", {0: None}, None),  # nobody's
        ("gpu:0", {}, None),
        ("peer:n1", ALL, None),
    ],
)
def test_whose_it_is(device, shown, rank):
    assert local_rank(device, GPUS, shown) == rank
