"""A newcomer hears what was agreed, now or when it exists, or a clear no."""

from __future__ import annotations

import msgspec

from resilient.core import minutes
from resilient.core.messages import Recall, Recorded, Unrecorded
from resilient.core.minutes import Minutes


def item(index, payload=b"x", rank=1):
    return Recorded(rank=rank, index=index, key="seed", payload=payload)


def test_answers_now_or_when_it_exists():
    book = Minutes()
    assert book.add(item(0)) == []
    assert book.ask("w", Recall(rank=1, index=0), open_end=False) == item(0)
    assert book.ask("w", Recall(rank=1, index=1), open_end=False) is None
    assert book.ask("v", Recall(rank=1, index=1), open_end=False) is None
    assert book.ask("u", Recall(rank=2, index=1), open_end=False) is None
    assert book.add(item(1)) == ["w", "v"]
    assert book.add(item(1)) == []


def test_where_the_minutes_end_the_successor_goes_on_itself():
    book = Minutes()
    book.add(item(0))
    book.add(item(1))
    assert book.ask("w", Recall(rank=1, index=0), open_end=True) == item(0), "the next one came: all have this one"
    assert book.ask("w", Recall(rank=1, index=1), open_end=True) == msgspec.structs.replace(item(1), last=True)
    assert book.ask("w", Recall(rank=1, index=2), open_end=True) == Unrecorded(index=2)
    assert not book.has(item(1, b"another"))
    assert book.add(item(1, b"another")) == [], "it was made again, and the newer one counts"
    assert book.ask("w", Recall(rank=1, index=1), open_end=False) == item(1, b"another")


def test_too_much_is_refused_for_that_rank_alone(monkeypatch):
    monkeypatch.setattr(minutes, "BYTES_MAX", 100)
    book = Minutes()
    book.add(item(0, b"x" * 50))
    assert book.add(item(1, b"x" * 50)) is None
    assert "rank 1" in book.ask("w", Recall(rank=1, index=0), open_end=False)
    assert book.add(item(0, rank=2)) == []
    book.clear()
    assert book.add(item(0)) == []


def test_too_many_are_refused(monkeypatch):
    monkeypatch.setattr(minutes, "COUNT_MAX", 2)
    book = Minutes()
    assert [book.add(item(i)) for i in range(3)] == [[], [], None]
