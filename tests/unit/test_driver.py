"""The driver: events in order, actions in order, and what is answered at once comes before what waits."""

from __future__ import annotations

import asyncio

import pytest

from resilient.host.driver import Driver


class Echo:
    """Acts out each event as an action of its own name; asks for a tick at `due`."""

    def __init__(self, due: float | None = None) -> None:
        self.due = due
        self.seen: list[tuple[str, float]] = []

    def step(self, event: str, now: float) -> list[str]:
        self.seen.append((event, now))
        if event == "tick":
            self.due = None
        return [event]

    def deadline(self) -> float | None:
        return self.due


def drive(machine: Echo, events: list[str], answers: dict[str, list[str]]) -> list[str]:
    done: list[str] = []
    clock = [0.0]

    async def whole() -> None:
        def perform(action: str) -> list[str] | None:
            done.append(action)
            clock[0] += 1.0
            if action == "stop":
                driver.finish()
            return answers.get(action)

        driver: Driver[str, str] = Driver(machine, "tick", perform, clock=lambda: clock[0])
        for event in events:
            driver.put(event)
        async with asyncio.timeout(10):
            await driver.run()

    asyncio.run(whole())
    return done


def test_what_is_answered_at_once_comes_before_what_waits():
    assert drive(Echo(), ["a", "b", "stop"], {"a": ["a1", "a2"], "a1": ["a1x"]}) == ["a", "a1", "a2", "a1x", "b", "stop"]


def test_nothing_is_performed_after_the_finish():
    assert drive(Echo(), ["a", "stop", "b"], {"stop": ["late"]}) == ["a", "stop"]


def test_a_deadline_is_a_tick_and_comes_once():
    machine = Echo(due=0.5)
    assert drive(machine, ["a", "b", "stop"], {}) == ["a", "b", "stop"]  # all events that wait come first
    machine = Echo(due=0.0)
    assert drive(machine, [], {"tick": ["stop"]}) == ["tick", "stop"]


def test_a_broken_invariant_ends_the_run():
    class Broken(Echo):
        def step(self, event: str, now: float) -> list[str]:
            raise AssertionError(event)

    with pytest.raises(AssertionError, match="a"):
        drive(Broken(), ["a"], {})
