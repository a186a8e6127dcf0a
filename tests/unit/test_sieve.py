"""Sieve: the same thing is said once, what becomes worse is said at once, and a flood leaves room for its cause."""

from __future__ import annotations

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from resilient_agents.sieve import AGAIN_S, FORGET_S, KIND_BURST, OPEN_MAX, REMIND_S, Sieve, folded

from resilient.core.messages import Finding


def fact(kind: str = "xid", device: str = "pci:0000:3b:00", class_: str = "app-restart", **more) -> Finding:
    return Finding(seq=0, kind=kind, device=device, class_=class_, **more)


def test_the_same_event_is_told_ever_more_rarely_and_none_is_lost_from_the_count():
    sieve, told = Sieve(), []
    for second in range(3600):
        told += [(second, f.count) for f in sieve.take("kernel-log", [fact()], float(second))]
    times = [at for at, _ in told]
    assert times[:4] == [0, 5, 15, 35]
    assert all(later - earlier <= REMIND_S for earlier, later in itertools.pairwise(times))
    assert sum(count for _, count in told) == times[-1] + 1
    assert sieve.counts["kernel-log", "xid", "app-restart"] == 3600


def test_another_device_code_or_rank_is_another_fact():
    sieve = Sieve()
    facts = [fact(), fact(device="pci:0000:5e:00"), fact(code="79"), fact(rank=3)]
    assert len(sieve.take("p", facts, 0.0)) == 4


def test_what_becomes_worse_is_told_at_once_and_what_becomes_better_is_not():
    sieve = Sieve()
    sieve.take("p", [fact(class_="gpu-reset")], 0.0)
    assert sieve.take("p", [fact(class_="app-restart")], 1.0) == []
    assert [f.class_ for f in sieve.take("p", [fact(class_="cordon")], 2.0)] == ["cordon"]


def test_what_is_ignored_is_counted_only():
    sieve = Sieve()
    assert sieve.take("p", [fact(class_="ignore", count=7)], 0.0) == []
    assert sieve.counts["p", "xid", "ignore"] == 7
    assert sieve.take("p", [fact(class_="ignore", layer="probe", kind="probe-hangs")], 0.0)


def test_a_state_is_told_once_and_its_end():
    sieve = Sieve()
    disk = fact("disk-full", "dev:/tmp")
    assert len(sieve.take("disk", [disk], 0.0, lasting=True)) == 1
    assert sieve.take("disk", [disk], 60.0, lasting=True) == []
    assert sieve.matters(61.0) != []
    (over,) = sieve.take("disk", [], 120.0, lasting=True)
    assert over.clears and over.kind == "disk-full" and over.device == "dev:/tmp" and over.class_ == "ignore"
    assert sieve.matters(121.0) == []
    assert sieve.take("disk", [], 180.0, lasting=True) == []
    assert len(sieve.take("disk", [disk], 240.0, lasting=True)) == 1


def test_a_state_that_becomes_worse_tells_how_often():
    sieve = Sieve()
    sieve.take("ib", [fact("ib-flap", class_="app-restart", count=1)], 0.0, lasting=True)
    assert sieve.take("ib", [fact("ib-flap", class_="app-restart", count=2)], 5.0, lasting=True) == []
    assert [f.count for f in sieve.take("ib", [fact("ib-flap", class_="cordon", count=3)], 10.0, lasting=True)] == [3]


def test_a_state_that_stays_is_told_again_after_a_time():
    sieve = Sieve()
    told = [at for at in range(0, 3600, 60) if sieve.take("disk", [fact("disk-full")], float(at), lasting=True)]
    assert told == list(range(0, 3600, int(REMIND_S)))


def test_the_states_of_another_probe_do_not_end():
    sieve = Sieve()
    sieve.take("disk", [fact("disk-full")], 0.0, lasting=True)
    assert sieve.take("mounts", [], 1.0, lasting=True) == []
    assert len(sieve.matters(2.0)) == 1


def test_a_recovery_closes_what_the_same_kind_and_device_have_open():
    sieve = Sieve()
    sieve.take("p", [fact(class_="replace"), fact(class_="replace", device="pci:0000:5e:00")], 0.0)
    assert sieve.take("p", [fact(clears=True, class_="ignore")], 1.0) != []
    assert [f.device for f in sieve.matters(2.0)] == ["pci:0000:5e:00"]
    assert len(sieve.take("p", [fact(class_="replace")], 3.0)) == 1


def test_a_newcomer_is_told_what_befell_the_node_and_not_what_befell_a_job():
    sieve = Sieve()
    sieve.take("p", [fact(class_="app-restart", code="13"), fact(class_="gpu-reset", code="79"), fact(class_="user", code="31")], 0.0)
    assert [f.code for f in sieve.matters(1.0)] == ["79"]
    assert sieve.matters(FORGET_S + 1) == []


def test_a_flood_leaves_room_for_its_cause_and_is_told_as_a_number():
    sieve = Sieve()
    flood = [fact("aer", f"pci:0000:{i:02x}:00", "replace") for i in range(200)]
    told = sieve.take("kernel-log", flood, 0.0)
    assert len(told) == KIND_BURST
    assert [f.kind for f in sieve.take("kernel-log", [fact("gpu-lost", class_="replace")], 0.0)] == ["gpu-lost"]
    (held,) = sieve.held(1.0)
    assert held.count == 180 and "aer (180)" in held.text
    assert sieve.held(2.0) == []


def test_what_was_held_back_is_told_later_if_it_is_still_there():
    sieve = Sieve()
    flood = [fact("disk-full", f"dev:{i}", "replace") for i in range(30)]
    first = sieve.take("disk", flood, 0.0, lasting=True)
    later = sieve.take("disk", flood, 60.0, lasting=True)
    assert {f.device for f in (*first, *later)} == {f.device for f in flood}


def test_thousands_of_a_kind_are_one_and_what_stands_behind_them_is_there():
    flood = [fact("xid", f"dev:{i % 2}") for i in range(5000)]
    cause = fact("gpu-lost", "dev:1", "replace")
    assert [(f.kind, f.device, f.count) for f in folded([*flood, cause])] == [
        ("xid", "dev:0", 2500),
        ("xid", "dev:1", 2500),
        ("gpu-lost", "dev:1", 1),
    ]


def test_what_comes_again_after_it_was_over_is_not_folded_into_what_was_before():
    down, up = fact("ib-link", "dev:a", "replace"), replace(fact("ib-link", "dev:a", "ignore"), clears=True)
    assert [f.clears for f in folded([down, down, up, down])] == [False, True, False]


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from("abcd"), st.integers(0, 3000), st.booleans(), st.floats(0, 1e4)), max_size=300))
def test_it_never_holds_more_than_its_limit(rows):
    sieve, now = Sieve(), 0.0
    for kind, device, lasting, pause in rows:
        now += pause
        sieve.take("p", [fact(kind, f"dev:{device}")], now, lasting=lasting)
        sieve.held(now)
    for i in range(2 * OPEN_MAX):
        sieve.take("q", [fact(f"kind{i}", f"dev:{i}")], now + i)
    assert len(sieve._open) <= OPEN_MAX and len(sieve._tokens) <= OPEN_MAX
    assert AGAIN_S < REMIND_S
