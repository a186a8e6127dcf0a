"""100,000 ranks, one simulated minute, one core (an hour: tests/bench/test_coordinator.py)."""

from __future__ import annotations

import time

from resilient.core.coordinator import REPORT_S_MAX, REPORTS_S
from resilient.sim.crowd import Crowd


def test_a_hundred_thousand_ranks():
    crowd = Crowd(nodes=12_500, slots=8, spare=2)
    began = time.process_time()
    crowd.run(10.0)
    assert crowd.coordinator.state == "running"
    crowd.kill_rank(777)
    crowd.run(10.0)
    crowd.kill_node("n55")
    crowd.run(13.0)
    crowd.audit(10)
    crowd.run(13.0)
    assert crowd.coordinator._audits.status().step == 10
    crowd.audit(20, odd=777)
    crowd.run(14.0)
    assert [len(sheet.ranks) for sheet in crowd.coordinator._audits.wish.sheets] == [99_999, 1]
    took = time.process_time() - began
    assert crowd.coordinator.state == "running"
    assert [(line.cause, line.steps_lost) for line in crowd.closed] == [("exit", 0), ("node_lost", 0)]
    assert crowd.coordinator.round.number == 3
    heard = crowd.reports - 12_500  # without the first of each, when they join
    assert 60 * 12_500 / REPORT_S_MAX * 0.8 < heard < 60 * REPORTS_S * 1.2, "each node is heard, and all together no more than fits"
    print(f"{crowd.reports} reports, {took:.1f} s of one core, {took / crowd.reports * 1e6:.0f} us each, everything included")
