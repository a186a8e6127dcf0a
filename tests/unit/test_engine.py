"""Engine: in this process, with probes that behave, hang, fail and recover; what it does to a process is in tests/process/test_probes.py."""

from __future__ import annotations

import select
import threading
import time

import pytest
from resilient_agents import engine as engines
from resilient_agents import instruments
from resilient_agents.engine import Engine
from resilient_agents.probe import Absent
from resilient_agents.sightings import Begin

from resilient.core.messages import Finding

DEADLINE_S = 20.0


class Played:
    """A probe that does what the test says."""

    name = "played"
    period_s = 0.01
    timeout_s = 0.05

    def __init__(self, surroundings) -> None:
        self.acts.append(self)
        self.go = threading.Event()
        self.go.set()
        self.gives: object = []

    def check(self, now):
        assert self.go.wait(DEADLINE_S)
        if isinstance(self.gives, BaseException):
            raise self.gives
        return self.gives


@pytest.fixture
def played(monkeypatch):
    """Make an engine with one probe of this kind; gives engine and probe."""
    acts: list = []
    monkeypatch.setattr(engines, "GAP_S", 0.01)
    monkeypatch.setattr(engines, "AFTER_ERROR_S", 0.01)

    def make(**attributes):
        kind = type("Kind", (Played,), {"acts": acts, **attributes})
        monkeypatch.setattr(instruments, "find", lambda *_: {"played": lambda: kind})
        engine = Engine()
        engine.start(Begin(scopes=("node",)))
        until(lambda: acts, engine)
        return engine, acts[0]

    yield make
    for probe in acts:
        probe.go.set()
        probe.gives = SystemExit("the test is over")


def until(what, engine, told=None):
    """Wait on the engine's own descriptor, as its hosts do."""
    end = time.monotonic() + DEADLINE_S
    while not what():
        assert time.monotonic() < end
        select.select([engine.fd], [], [], 0.02)
        if told is not None:
            told += engine.news()
    return told


def of(told, kind, *, clears=False):
    return [f for f in told if f.kind == kind and f.clears is clears]


def test_a_finding_wakes_whoever_waits_and_says_who_saw_it(played):
    engine, probe = played()
    probe.gives = [Finding(seq=7, kind="x", class_="replace")]
    told: list = []
    until(lambda: told, engine, told)
    assert (told[0].probe, told[0].seq, told[0].count) == ("played", 0, 1) and told[0].t > 0
    assert engine.who().threads.keys() == {"played"}
    assert engine.matters() == told[:1]


def test_one_that_hangs_is_missed_once_and_not_called_again_and_is_well_when_it_answers(played):
    engine, probe = played()
    probe.go.clear()
    told: list = []
    until(lambda: of(told, "probe-hangs"), engine, told)
    probe.go.set()
    until(lambda: of(told, "probe-hangs", clears=True), engine, told)
    assert len(of(told, "probe-hangs")) == 1 and of(told, "probe-hangs")[0].class_ == "ignore"


def test_what_a_hang_means_the_probe_may_say(played):
    def hangs(self, seconds):
        return Finding(seq=0, kind="storage-hangs", class_="replace" if seconds > 0.2 else "ignore")

    engine, probe = played(hangs=hangs)
    probe.go.clear()
    told: list = []
    until(lambda: of(told, "storage-hangs"), engine, told)
    assert [(f.class_, f.probe) for f in told] == [("replace", "played")]
    probe.go.set()
    until(lambda: of(told, "storage-hangs", clears=True), engine, told)


@pytest.mark.parametrize(
    "wrong", [ValueError("x" * 9999), SystemExit(1), MemoryError(), ["no finding"], 7, [Finding(seq=0, kind="\ud800")]]
)
def test_whatever_goes_wrong_is_told_once_and_its_end(played, wrong):
    engine, probe = played()
    probe.gives = wrong
    told: list = []
    until(lambda: of(told, "probe-fails"), engine, told)
    probe.gives = []
    until(lambda: of(told, "probe-fails", clears=True), engine, told)
    assert len(of(told, "probe-fails")) == 1 and len(told[0].text) < 600


def test_what_lasts_is_told_with_its_end(played):
    engine, probe = played(lasting=True)
    probe.gives = [Finding(seq=0, kind="down", device="dev:eth0", class_="replace")]
    told: list = []
    until(lambda: told, engine, told)
    probe.gives = []
    until(lambda: of(told, "down", clears=True), engine, told)
    assert len(told) == 2


def test_one_without_anything_to_look_at_and_one_that_cannot_be_made(monkeypatch):
    def absent(surroundings):
        raise Absent("no such device")

    def missing():
        raise ModuleNotFoundError("nowhere")

    monkeypatch.setattr(instruments, "find", lambda *_: {"absent": lambda: absent, "missing": missing, "wrong": lambda: lambda s: object()})
    engine, told = Engine(), []
    engine.start(Begin(scopes=("node",)))
    until(lambda: len(engine.who().absent) == 3, engine, told)
    told += engine.news()
    assert engine.who().absent["absent"] == "no such device"
    assert {f.device for f in of(told, "probe-fails")} == {"probe:missing", "probe:wrong"}


def test_a_probe_of_another_scope_is_left_for_later(monkeypatch):
    kind = type("Kind", (Played,), {"acts": [], "scope": "run"})
    monkeypatch.setattr(instruments, "find", lambda *_: {"played": lambda: kind})
    engine = Engine()
    for post in engine.start(Begin(scopes=("node",))):
        post.thread.join(DEADLINE_S)
    assert engine.who().threads == {} and kind.acts == []
    found = engine.once(Begin(scopes=("node", "run")))
    assert found == [] and len(kind.acts) == 1


def test_once_does_not_wait_for_one_that_hangs(monkeypatch):
    kind = type("Kind", (Played,), {"acts": [], "check": lambda self, now: threading.Event().wait(DEADLINE_S)})
    monkeypatch.setattr(instruments, "find", lambda *_: {"played": lambda: kind})
    assert [f.kind for f in Engine().once(Begin(scopes=("node",)))] == ["probe-hangs"]


def test_nothing_that_a_probe_raises_ends_its_thread(played):
    engine, probe = played()
    probe.gives = KeyboardInterrupt()
    told: list = []
    until(lambda: of(told, "probe-fails"), engine, told)
    assert engine._posts["played"].thread.is_alive()


def test_what_has_much_to_do_rests(played):
    spent: list[tuple[float, float]] = []

    def busy(_self, _now):
        until = time.thread_time() + 0.02
        while time.thread_time() < until:
            pass
        spent.append((time.monotonic(), time.thread_time()))
        return []

    engine, _ = played(check=busy)
    until(lambda: len(spent) >= 6, engine)
    (begun, cpu), (ended, more) = spent[0], spent[-1]
    assert more - cpu < (ended - begun) / 3
