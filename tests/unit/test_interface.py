"""Which address --data-interface means."""

from __future__ import annotations

import pytest
from resilient_agents.interface import address_on, present

from resilient.errors import ConfigError

THERE = {
    "lo": ["127.0.0.1", "::1"],
    "eth0": ["fe80::1%eth0", "2001:db8::7", "10.0.0.7"],
    "ib0": ["10.1.0.7", "10.1.0.8"],
    "docker0": [],
}


@pytest.mark.parametrize(
    ("wanted", "found"),
    [
        ("eth0", "10.0.0.7"),
        ("ib0", "10.1.0.7"),
        ("10.1.0.8", "10.1.0.8"),
        ("10.1.0.0/16", "10.1.0.7"),
        ("10.1.0.99/24", "10.1.0.7"),
        ("2001:db8::/32", "2001:db8::7"),
        ("fe80::/10", "fe80::1%eth0"),
        ("::1", "::1"),
    ],
)
def test_a_name_an_address_or_a_network(wanted, found):
    assert address_on(wanted, THERE) == found


@pytest.mark.parametrize("wanted", ["eth9", "10.2.0.0/16", "10.0.0.8", "docker0", "", "::2", "10.0.0.0/99"])
def test_what_is_not_there_lists_what_is(wanted):
    with pytest.raises(ConfigError, match=r"--data-interface .*found here: docker0 \(no address\); eth0 .*10\.0\.0\.7; ib0 .*; lo "):
        address_on(wanted, THERE)


def test_this_machine():
    there = present()
    assert "127.0.0.1" in there["lo"]
    assert address_on("127.0.0.0/8", there) == "127.0.0.1"
