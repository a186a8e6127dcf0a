"""The watchman calls in time, once, and never for an announced pause."""

from __future__ import annotations

import pytest

from resilient.core.hang import Watch
from resilient.core.messages import Record

LOOK_S = 0.05


class Night:
    """A worker watched on a made-up clock."""

    def __init__(self, step_s=0.1):
        self.watch, self.now, self.beat, self.cpu, self.step, self.step_s = Watch(600.0), 100.0, 100.0, 0.0, 0, step_s
        self.entered = self.begun = 0
        self.record = {"round": 1, "phase": "running", "committed_s": 1.0}

    def look(self, os_state="R", **more):
        counted = {"entered": self.entered, "completed": self.entered, "begun": self.begun}
        record = Record(step=self.step, idle_s=self.now - self.beat, **{**counted, **self.record, **more.pop("record", {})})
        return self.watch.look(record, os_state, self.cpu, self.now, **{"neighbours_run": True, **more})

    def works(self, seconds):
        end = self.now + seconds
        while self.now < end:
            self.now += LOOK_S
            if self.now - self.beat >= self.step_s:
                self.beat, self.step, self.begun = self.now, self.step + 1, self.entered
            assert self.look() is None

    def meets(self):
        """A collective of the step under way, begun and ended."""
        self.beat, self.entered = self.now, self.entered + 1
        assert self.look() is None

    def until_told(self, most, cpu=1.0, os_state="R", **more):
        start = self.now
        while self.now < start + most:
            self.now += LOOK_S
            self.cpu += LOOK_S * cpu
            if (seen := self.look(os_state, **more)) is not None:
                return seen, self.now - start
        return None, most


def test_a_stop_is_seen_within_a_second():
    night = Night()
    night.works(3.0)
    seen, took = night.until_told(5.0, os_state="T")
    assert seen.kind == "stopped"
    assert took <= 1.0
    assert night.until_told(5.0, os_state="T")[0] is None, "told once"


def test_a_stop_of_slow_steps_has_more_time():
    night = Night(step_s=2.0)
    night.works(20.0)
    seen, took = night.until_told(5.0, os_state="T")
    assert seen.kind == "stopped"
    assert 1.0 < took <= 3.0


@pytest.mark.parametrize("case", [{"os_state": "t"}, {"os_state": "T", "neighbours_run": False}])
def test_a_debugger_and_a_frozen_machine_are_no_faults(case):
    night = Night()
    night.works(3.0)
    assert night.until_told(60.0, **case)[0] is None


@pytest.mark.parametrize("cpu", [1.0, 0.3, 0.0])
def test_no_movement_is_seen_within_five_seconds(cpu):
    night = Night()
    night.works(3.0)
    night.meets()
    seen, took = night.until_told(20.0, cpu=cpu)
    assert seen.kind == "stalled"
    assert 4.0 < took <= 5.0
    assert ("busy" if cpu else "blocked") in seen.text


def test_long_pauses_are_learned():
    night = Night(step_s=4.0)
    night.works(40.0)
    seen, _ = night.until_told(30.0)
    assert seen.kind == "stalled"
    assert 9.0 < night.now - night.beat <= 12.0


def test_a_section_is_no_hang_and_teaches_nothing():
    night = Night()
    night.works(3.0)
    assert night.until_told(100.0, record={"section": True})[0] is None
    night.beat = night.now
    night.works(3.0)
    seen, took = night.until_told(20.0)
    assert seen is not None
    assert took <= 5.0


def test_the_first_step_of_a_round_has_its_own_time():
    night = Night()
    night.works(3.0)
    night.record = {"round": 2, "phase": "clean", "committed_s": 0.0}
    assert night.until_told(400.0, cpu=0.0)[0] is None
    assert night.until_told(300.0, cpu=0.0)[0] is not None


def test_between_rounds_only_a_busy_process_counts():
    night = Night()
    night.works(3.0)
    assert night.until_told(60.0, cpu=0.0, between=True)[0] is None
    night = Night()
    night.works(3.0)
    assert night.until_told(10.0, cpu=1.0, between=True)[0] is not None


def test_the_watchmans_own_sleep_is_not_held_against_anybody():
    night = Night()
    night.works(3.0)
    night.now += 60.0
    assert night.look() is None
    night.beat = night.now
    night.works(3.0)
    assert night.watch.gap_s < 1.0


def test_a_process_that_sleeps_before_its_steps_first_collective_may_wait_for_data():
    night = Night()
    night.works(3.0)
    assert night.until_told(20.0, cpu=0.0)[0] is None
    seen, _ = night.until_told(20.0, cpu=0.0)
    assert seen.kind == "stalled"
    assert 25.0 < night.now - night.beat <= 30.0


def test_a_long_pause_excuses_none_of_another_kind():
    night = Night()
    night.works(3.0)
    night.now += 0.0
    for _ in range(int(6.0 / LOOK_S)):  # six seconds in the optimizer, say an evaluation nobody announced
        night.now += LOOK_S
        night.cpu += LOOK_S
        seen = night.look(record={"phase": "committing"})
        if seen is not None:
            break
    night.works(3.0)
    assert night.watch.gaps["update"] > 4.0
    night.meets()
    _, took = night.until_told(30.0)
    assert took <= 5.0, "between two collectives"


def test_what_was_learned_in_a_round_serves_the_next_until_that_has_its_own():
    night = Night(step_s=4.0)
    night.works(40.0)
    night.record["round"] = 2
    night.step_s = 0.1
    night.works(0.3)
    assert night.watch.gap_s > 3.0
    night.works(3.0)
    night.record["round"] = 3
    night.works(3.0)
    assert night.watch.gap_s < 1.0
    night.meets()
    assert night.until_told(30.0)[1] <= 5.0


def test_the_first_step_says_what_the_next_few_may_take():
    night = Night(step_s=8.0)
    night.record["committed_s"] = 0.0
    night.works(9.0)
    night.record["committed_s"] = 1.0
    night.works(60.0)


def test_in_the_first_step_of_a_later_round_the_bound_is_doubled_once_state_is_in_place():
    night = Night()
    night.works(3.0)
    night.record = {"round": 2, "phase": "running", "committed_s": 0.0, "restored_s": 1.0}
    seen, took = night.until_told(60.0)
    assert seen is not None
    assert 5.0 < took <= 10.0
