"""The interval between checkpoints: monotone in each argument, within the budget, finite at the edges, and the least costly one."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from resilient.core.cadence import DAY_S, FAILURES_PER_NODE_DAY, LONGEST_S, interval_s, mtbf_s

costs = st.floats(0.0, 1e6, allow_subnormal=False)  # with a handful of bits left nothing is exact to a billionth
means = st.floats(1e-3, 1e12)
budgets = st.floats(1e-4, 1.0)
factors = st.floats(1.0, 1e3)
ALMOST = 1.0 + 1e-9


@given(costs, means, budgets)
def test_finite_and_within_the_budget(cost, mtbf, budget):
    found = interval_s(cost, mtbf, budget)
    assert math.isfinite(found)
    assert found >= 0.0
    assert cost <= found * budget * ALMOST
    assert found <= max(LONGEST_S, cost / budget) * ALMOST


@given(costs, means, budgets, factors)
def test_monotone_in_each_argument(cost, mtbf, budget, factor):
    found = interval_s(cost, mtbf, budget)
    assert interval_s(cost * factor, mtbf, budget) * ALMOST >= found, "what costs more is done more rarely"
    assert interval_s(cost, mtbf * factor, budget) * ALMOST >= found, "what fails more rarely is saved more rarely"
    assert interval_s(cost, mtbf, min(1.0, budget * factor)) <= found * ALMOST, "a greater budget is never used for less"


@given(st.floats(1e-3, 10.0), st.floats(1e3, 3e5))
def test_between_youngs_form_and_the_budget(cost, mtbf):
    young = math.sqrt(2 * cost * mtbf)
    found = interval_s(cost, mtbf, 1.0)
    if cost < found < LONGEST_S:
        assert young - cost <= found <= young * 1.01


@given(st.floats(1e-2, 100.0), st.floats(1e3, 1e5))
def test_no_other_interval_costs_less(cost, mtbf):
    """Daly's own model: an exponential failure costs the work since the last checkpoint; time per useful second."""

    def price(interval):
        return mtbf * math.expm1((interval + cost) / mtbf) / interval

    found = interval_s(cost, mtbf, 1.0)
    if cost < found < LONGEST_S and cost < mtbf / 2:
        assert price(found) <= min(price(found * 0.8), price(found * 1.25)) * (1 + 1e-3)


@given(st.integers(1, 100_000), st.integers(0, 1000), st.floats(0.0, 1e9))
def test_failures_seen_outweigh_the_literature(nodes, failures, seconds):
    found = mtbf_s(nodes, failures, seconds)
    assert 0 < found < math.inf
    assert mtbf_s(nodes + 1, failures, seconds) <= found
    assert mtbf_s(nodes, failures + 1, seconds) < found
    assert mtbf_s(nodes, failures, seconds + 1e6) > found


def test_known_fleets():
    assert mtbf_s(2048, 0, 0.0) == pytest.approx(DAY_S / (FAILURES_PER_NODE_DAY * 2048))
    assert mtbf_s(2048, 0, 0.0) / 3600 == pytest.approx(3.09, abs=0.01), "419 interruptions in 54 days of 2,048 nodes"
    assert mtbf_s(1, 9, 36_000.0) == pytest.approx((DAY_S / FAILURES_PER_NODE_DAY + 36_000) / 10)
