"""One piece of work behind its giver: waited for, told of, and never two at once."""

from __future__ import annotations

import os
import threading

import pytest

from resilient.checkpoint.behind import THREAD, Behind
from resilient.errors import TierUnavailable


def test_work_goes_on_behind_and_is_waited_for():
    behind, go_on, told = Behind(), threading.Event(), []

    def work():
        go_on.wait(30)
        told.append(threading.current_thread().name)
        return True

    behind.start(work, 1)
    behind.after(lambda: told.append("after"))
    assert (behind.busy, told) == (True, [])
    go_on.set()
    behind.settle()
    assert behind.busy is False
    assert told[0].startswith(THREAD)
    behind.after(lambda: told.append("at once"))
    assert told[1:] == ["after", "at once"]
    behind.settle()  # nothing is under way


def test_the_next_begins_when_the_last_is_over():
    behind, order = Behind(), []
    for count in range(20):
        behind.start(lambda count=count: order.append(count) or True, 1)
    behind.settle()
    assert order == list(range(20))


@pytest.mark.parametrize("here", [False, True])
def test_what_came_to_nothing_is_followed_by_nothing(here):
    behind, told = Behind(), []
    behind.do(lambda: False) if here else behind.start(lambda: False, 1)
    behind.after(lambda: told.append("never"))
    behind.settle()
    behind.after(lambda: told.append("nor later"))
    behind.do(lambda: True)
    assert told == []
    behind.after(lambda: told.append("now"))
    assert told == ["now"]


def test_what_it_raised_is_raised_once():
    behind, told = Behind(), []

    def work():
        raise MemoryError("no room")

    behind.start(work, 1)
    behind.after(lambda: told.append("never"))
    with pytest.raises(MemoryError, match="no room"):
        behind.settle()
    behind.settle()
    assert told == []


def test_a_wait_ends_and_the_work_still_counts_as_under_way():
    behind, go_on = Behind(), threading.Event()
    behind.start(lambda: go_on.wait(30), 1)
    with pytest.raises(TierUnavailable, match="not complete after 0 s"):
        behind.settle(0.0)
    assert behind.busy
    go_on.set()
    behind.settle()


def test_a_forked_process_has_a_thread_of_its_own():
    behind = Behind()
    behind.start(lambda: True, 1)
    behind.settle()
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:
        behind.start(lambda: os.write(write_end, b"!") == 1, 1)
        behind.settle()
        os._exit(0)
    os.close(write_end)
    with open(read_end, "rb") as file:
        assert file.read() == b"!"
    os.waitpid(child, 0)
