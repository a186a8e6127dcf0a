"""The coordinator at 100,000 ranks: an hour of its life on one core (`pytest -m bench -s tests/bench/test_coordinator.py`).

The machine is fed by a simulated crowd (resilient/sim/crowd.py) on a virtual clock; ranks and nodes die as often as the literature says of
such fleets. The bound: the hour takes less than a minute of one core, everything included. Printed, not asserted.
"""

from __future__ import annotations

import pathlib
import random
import sys
import time

import pytest

from resilient.sim.crowd import Crowd

sys.path.insert(0, str(pathlib.Path(__file__).parent))
from told import told

pytestmark = pytest.mark.bench

NODES, SLOTS = 12_500, 8
HOUR_S, BETWEEN_FAULTS_S = 3600.0, 900.0  # a fault every half hour is what such fleets see; twice that, for the worse


def test_an_hour_of_a_hundred_thousand_ranks() -> None:
    dice = random.Random(1)
    began = time.process_time()
    crowd = Crowd(nodes=NODES, slots=SLOTS, spare=8)
    crowd.run(20.0)
    started_s, reports = time.process_time() - began, crowd.reports
    faults = 0
    for _ in range(int(HOUR_S / BETWEEN_FAULTS_S)):
        if faults % 2:
            crowd.kill_node(f"n{dice.randrange(1, NODES)}")
        else:
            crowd.kill_rank(dice.randrange(NODES * SLOTS))
        faults += 1
        crowd.run(BETWEEN_FAULTS_S)
    took = time.process_time() - began
    each = (took - started_s) / (crowd.reports - reports)
    row = {"faults": faults, "reports": crowd.reports, "us_each": round(each * 1e6, 1), "reports_a_second": round(1 / each)}
    told("coordinator", [{**row, "start_s": round(started_s, 1), "hour_s": round(took, 1), "bound_s": 60}], ranks=NODES * SLOTS)
    assert crowd.coordinator.state == "running"
    assert [line.steps_lost for line in crowd.closed] == [0] * faults
