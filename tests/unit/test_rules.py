"""When a value becomes a finding."""

from __future__ import annotations

import pytest
from resilient_agents.probes.rules import SAMPLES, Judge, Rule, load


def rule(**fields):
    base = {
        "probe": "p",
        "read": "x",
        "layer": "gpu",
        "kind": "k",
        "code": "c",
        "class_": "cordon",
        "text": "{value} of {limit}",
        "source": "a test",
    }
    return Rule(**(base | fields))


def said(judge, *looks):
    """At which of the looks (now, value) something was the matter."""
    return [now for now, value in looks if judge.look(now, {"gpu:0": {} if value is None else {"x": value}})]


def judge(**fields):
    return Judge("p", [rule(**fields), rule(**fields, probe="another") if "probe" not in fields else rule(**fields)])


def test_is_and_above():
    assert said(judge(test="is", limit=2), (0, 1), (1, 2), (2, 3)) == [1]
    assert said(judge(test="above", limit=2), (0, 2), (1, 3), (2, 2)) == [1]


def test_above_must_hold():
    looks = [(0, 1), (10, 1), (20, 0), (30, 1), (59, 1), (60, 1), (90, 1), (100, 0)]
    assert said(judge(test="above", hold_s=30.0), *looks) == [60, 90]


def test_growth_counts_from_the_first_look_and_is_over_after_the_window():
    assert said(judge(test="grows", window_s=60.0), (0, 1000), (30, 1000), (40, 1001), (90, 1001), (99, 1001), (101, 1001)) == [40, 90, 99]
    assert said(judge(test="grows", limit=10, window_s=60.0), (0, 0), (30, 6), (60, 12), (90, 18), (120, 18), (180, 18)) == [60, 90]


def test_a_counter_that_goes_back_begins_anew():
    assert said(judge(test="grows", window_s=60.0), (0, 9), (10, 3), (20, 3), (30, 4)) == [30]


def test_a_long_window_keeps_few_samples():
    one = Judge("p", [rule(test="grows", window_s=604800.0)])
    for minute in range(40_000):
        one.look(60.0 * minute, {"gpu:0": {"x": 5}})
    assert all(len(trace.samples) <= SAMPLES for trace in one._traces.values())
    assert one.look(60.0 * 40_000, {"gpu:0": {"x": 6}})


def test_often():
    one = judge(test="often", limit=2, window_s=300.0, of="level")
    assert said(one, *((60 * n, n in {1, 3, 4}) for n in range(12))) == [240, 300]
    grown = judge(test="often", limit=1, window_s=300.0, of="growth")
    assert said(grown, *((60 * n, value) for n, value in enumerate([5, 5, 6, 6, 7, 7, 7, 7, 7]))) == [240, 300, 360]


def test_one_against_its_peers():
    one = Judge("p", [rule(test="odd", limit=10, times=4.0, window_s=300.0)])
    one.look(0, {f"gpu:{n}": {"x": 0} for n in range(4)})
    assert one.look(30, {f"gpu:{n}": {"x": 100 + n} for n in range(4)}) == []  # all of them: it is the machine, or the work
    found = one.look(60, {f"gpu:{n}": {"x": 110 + (900 if n == 2 else n)} for n in range(4)})
    assert [finding.device for finding in found] == ["gpu:2"]


def test_fewer_than_all_others():
    one = Judge("p", [rule(test="fewer", limit=3)])
    assert [f.device for f in one.look(0, {f"gpu:{n}": {"x": 18 - (n == 2)} for n in range(4)})] == ["gpu:2"]
    assert one.look(1, {f"gpu:{n}": {"x": 18 - (n in {1, 2})} for n in range(4)}) == []  # the others do not agree
    assert one.look(2, {f"gpu:{n}": {"x": 18} for n in range(4)}) == []
    assert Judge("p", [rule(test="fewer", limit=3)]).look(0, {f"gpu:{n}": {"x": n} for n in range(3)}) == []


def test_what_could_not_be_read_says_nothing_new():
    assert said(judge(test="above"), (0, 1), (1, None), (2, None), (3, 0), (4, None)) == [0, 1, 2]


def test_text_and_note():
    one = Judge("p", [rule(test="above", limit=3)])
    (found,) = one.look(0, {"gpu:0": {"x": 12_345_678}}, {("gpu:0", "x"): "links 3 7"})
    assert found.text == "12345678 of 3 (links 3 7)"
    assert (found.probe, found.layer, found.kind, found.code, found.class_, found.seq) == ("p", "gpu", "k", "c", "cordon", 0)


@pytest.mark.parametrize("name", ["nvml.toml"])
def test_the_data_is_whole(name):
    rules = load(name)
    for one in rules:
        assert one.source, one
        assert one.text.format(value=1, limit=2)
        assert one.test not in {"grows", "odd", "often"} or one.window_s > 0
