"""Which step is named when, from what rank 0 says of its pace."""

from __future__ import annotations

from resilient.core.cadence import COSTS, FIRST_STEPS, GIVE_UP_S, Cadence, interval_s, mtbf_s
from resilient.core.messages import NONE, Pace

STEP_S = 0.5


class Fleet:
    """Rank 0, made up: seals what is named, and its checkpoints take their time."""

    def __init__(self, cadence: Cadence, *, stall_s: float = 0.1, slow_s: float = 0.2, written_s: float = 2.0, nodes: int = 2048) -> None:
        self.cadence, self.nodes = cadence, nodes
        self.stall_s, self.slow_s, self.written_s = stall_s, slow_s, written_s
        self.now, self.step, self.at, self.debt = 1000.0, 0, 0.0, 0.0
        self.pace = Pace(rank=0, step=0, at_s=0.0)
        self.sealed: list[int] = []
        self.commit_at = float("inf")

    def run(self, steps: int) -> None:
        """So many steps, with a report after each."""
        for _ in range(steps):
            wanted = self.pace.sealed < self.cadence.named <= self.step + 1
            took = STEP_S + self.debt + (self.stall_s if wanted else 0.0)
            self.debt = 0.0
            self.step, self.at, self.now = self.step + 1, self.at + took, self.now + took
            sealed = {"sealed": self.step, "sealed_s": self.at, "stall_s": self.stall_s} if wanted else {}
            old = {"sealed": self.pace.sealed, "sealed_s": self.pace.sealed_s, "stall_s": self.pace.stall_s}
            self.pace = Pace(rank=0, step=self.step, at_s=self.at, **{**old, **sealed})
            if wanted:
                self.sealed.append(self.step)
                self.debt, self.commit_at = self.slow_s, self.now + self.written_s
            if self.now >= self.commit_at:
                self.commit_at = float("inf")
                self.cadence.marked(self.pace.sealed, self.now)
            self.cadence.take(self.pace, self.nodes, self.now)


def auto(**more) -> Cadence:
    return Cadence(every=0, auto=True, budget=more.pop("budget", 0.01), **more)


def test_the_first_one_comes_early_and_the_next_as_its_cost_says():
    fleet = Fleet(auto())
    fleet.run(40)
    assert fleet.sealed == [FIRST_STEPS + 4], "as soon as undisturbed steps are known, and everybody has heard of it"
    status = fleet.cadence.status(fleet.nodes, fleet.now)
    assert (status.cost_s, status.stall_s, status.step_s) == (0.3, 0.1, STEP_S)
    expected = interval_s(0.3, mtbf_s(2048, 0, fleet.now - 1000), 0.01) / STEP_S
    assert abs(status.every - expected) <= 1
    assert fleet.cadence.named == fleet.sealed[0] + status.every
    fleet.run(1000)
    gaps = {b - a for a, b in zip(fleet.sealed[1:], fleet.sealed[2:], strict=False)}
    assert max(gaps) - min(gaps) <= 2
    assert fleet.at < 1.011 * STEP_S * fleet.step, "1 % of the time"


def test_a_checkpoint_is_committed_before_the_next_begins():
    fleet = Fleet(auto(budget=1.0), stall_s=0.0, slow_s=0.0, written_s=60.0)
    fleet.run(1000)
    assert len(fleet.sealed) > 3
    assert min(b - a for a, b in zip(fleet.sealed, fleet.sealed[1:], strict=False)) >= 60.0 / STEP_S


def test_one_that_is_never_committed_is_given_up():
    fleet = Fleet(auto(), written_s=float("inf"))
    fleet.run(int(GIVE_UP_S / STEP_S) + 100)
    assert len(fleet.sealed) == 2


def test_an_evaluation_in_the_middle_of_one_is_not_the_price_of_all():
    fleet = Fleet(auto())
    fleet.run(600)
    before = fleet.cadence.status(fleet.nodes, fleet.now).cost_s
    while len(fleet.sealed) < COSTS // 2 + 3:
        fleet.run(1)
    fleet.debt += 300.0
    fleet.run(10)
    assert fleet.cadence.status(fleet.nodes, fleet.now).cost_s == before


def test_failures_bring_it_forward():
    fleet = Fleet(auto())
    fleet.run(100)
    before, named = fleet.cadence.status(fleet.nodes, fleet.now).every, fleet.cadence.named
    for _ in range(3):
        fleet.cadence.failed()
        fleet.cadence.disturbed()
    fleet.run(2)
    after = fleet.cadence.status(fleet.nodes, fleet.now)
    assert (after.failures, after.every < before, fleet.cadence.named < named) == (3, True, True)


def test_asked_for_it_is_named_at_once():
    fleet = Fleet(auto())
    fleet.run(100)
    fleet.cadence.ask(fleet.nodes, fleet.now)
    assert fleet.step < fleet.cadence.named <= fleet.step + 4
    fleet.run(10)
    assert fleet.sealed[-1] > 100
    assert fleet.cadence.named > fleet.step


def test_asked_for_before_anything_is_known_it_waits_for_that():
    fleet = Fleet(Cadence(every=0, auto=False, budget=0.01))
    fleet.cadence.ask(fleet.nodes, fleet.now)
    assert fleet.cadence.named == NONE
    fleet.run(10)
    assert len(fleet.sealed) == 1
    fleet.run(1000)
    assert len(fleet.sealed) == 1, "a fixed interval is not touched"


def test_back_behind_what_was_sealed():
    """All ranks go back to a step before the one that was being written: it is named again when they are on their way."""
    fleet = Fleet(auto(), written_s=1e9)
    fleet.run(60)
    (first,) = fleet.sealed
    fleet.cadence.disturbed()
    fleet.step, fleet.pace = first - 10, Pace(rank=0, step=first - 10, at_s=fleet.at)
    fleet.written_s = 2.0
    fleet.run(100)
    assert len(fleet.sealed) >= 2
    assert fleet.cadence.committed == fleet.sealed[1]
