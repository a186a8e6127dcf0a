"""Who never waits is slow; and nobody is named because of noise."""

from __future__ import annotations

import random

from resilient.core.messages import Chair, Record
from resilient.core.straggler import Stragglers, Window, median, scores
from resilient.core.tempo import Tempo

HOMES = {rank: f"n{rank // 4}" for rank in range(8)}


def window(waits, step_s=1.0, **more):
    return Window(steps=10, step_s=step_s, waits=dict(enumerate(waits)), loads=dict.fromkeys(range(len(waits)), 0.0), **more)


def run(stragglers, *windows, homes=HOMES):
    return [finding for w in windows for finding in stragglers.take(w, homes)]


def test_the_middle():
    assert median([3.0]) == 3.0
    assert median([4.0, 1.0, 2.0, 3.0]) == 2.5


def test_who_waits_least_is_slow_by_what_the_others_wait_longer():
    found = scores({0: 0.5, 1: 0.51, 2: 0.02, 3: 0.49}, 1.0)
    assert 0.4 < found.pop(2) < 0.5
    assert max(found.values()) < 0.05


def test_one_slow_rank_is_named_once_and_cleared_when_it_is_over():
    stragglers = Stragglers()
    slow, even = window([0.4, 0.4, 0.4, 0.0, 0.4, 0.4, 0.4, 0.4]), window([0.1] * 8)
    (told,) = run(stragglers, *[slow] * 6)
    assert (told.kind, told.rank, told.device, told.class_, told.layer) == ("straggler", 3, "rank:3", "ignore", "training")
    assert "40 % of a step" in told.text
    assert stragglers.scores[3] > 0.3
    (over,) = run(stragglers, *[even] * 4)
    assert over.clears
    assert over.rank == 3


def test_a_slow_node_is_named_as_a_whole():
    (told,) = run(Stragglers(), *[window([0.4] * 4 + [0.0, 0.01, 0.0, 0.0])] * 3)
    assert told.device == "rank:4,rank:5,rank:6,rank:7"
    assert "node n1" in told.text


def test_a_slow_rank_of_a_tensor_parallel_group_and_not_its_neighbours():
    """4 is slow; 5, 6 and 7 wait for it in their group, the others in theirs: all the same length."""
    (told,) = run(Stragglers(), *[window([0.41, 0.4, 0.4, 0.39, 0.03, 0.4, 0.41, 0.4])] * 3)
    assert told.device == "rank:4"


def test_two_windows_are_not_enough_and_sections_say_nothing():
    slow = window([0.4, 0.4, 0.0, 0.4], disturbed=False)
    disturbed = window([0.4, 0.4, 0.0, 0.4], disturbed=True)
    homes = dict.fromkeys(range(4), "n0")
    assert not run(Stragglers(), slow, slow, window([0.1] * 4), homes=homes)
    assert not run(Stragglers(), *[disturbed] * 9, homes=homes)


def test_noise_names_nobody():
    for seed in range(200):
        dice = random.Random(seed)
        stragglers = Stragglers()
        windows = [window([max(0.0, dice.gauss(0.2, 0.05)) for _ in range(8)]) for _ in range(30)]
        assert not run(stragglers, *windows), seed


def test_a_slow_rank_is_found_in_noise():
    found = 0
    for seed in range(100):
        dice = random.Random(seed)
        windows = [window([0.0 if rank == 5 else dice.gauss(0.5, 0.04) for rank in range(8)]) for _ in range(6)]
        told = run(Stragglers(), *windows)
        assert {f.rank for f in told} <= {5}
        found += bool(told)
    assert found == 100


# --------------------------------------------------------------------------- from reports


class Track:
    """A run whose reports come once a second."""

    def __init__(self, ranks=4):
        self.tempo, self.now, self.steps = Tempo(), 0.0, 0.0
        self.spent = {rank: [0.0, 0.0] for rank in range(ranks)}  # waited, loaded
        self.sections = 0
        self.tempo.seated(dict.fromkeys(range(ranks), "n0"))

    def lap(self, seconds, step_s=0.1, waits=(), loads=(), sections=0):
        found = []
        for _ in range(seconds):
            self.now, self.steps = self.now + 1.0, self.steps + 1.0 / step_s
            self.sections += sections
            chairs = []
            for rank, spent in self.spent.items():
                spent[0] += (waits[rank] if waits else 0.02) / step_s
                spent[1] += (loads[rank] if loads else 0.01) / step_s
                record = Record(
                    round=1,
                    step=int(self.steps),
                    phase="running",
                    committed_s=1.0,
                    waited_s=spent[0],
                    loaded_s=spent[1],
                    sections=self.sections,
                )
                chairs.append(Chair(rank=rank, local_rank=rank, state="active", worker="w", record=record))
            found += self.tempo.take(chairs, self.now)
        return [(f.kind, f.clears) for f in found]


def test_an_even_run_says_nothing():
    assert not Track().lap(600)


def test_a_straggler_is_found_within_a_dozen_seconds():
    track = Track()
    assert not track.lap(30)
    assert track.lap(16, step_s=0.2, waits=(0.12, 0.12, 0.02, 0.12)) == [("straggler", False), ("throughput-drop", False)]


def test_a_drop_of_the_speed_is_told_once_when_it_lasts_and_when_it_is_over():
    track = Track()
    track.lap(60)
    assert not track.lap(5, step_s=0.3), "one window"
    track.lap(30)
    assert track.lap(60, step_s=0.3) == [("throughput-drop", False)]
    assert track.lap(30) == [("throughput-drop", True)]


def test_a_rank_that_waits_for_data_is_told():
    track = Track()
    assert track.lap(30, loads=(0.01, 0.07, 0.01, 0.01)) == [("data-stall", False)]
    assert track.lap(30) == [("data-stall", True)]


def test_windows_with_sections_say_nothing():
    track = Track()
    track.lap(60)
    assert not track.lap(60, step_s=0.5, waits=(0.0, 0.4, 0.4, 0.4), sections=1)


def test_a_round_begins_anew():
    track = Track()
    track.lap(10, step_s=0.2, waits=(0.12, 0.12, 0.02, 0.12))
    track.tempo.seated(dict.fromkeys(range(4), "n0"))
    assert not track.lap(8, step_s=0.2, waits=(0.12, 0.12, 0.02, 0.12))
