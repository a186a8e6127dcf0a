"""A run is told of its sick numbers once, and never of healthy ones."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from resilient.core.vitals import CALM, LEARN, NEW_USUAL, Vitals, meaning


class Patient:
    def __init__(self, seed=0):
        self.vitals, self.step, self.dice = Vitals(), 0, random.Random(seed)

    def logs(self, rank=0, **scalars):
        self.step += 1
        return [(f.kind, f.step) for f in self.vitals.take(rank, self.step, scalars)]

    def trains(self, steps, noise=0.1):
        """A loss that falls, with noise of a tenth, and a norm that jumps about."""
        told = []
        for _ in range(steps):
            loss = (1 + 5 / (1 + self.step / 50)) * (1 + self.dice.gauss(0, noise))
            told += self.logs(loss=loss, grad_norm=self.dice.lognormvariate(0, 0.5))
        return told


@pytest.mark.parametrize("name", ["loss", "lm_loss", "train_loss", "lm loss", "train/loss", "Loss", "loss/lm", "totalLoss"])
def test_losses(name):
    assert meaning(name) == "loss"


@pytest.mark.parametrize("name", ["grad_norm", "gradient-norm", "train/grad_norm", "gnorm", "grad norm"])
def test_norms(name):
    assert meaning(name) == "norm"


@pytest.mark.parametrize("name", ["val_loss", "eval/loss", "test loss", "lr", "loss_scale_", "", "weight_norm", "lossless_codec"])
def test_what_does_not_count(name):
    assert meaning(name) in ("", "loss") if name == "loss_scale_" else meaning(name) == ""


@pytest.mark.parametrize("seed", range(20))
def test_healthy_training_is_left_alone(seed):
    assert not Patient(seed).trains(2000)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_no_number_is_told_at_once_and_once(value):
    patient = Patient()
    assert patient.logs(loss=value) == [("nan-loss", 1)]
    assert [patient.logs(loss=value) for _ in range(300)] == [[]] * 300
    patient.trains(CALM)
    assert [kind for kind, _ in patient.logs(loss=value)] == ["nan-loss"]


def test_an_infinite_norm_is_a_scalers_daily_bread():
    assert not Patient().logs(grad_norm=math.inf)


def test_a_spike_is_told_when_it_comes_twice():
    patient = Patient()
    patient.trains(200)
    assert not patient.logs(loss=30.0), "one value is none"
    patient.trains(CALM)
    patient.logs(loss=30.0)
    assert [kind for kind, _ in patient.logs(loss=25.0)] == ["loss-spike"]
    assert not patient.logs(loss=28.0), "the same episode"


def test_a_loss_that_has_come_down_to_rounding_errors_may_jump():
    vitals, dice = Vitals(), random.Random(1)
    losses = [1.0 - step / 100 for step in range(64)] + [10 ** dice.uniform(-9, -6) for _ in range(2000)]
    assert [found for step, loss in enumerate(losses) for found in vitals.take(0, step, {"loss": loss})] == []


def test_a_level_that_lasts_is_the_new_usual():
    patient = Patient()
    patient.trains(200)
    told = [kind for _ in range(NEW_USUAL + 3 * LEARN) for kind, _ in patient.logs(loss=30.0 + patient.dice.random())]
    assert told == ["loss-spike"]


def test_a_gradient_spike():
    patient = Patient()
    patient.trains(200)
    assert [kind for kind, _ in patient.logs(grad_norm=100.0)] == ["grad-spike"]
    assert not patient.logs(grad_norm=100.0)


def test_only_the_lowest_rank_of_a_node_is_heard():
    patient = Patient()
    patient.logs(rank=4, loss=1.0)
    assert not patient.logs(rank=5, loss=math.nan)
    assert patient.logs(rank=4, loss=math.nan)


def test_after_a_rollback_what_was_logged_from_there_on_is_forgotten():
    patient = Patient()
    patient.trains(100)
    before = len(patient.vitals._series["loss"].values)
    patient.step = 60
    patient.trains(1)
    assert len(patient.vitals._series["loss"].values) == before - 39


@given(st.lists(st.tuples(st.integers(-1, 50), st.dictionaries(st.text(max_size=6), st.floats(), max_size=3)), max_size=60))
def test_whatever_is_logged(lines):
    vitals = Vitals()
    for step, scalars in lines:
        vitals.take(0, step, {name or "loss": value for name, value in scalars.items()})
