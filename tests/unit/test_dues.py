"""Laws of due times: each follows from the one before, in every process alike."""

from __future__ import annotations

import subprocess
import sys
from datetime import datetime, timedelta, timezone
from zoneinfo import ZoneInfo

import pytest
from celery import Celery
from celery.schedules import crontab, schedule
from hypothesis import given
from hypothesis import strategies as st

from celery_affinity import dues

APP = Celery("dues", set_as_current=False)
DAY = 86_400_000_000


def at(text: str) -> int:
    return dues.micros(datetime.fromisoformat(text).replace(tzinfo=timezone.utc))


def cron(*fields: str, zone: str = "UTC") -> crontab:
    app = Celery("zone", set_as_current=False)
    app.conf.timezone = zone
    return crontab(*fields, app=app)


@pytest.mark.parametrize("seconds", [0.1, 1, 1.5, 60, 86400])
def test_an_interval_is_due_exactly_one_interval_after_the_last(seconds: float) -> None:
    every = schedule(timedelta(seconds=seconds), app=APP)
    assert dues.after(every, at("2030-01-01")) == at("2030-01-01") + int(seconds * 1_000_000)


@pytest.mark.parametrize(
    ("fields", "zone", "last", "following"),
    [
        (("*",), "UTC", "2026-05-01T10:00:00", "2026-05-01T10:01:00"),
        (("*",), "UTC", "2026-05-01T10:00:59.999999", "2026-05-01T10:01:00"),
        (("0", "4"), "UTC", "2026-05-01T04:00:00", "2026-05-02T04:00:00"),
        (("0", "4"), "Europe/Berlin", "2026-05-01T02:00:00", "2026-05-02T02:00:00"),
        # Over the end of summer time: 25 hours.
        (("0", "4"), "Europe/Berlin", "2026-10-24T02:00:00", "2026-10-25T03:00:00"),
        (("0", "0", "*", "31"), "UTC", "2026-05-31T00:00:00", "2026-07-31T00:00:00"),
    ],
)
def test_a_crontab_is_due_at_its_next_moment_after_the_last(
    fields: tuple[str, ...], zone: str, last: str, following: str
) -> None:
    assert dues.after(cron(*fields, zone=zone), at(last)) == at(following)


@given(past=st.integers(0, 400 * DAY), seconds=st.integers(1, 10**6))
def test_the_latest_due_time_of_an_interval_is_the_one_that_stepping_finds(
    past: int, seconds: int
) -> None:
    every, until = schedule(timedelta(seconds=seconds), app=APP), at("2030-01-01")
    last = until - past
    found = dues.latest(every, last, until)
    assert (found is None) == (past < seconds * 1_000_000)
    if found is not None:
        assert found <= until < found + seconds * 1_000_000
        assert (found - last) % (seconds * 1_000_000) == 0


@pytest.mark.parametrize("fields", [("*",), ("*/7", "1-3"), ("0", "4"), ("0", "0", "1")])
@pytest.mark.parametrize("back", [timedelta(minutes=3), timedelta(days=2), timedelta(days=40)])
def test_the_latest_due_time_of_a_crontab_is_the_one_that_stepping_finds(
    fields: tuple[str, ...], back: timedelta
) -> None:
    when, until = cron(*fields), at("2026-05-05T13:37:11")
    last = until - back // timedelta(microseconds=1)
    stepped, expected = dues.after(when, last), None
    while stepped is not None and stepped <= until:
        expected, stepped = stepped, dues.after(when, stepped)
    assert dues.latest(when, last, until) == expected


def test_a_relative_interval_is_due_on_the_round_time() -> None:
    every = schedule(timedelta(minutes=10), relative=True, app=APP)
    assert dues.after(every, at("2026-05-01T10:00:17")) == at("2026-05-01T10:10:00")


def test_other_schedules_are_asked_with_a_stopped_clock() -> None:
    clocked = pytest.importorskip("django_celery_beat.clockedschedule").clocked
    single = clocked(datetime(2026, 5, 1, tzinfo=timezone.utc), app=APP)
    for last in ("2026-04-01", "2026-05-01"):
        assert dues.after(single, at(last)) == at("2026-05-01"), "no later one: the same"
    rrule = pytest.importorskip("redbeat.schedules").rrule
    two = rrule("DAILY", dtstart=datetime(2026, 5, 1, tzinfo=timezone.utc), count=2, app=APP)
    assert dues.after(two, at("2026-05-01")) == at("2026-05-02")
    assert dues.after(two, at("2026-05-02")) is None


def test_a_schedule_that_cannot_tell_yields_none() -> None:
    assert dues.after(schedule(timedelta(0), app=APP), 7) is None

    class Odd(schedule):
        def remaining_estimate(self, last_run_at: datetime) -> timedelta:
            raise NotImplementedError

    assert dues.after(Odd(timedelta(1), relative=True, app=APP), 7) is None


def test_a_mark_is_the_same_in_every_process_and_differs_with_the_schedule() -> None:
    marks = {
        dues.mark(one)
        for one in (
            schedule(timedelta(seconds=1), app=APP), schedule(timedelta(seconds=1.001), app=APP),
            schedule(timedelta(seconds=1), relative=True, app=APP), cron("1"), cron("2"),
            cron("1", zone="Asia/Tokyo"),
        )
    }
    assert len(marks) == 6
    code = (
        "from celery.schedules import crontab, schedule; from celery_affinity import dues\n"
        "print(dues.mark(schedule(1.0, nowfun=lambda: 0)), dues.mark(crontab('1')))"
    )
    said = {subprocess.check_output([sys.executable, "-c", code]) for _ in range(2)}
    assert len(said) == 1


def test_naive_times_are_utc_and_none_is_never() -> None:
    assert dues.micros(None) == 0
    assert dues.micros(datetime(2026, 5, 1)) == at("2026-05-01")
    assert dues.micros(datetime(2026, 5, 1, 2, tzinfo=ZoneInfo("Europe/Berlin"))) == at("2026-05-01")
    assert dues.micros(dues.moment(1_764_000_000_123_457)) == 1_764_000_000_123_457
