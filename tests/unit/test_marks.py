"""Limits and marks of the probes that a policy file changes: what it may say, and that it comes to those who judge."""

from __future__ import annotations

import pytest
from resilient_agents import marks
from resilient_agents.probe import Surroundings
from resilient_agents.probes import limits, rules
from resilient_agents.probes.ethernet import Ethernet
from resilient_agents.probes.infiniband import InfiniBand
from resilient_agents.probes.rules import Judge, load
from resilient_agents.sightings import Begin, Marks

from resilient.errors import ConfigError
from resilient.rulebook import load as policy
from resilient.wire.frames import Decoder, encode

CORRECTED = "nvml-ecc/ecc/correctable"


@pytest.fixture
def write(tmp_path):
    def written(text: str) -> str:
        (tmp_path / "mine.toml").write_text(text)
        return str(tmp_path / "mine.toml")

    return written


@pytest.fixture
def printed():
    """What a test lays is taken off again."""
    before = dict(vars(limits))
    yield
    vars(limits).update(before)
    rules.MARKS.clear()


def test_nothing_is_changed_by_nothing(printed):
    assert marks.read("") == Marks()
    before = list(limits.COUNTERS)
    marks.lay(Marks())
    assert list(limits.COUNTERS) == before and not rules.MARKS


def test_every_mark_and_every_limit_has_a_name_of_its_own():
    assert {CORRECTED, "amd-gpus/pcie/width", "ascend-npus/ecc/pages-isolated", "infiniband/ib-errors/symbol_error"} <= marks.names()
    assert len(marks.counters()) == len(limits.COUNTERS)


def test_a_file_changes_what_probes_judge_by(write, printed, tmp_path):
    file = write(
        f"""
        [probe]
        eth_flaps = 2
        disk_low_share = 0.05
        [probe."{CORRECTED}"]
        limit = 50000000
        class = "gpu-reset"
        [probe."nvml-ecc/ecc/correctable-rate"]
        limit = 3
        window_s = 30
        class = "cordon"
        [probe."infiniband/ib-errors/symbol_error"]
        limit = 5
        class = "ignore"
        """
    )
    assert policy(file) == policy(""), "it is no rule"
    changed = marks.read(file)
    (begin,) = Decoder(Begin).feed(encode(Begin(marks=changed)))
    marks.lay(begin.marks)
    marks.lay(begin.marks)
    assert (limits.ETH_FLAPS.value, limits.DISK_LOW_SHARE.value, limits.FLAPS.value) == (2.0, 0.05, 3)
    judge = Judge("nvml-ecc", load("nvml.toml"))
    assert judge.look(0.0, {"gpu:0": {"ECC_SBE_VOL_TOTAL": 30e6}}) == []
    (found,) = judge.look(60.0, {"gpu:0": {"ECC_SBE_VOL_TOTAL": 30e6 + 4}})
    assert (found.code, found.class_, found.role) == ("correctable-rate", "cordon", "cause")
    assert [it.class_ for it in judge.look(999.0, {"gpu:0": {"ECC_SBE_VOL_TOTAL": 60e6}}) if it.code == "correctable"] == ["gpu-reset"]
    nic = tmp_path / "sys/class/net/eth0"
    (nic / "device").mkdir(parents=True)
    port = tmp_path / "sys/class/infiniband/mlx5_0/ports/1"
    (port / "counters").mkdir(parents=True)
    eth, ib = Ethernet(Surroundings(root=str(tmp_path))), InfiniBand(Surroundings(root=str(tmp_path)))
    seen = []
    for number in (0, 2):
        for name, value in {"carrier": 1, "operstate": "up", "flags": "0x1003", "speed": 1, "carrier_down_count": number}.items():
            (nic / name).write_text(f"{value}\n")
        for name, value in {
            "state": "4: ACTIVE",
            "phys_state": "5: LinkUp",
            "rate": "1 Gb/sec",
            "counters/symbol_error": 6 * number,
        }.items():
            (port / name).write_text(f"{value}\n")
        seen = [(it.kind, it.class_) for probe in (eth, ib) for it in probe.check(100.0 * number)]
    assert seen == [("link-flap", "cordon"), ("ib-errors", "ignore")]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[probe]\nflap = 3", ["'flap'", "'flaps'"]),
        ("[probe]\nflaps = 'x'", ["flaps", "'x'"]),
        ("[probe]\nflaps = true", ["flaps", "True"]),
        ("[probe]\nflaps = -1", ["flaps", "-1"]),
        ("[probe]\ndisk_low_share = 10", ["disk_low_share", "from 0 to 1"]),
        ("[probe.nvml-ecc]\nlimit = 1", ["'nvml-ecc'", "'nvml-ecc/"]),
        (f'[probe."{CORRECTED}s"]\nlimit = 1', [repr(CORRECTED)]),
        (f'[probe."{CORRECTED}"]\nlimits = 1', ["'limits'", "'limit'"]),
        (f'[probe."{CORRECTED}"]\nclass = "cordoned"', ["'cordoned'", "'cordon'"]),
        ('[probe."infiniband/ib-errors/symbol_error"]\nhold_s = 1', ["'hold_s'"]),
        ("probe = 3", ["probe", "table"]),
        ("[probes]\nflaps = 3", ["'probes'", "'probe'"]),
    ],
)
def test_what_is_wrong_is_told(write, text, words):
    with pytest.raises(ConfigError) as error:
        policy(write(text))
        marks.read(write(text))
    assert all(word in str(error.value) for word in ["mine.toml", *words]), str(error.value)
