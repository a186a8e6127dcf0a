"""When a program's fault is the device's."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from resilient.core.repeats import Strike, whose


def strikes(*items, others=True):
    return [Strike(device=d, job=j, worker=w, at_s=t, others=others) for d, j, w, t in items]


def verdict(items, device="a", now=100.0):
    return whose(items, device, now, needed=3, within_s=86400.0)


def test_three_workers_on_one_device_and_none_elsewhere():
    assert verdict(strikes(("a", "j", "1", 1.0), ("a", "j", "2", 2.0))) == "user"
    assert verdict(strikes(("a", "j", "1", 1.0), ("a", "j", "2", 2.0), ("a", "j", "2", 3.0))) == "user"
    assert verdict(strikes(("a", "j", "1", 1.0), ("a", "j", "2", 2.0), ("a", "j", "3", 3.0))) == "device"


def test_a_program_with_a_bug_strikes_other_devices_too():
    bug = strikes(("a", "j", "1", 1.0), ("a", "j", "2", 2.0), ("a", "j", "3", 3.0), ("b", "j", "4", 4.0))
    assert verdict(bug) == verdict(bug, "b") == "user"


def test_three_jobs_on_one_device():
    jobs = strikes(("a", "j1", "1", 1.0), ("a", "j2", "1", 2.0), ("a", "j3", "1", 3.0))
    assert verdict(jobs) == "device"
    assert verdict([*jobs, *strikes(("b", "j3", "2", 3.0))]) == "user", "the third job is one with a bug: its strikes do not count"


def test_a_job_on_one_device_alone_counts_once():
    alone = strikes(("a", "j", "1", 1.0), ("a", "j", "2", 2.0), ("a", "j", "3", 3.0), others=False)
    assert verdict(alone) == "user"
    jobs = strikes(("a", "j1", "1", 1.0), ("a", "j2", "1", 2.0), ("a", "j3", "1", 3.0), others=False)
    assert verdict(jobs) == "device"


def test_the_window_and_the_switch():
    items = strikes(("a", "j", "1", 0.0), ("a", "j", "2", 2.0), ("a", "j", "3", 3.0))
    assert verdict(items, now=86401.0) == "user"
    assert whose(items, "a", 3.0, needed=0, within_s=10.0) == "user"


@given(st.lists(st.tuples(st.sampled_from("ab"), st.sampled_from("xyz"), st.sampled_from("1234"), st.floats(0.0, 100.0)), max_size=20))
def test_never_both_devices_of_one_job(items):
    made = strikes(*items)
    if len({job for _, job, _, _ in items}) == 1 and len({d for d, *_ in items}) == 2:
        assert verdict(made) == verdict(made, "b") == "user"
    if verdict(made) == "device":
        assert len({(job, worker) for d, job, worker, _ in items if d == "a"}) >= 3
