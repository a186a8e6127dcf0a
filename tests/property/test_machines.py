"""Both machines together, under faults and losses that Hypothesis chooses and shrinks.

The invariants are those of sim/invariants.py, checked after every step of every machine; at the end the weather is healed and the run
must finish.
"""

from __future__ import annotations

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from resilient.rulebook import shipped
from resilient.sim.faults import FAULTS, heal
from resilient.sim.world import Spec, World


class Fleet(RuleBasedStateMachine):
    world: World

    @initialize(
        nodes=st.integers(1, 3),
        slots=st.integers(1, 3),
        standbys=st.integers(0, 3),
        replicated=st.booleans(),
        snapshots=st.booleans(),
        seed=st.integers(0, 99),
    )
    def build(self, nodes, slots, standbys, replicated, snapshots, seed):
        room = standbys if nodes == 1 else slots
        state = {"replicated": replicated, "snapshots": snapshots}
        self.world = World(Spec(nodes=nodes, slots=slots, standbys=room, steps=40, rules=shipped(), **state), seed)
        self.faults = 0

    @rule(seconds=st.sampled_from([0.001, 0.02, 0.1, 0.4, 1.5]))
    def time_passes(self, seconds):
        self.world.run(seconds, self.world.over)

    @rule(kind=st.sampled_from(sorted(FAULTS)))
    def something_breaks(self, kind):
        if self.faults < 8:  # more in a row are a reason to give up, by design
            self.faults += 1
            FAULTS[kind](self.world)

    @rule(loss=st.sampled_from([0.0, 0.3, 0.9]))
    def the_network_is(self, loss):
        self.world.loss = loss

    def teardown(self):
        if not hasattr(self, "world"):
            return
        heal(self.world)
        assert self.world.run(300.0, self.world.over), f"no progress\n{self.world.trace.tail()}"
        assert self.world.finish is not None
        assert self.world.finish.exit_code == 0, f"{self.world.finish}\n{self.world.trace.tail()}"


TestFleet = Fleet.TestCase
TestFleet.settings = settings(
    max_examples=60, stateful_step_count=25, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)
