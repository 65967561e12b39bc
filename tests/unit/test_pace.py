"""Laws of rates: told from what the leader notes, of the last minute, and zero when nothing happens."""

from __future__ import annotations

from celery_affinity.ledger import pace_of

NOTES = ["0 10 100 1000", "30000 20 110 1300", "60000 30 120 1600"]


def test_a_rate_is_that_of_the_last_minute() -> None:
    assert pace_of(NOTES, 60_000) == (20 / 60, 10.0)
    assert pace_of(NOTES, 80_000) == (10 / 50, 6.0)


def test_nothing_in_a_minute_is_no_rate() -> None:
    assert pace_of(NOTES, 121_000) == (0.0, 0.0)
    assert pace_of([], 0) == pace_of(NOTES[:1], 0) == (0.0, 0.0)


def test_a_ledger_that_began_anew_has_no_negative_rate() -> None:
    assert pace_of([*NOTES, "61000 1 1 1"], 61_000) == (0.0, 0.0)
