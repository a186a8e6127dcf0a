"""Config: which sheet wins, and what is said about a word that is on none."""

from __future__ import annotations

import argparse
from pathlib import Path

import msgspec
import pytest

from resilient import config
from resilient.errors import ConfigError


def parsed(*words: str) -> dict[str, str]:
    parser = argparse.ArgumentParser()
    config.add_flags(parser)
    return config.given_flags(vars(parser.parse_args(words)))


def test_defaults() -> None:
    assert config.resolve({}, {}, None) == config.Options()


def test_flags_win_over_environment_over_file_over_defaults(tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_text('standbys = 1\ncheckpoint_every = 7\nrun_dir = "from file"\n')
    environment = {"RESILIENT_STANDBYS": "2", "RESILIENT_RUN_DIR": "from environment", "HOME": "/root"}
    options = config.resolve(parsed("--standbys", "3"), environment, str(file))
    assert (options.standbys, options.run_dir, options.checkpoint_every, options.shadows) == (3, "from environment", 7, "none")


@pytest.mark.parametrize(("given", "found"), [("auto", "auto"), ("0", 0), ("250", 250)])
def test_a_number_or_the_word(given: str, found: int | str) -> None:
    assert config.resolve(parsed("--checkpoint-every", given), {}, None).checkpoint_every == found
    assert config.resolve({}, {"RESILIENT_CHECKPOINT_EVERY": given}, None).checkpoint_every == found


def test_a_number_or_the_word_in_a_file(tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_text('checkpoint_every = "auto"\n')
    assert config.resolve({}, {"RESILIENT_CHECKPOINT_EVERY": "3"}, str(file)).checkpoint_every == 3
    assert config.resolve({}, {}, str(file)).checkpoint_every == "auto"


@pytest.mark.parametrize("spelling", ["--lease-s", "--lease_s", "--lease"])
def test_spellings_of_a_flag(spelling: str) -> None:
    assert config.resolve(parsed(spelling, "2.5"), {}, None).lease_s == 2.5


def test_an_unknown_key_names_the_nearest(tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_text("standby = 1\n")
    with pytest.raises(ConfigError, match=r"unknown option 'standby' in .*c\.toml; the nearest valid one is 'standbys'"):
        config.resolve({}, {}, str(file))


def test_an_unknown_variable_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"'RESILIENT_CHECKPOINT_EVRY' in the environment; .* 'RESILIENT_CHECKPOINT_EVERY'"):
        config.resolve({}, {"RESILIENT_CHECKPOINT_EVRY": "1"}, None)


@pytest.mark.parametrize("name", sorted(config.NOT_OURS))
def test_what_is_set_for_workers_is_no_option(name: str) -> None:
    assert config.resolve({}, {"RESILIENT_" + name: "x"}, None) == config.Options()


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        ({"standbys": "many"}, "option 'standbys' on the command line"),
        ({"standbys": "-1"}, ">= 0"),
        ({"lease_s": "0"}, "> 0"),
        ({"checkpoint_every": "often"}, "option 'checkpoint_every' on the command line: .*'often'"),
        ({"checkpoint_every": "-1"}, ">= 0"),
        ({"checkpoint_budget": "1.5"}, "<= 1"),
        ({"grace_s": "-1"}, ">= 0"),
        ({"shadows": "some"}, "shadows"),
    ],
)
def test_a_wrong_value_names_key_value_and_place(flags: dict[str, str], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint) as caught:
        config.resolve(flags, {}, None)
    assert repr(next(iter(flags.values()))) in str(caught.value)


@pytest.mark.parametrize(
    ("text", "found"),
    [("0", 0), ("500MB", 500_000_000), ("2 GiB", 2 << 30), ("1.5g", 1_500_000_000), ("64mib/s", 64 << 20), ("1000000", 1_000_000)],
)
def test_bytes_per_second_with_units(text: str, found: int, tmp_path: Path) -> None:
    assert config.resolve({"data_rate": text}, {}, None).data_rate == found
    assert config.resolve({}, {"RESILIENT_DATA_RATE": text}, None).data_rate == found
    file = tmp_path / "c.toml"
    file.write_text(f'data_rate = "{text}"\n')
    assert config.resolve({}, {}, str(file)).data_rate == found
    file.write_text(f"data_rate = {found}\n")
    assert config.resolve({}, {}, str(file)).data_rate == found


@pytest.mark.parametrize("text", ["fast", "-1", "MB", "1TB", "1 2", ""])
def test_what_is_no_number_of_bytes(text: str) -> None:
    with pytest.raises(ConfigError, match="option 'data_rate' on the command line"):
        config.resolve({"data_rate": text}, {}, None)


def test_a_wrong_type_in_the_file(tmp_path: Path) -> None:
    file = tmp_path / "c.toml"
    file.write_text("checkpoint = 3\n")
    with pytest.raises(ConfigError, match="option 'checkpoint' in"):
        config.resolve({}, {}, str(file))


def test_a_file_that_is_not_there_or_no_toml(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        config.resolve({}, {}, str(tmp_path / "none.toml"))
    broken = tmp_path / "broken.toml"
    broken.write_text("a = = b")
    with pytest.raises(ConfigError, match="TOML expected"):
        config.resolve({}, {}, str(broken))


def test_every_option_has_help_and_a_flag() -> None:
    names = {field.name for field in msgspec.structs.fields(config.Options)}
    assert set(config.HELP) == names
    assert parsed() == {}
    assert config.nearest("standbies", names) == "standbys"
