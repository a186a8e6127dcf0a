"""A silent node is named once, and a report costs nothing."""

from __future__ import annotations

import pytest

from resilient.core.leases import Leases


def test_a_touched_lease_does_not_expire():
    leases = Leases(10.0)
    leases.touch("a", 0.0)
    leases.touch("b", 0.0)
    leases.touch("a", 6.0)
    assert leases.expired(10.0) == ["b"]
    assert leases.expired(15.9) == []
    assert leases.expired(16.0) == ["a"]
    assert leases.earliest() is None


def test_earliest_is_never_too_late():
    leases = Leases(10.0)
    leases.touch("a", 0.0)
    leases.shorten("a", 3.0)
    assert leases.earliest() == 3.0
    assert leases.expired(3.0) == ["a"]


def test_a_coin_comes_before_a_short_meter_runs_out():
    leases = Leases(10.0)
    leases.touch("a", 0.0)
    leases.shorten("a", 1.0)
    leases.touch("a", 0.5)
    assert leases.expired(9.0) == []
    assert leases.expired(10.5) == ["a"]


def test_dropped_and_unknown_names_are_silent():
    leases = Leases(10.0)
    leases.touch("a", 0.0)
    leases.drop("a")
    leases.shorten("b", 1.0)
    assert leases.expired(100.0) == []


def test_time_never_goes_back():
    leases = Leases(1.0)
    leases.expired(5.0)
    with pytest.raises(AssertionError, match="time went back"):
        leases.expired(4.0)
