"""A node's book of users' faults: who counts as a job, what is kept, and what happens to a book that is no book."""

from __future__ import annotations

import os

import pytest
from resilient_agents.strikes import SAME_S, Strikes

from resilient.core.messages import Finding
from resilient.core.repeats import STRIKES_MAX
from resilient.rulebook import shipped

DAY = 86400.0
A, B = "pci:0000:3b:00", "pci:0000:5e:00"


def xid(device=A, code="31", class_="user", **more):
    return Finding(seq=0, kind="xid", probe="kernel-log", layer="gpu", code=code, device=device, class_=class_, **more)


def book(path=""):
    made = Strikes(str(path), shipped())
    assert made.open() == ""
    return made


def test_three_programs_on_one_device_and_none_on_another():
    it = book()
    for i, owner in enumerate(("a.py of user 1", "a.py of user 2", "a.py of user 2", "b.py of user 1")):
        assert it.standing(1e9 + i) == []
        assert it.take(xid(), owner, 1e9 + i) == ""
    (found,) = it.standing(1e9 + 9)
    assert (found.kind, found.class_, found.role, found.device, found.probe) == ("device-repeats", "cordon", "cause", A, "repeats")
    assert "a.py of user 1, a.py of user 2, b.py of user 1" in found.text
    assert it.standing(1e9 + 8 * DAY) == [], "it is over when it has been well for so long"


def test_who_looks_for_a_bug_strikes_again_and_again():
    it = book()
    for i in range(50):
        it.take(xid(), "a.py of user 1", 1e9 + i * SAME_S / 3)
    assert it.standing(1e9 + 17 * SAME_S) == []
    for days in (30, 32, 34):  # and who comes back another day has another bug, or the device has
        it.take(xid(), "a.py of user 1", 1e9 + days * DAY)
    assert len(it.standing(1e9 + 34 * DAY)) == 1


def test_of_whom_nobody_knows_is_one():
    it = book()
    for i in range(10):
        it.take(xid(), "", 1e9 + i * 3600)
    assert it.standing(1e9 + DAY) == []


def test_a_program_that_strikes_another_device_has_a_bug():
    it = book()
    for owner in "abc":
        it.take(xid(), owner, 1e9)
    it.take(xid(B), "c", 1e9 + 1)
    assert it.standing(1e9 + 2) == []


@pytest.mark.parametrize(
    "finding",
    [xid(code="79", class_="replace"), xid(code="48"), xid(""), xid(role="symptom"), xid(clears=True), xid(code="45", class_="ignore")],
)
def test_what_is_no_strike(finding):
    assert book().take(finding, "a", 1e9) is None


def test_it_lasts_and_is_bounded(tmp_path):
    path = tmp_path / "new" / "strikes.jsonl"
    first = book(path)
    for owner in "abc":
        assert first.take(xid(), owner, 1e9) == ""
    assert len(book(path).standing(1e9 + 1)) == 1
    for i in range(STRIKES_MAX + 10):
        first.take(xid(f"pci:0000:00:{i:02x}"), "x" * 5000, 1e9)
    assert len(path.read_text().splitlines()) == STRIKES_MAX
    assert os.listdir(path.parent) == [path.name]
    assert book(path).standing(1e9 - 3 * DAY) == [], "of a clock that was ahead"


@pytest.mark.parametrize("data", [b"{", b"\xff\x00" * 999, b'{"type":"Strike"}\n', b"[]\n", b"1" * (5 << 20)])
def test_a_damaged_book_is_put_aside(tmp_path, data):
    path = tmp_path / "strikes.jsonl"
    path.write_bytes(data)
    it = Strikes(str(path), shipped())
    warning = it.open()
    assert str(path) in warning and "expected" in warning
    assert (tmp_path / "strikes.jsonl.damaged").read_bytes() == data
    assert it.take(xid(), "a", 1e9) == "" and it.standing(1e9) == []
    assert book(path).standing(1e9) == []


def test_a_book_that_cannot_be_written_is_kept_in_memory(tmp_path):
    (tmp_path / "file").write_text("")
    it = Strikes(str(tmp_path / "file" / "strikes.jsonl"), shipped())
    assert "cannot be read" in it.open()
    assert all("cannot be written" in it.take(xid(), owner, 1e9) for owner in "abc")
    assert len(it.standing(1e9)) == 1


def test_without_a_rule_that_counts_jobs_nothing_is_kept():
    from msgspec.structs import replace

    rules = shipped()
    it = Strikes("", replace(rules, rules=tuple(replace(rule, jobs=0) for rule in rules.rules)))
    assert it.take(xid(), "a", 1e9) is None and it.standing(1e9) == []
