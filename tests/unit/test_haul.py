"""How pieces are cut, and how many bytes a second a limit lets through."""

from __future__ import annotations

import pytest

from resilient.checkpoint.haul import PIECE_BYTES, RATE_MIN, Limit, piece_count, piece_of


@pytest.mark.parametrize(("num_bytes", "count"), [(0, 0), (1, 1), (PIECE_BYTES, 1), (PIECE_BYTES + 1, 2), (3 * PIECE_BYTES, 3)])
def test_pieces_cover_the_body_without_overlap(num_bytes, count):
    body = memoryview(bytearray(num_bytes))
    assert piece_count(num_bytes) == count
    assert [len(piece_of(body, i)) for i in range(count)] == [PIECE_BYTES] * (num_bytes // PIECE_BYTES) + [num_bytes % PIECE_BYTES] * (
        count - num_bytes // PIECE_BYTES
    )


def test_a_limit_is_kept_whoever_sends():
    now = [100.0]
    limit = Limit(RATE_MIN, clock=lambda: now[0])
    sent = 0
    for _ in range(40):
        now[0] += limit.take(RATE_MIN // 4)
        sent += RATE_MIN // 4
    assert sent / (now[0] - 100.0) == pytest.approx(RATE_MIN, rel=0.05)


def test_unused_time_is_not_saved_up():
    now = [100.0]
    limit = Limit(RATE_MIN, clock=lambda: now[0])
    limit.take(RATE_MIN)
    now[0] += 3600.0
    assert limit.take(RATE_MIN) == 0.0
    assert limit.take(RATE_MIN) == pytest.approx(1.0, abs=0.06)


def test_what_goes_at_once_is_taken_off_what_follows():
    limit = Limit(RATE_MIN, clock=lambda: 100.0)
    limit.take(3 * RATE_MIN)
    assert limit.take(1) == pytest.approx(3.0, abs=0.06)
