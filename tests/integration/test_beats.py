"""Beats in this process: what is sent after a crash in each window, by each kind of scheduler."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from celery.schedules import crontab
from celery.signals import beat_init

from celery_affinity.embedded import Server
from harness import wait_until
from integration.beats import (
    KINDS,
    ORDINARY,
    SECOND,
    Beats,
    Died,
    die,
    due,
    redbeat,
    steps,
    tick_until,
)


@pytest.fixture
def beats(server: Server, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Beats]:
    made = Beats(server, KINDS[getattr(request, "param", "celery")](tmp_path))
    yield made
    for scheduler in made.alive:
        scheduler.close()


every_kind = pytest.mark.parametrize("beats", KINDS, indirect=True)


@pytest.mark.proves(
    "7: a beat dies between its claim of a run and the publish",
    "the next one publishes it",
)
@every_kind
@pytest.mark.parametrize("task", ["tick", "plain"])
def test_a_beat_that_died_between_claim_and_publish_has_its_entry_published_by_the_next(
    beats: Beats, task: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    beats.schedule(each={"task": task, "args": ["a"] if task == "tick" else []})
    first = beats.beat()
    monkeypatch.setattr(first, "apply_async", die)
    with pytest.raises(Died):
        tick_until(first, lambda: False)
    claimed = beats.unsent()["each"]
    assert beats.admitted() == beats.plain() == []
    beats.kill(first)

    second = beats.beat()
    published = beats.admitted if task == "tick" else beats.plain
    tick_until(second, lambda: len(published()) >= 3)
    assert due(published()[0]) == claimed
    assert steps(published()) == {SECOND}
    assert beats.unsent() == {}


@pytest.mark.proves(
    "7: a beat dies between the publish of a run and its confirmation",
    "the run is admitted once",
)
@every_kind
def test_a_run_that_was_published_and_not_confirmed_is_admitted_once(
    beats: Beats, monkeypatch: pytest.MonkeyPatch
) -> None:
    beats.schedule(each={})
    first = beats.beat()
    monkeypatch.setattr(first._runs, "confirm", die)
    with pytest.raises(Died):
        tick_until(first, lambda: False)
    wait_until(lambda: len(beats.admitted()) == 1)
    assert beats.unsent() == {"each": due(beats.admitted()[0])}
    beats.kill(first)

    second = beats.beat()
    tick_until(second, lambda: len(beats.admitted()) >= 3)
    assert steps(beats.admitted()) == {SECOND}
    strays: Any = beats.client.hget(beats.keys.queue("jobs", "c"), "strays")
    assert strays == b"1", "it was published again, and dropped"


def test_on_an_ordinary_queue_such_a_run_is_there_twice_with_one_id(
    beats: Beats, monkeypatch: pytest.MonkeyPatch
) -> None:
    beats.schedule(each={"task": "plain", "args": []})
    first = beats.beat()
    monkeypatch.setattr(first._runs, "confirm", die)
    with pytest.raises(Died):
        tick_until(first, lambda: False)
    beats.kill(first)
    tick_until(beats.beat(), lambda: len(beats.plain()) >= 3)
    ids = [headers["id"] for headers in beats.plain()]
    assert ids[0] == ids[1] != ids[2]


@pytest.mark.parametrize("beats", ["redbeat", "django"], indirect=True)
def test_a_store_that_missed_a_run_follows_the_record(
    beats: Beats, monkeypatch: pytest.MonkeyPatch
) -> None:
    once = "Database" in beats.cls.__name__
    if once:
        from django_celery_beat.models import IntervalSchedule, PeriodicTask

        second = IntervalSchedule.objects.create(every=1, period=IntervalSchedule.SECONDS)
        # Runs once, as its count says.
        PeriodicTask.objects.create(
            name="each", task="plain", interval=second, one_off=True, expire_seconds=600
        )
    else:
        beats.schedule(each=ORDINARY)
    first = beats.beat()
    monkeypatch.setattr(first, "_advanced", die)
    with pytest.raises(Died):
        tick_until(first, lambda: False)
    assert beats.unsent() == {}
    beats.kill(first)

    second = beats.beat()
    advanced = []
    stock = second.reserve
    monkeypatch.setattr(second, "reserve", lambda entry: advanced.append(entry) or stock(entry))
    tick_until(second, lambda: advanced)
    until = time.monotonic() + 1.5  # longer than the interval
    tick_until(second, lambda: time.monotonic() > until)
    assert len(advanced) == len(beats.plain()), "as often as it ran, under whichever beat"
    assert (len(advanced) == 1) == once


@every_kind
def test_what_fell_due_over_a_failover_is_sent_all(beats: Beats) -> None:
    beats.schedule(each=ORDINARY)
    first = beats.beat()
    tick_until(first, beats.plain)
    beats.kill(first)
    seen, last = len(beats.plain()), beats.age("each", 5.5)
    tick_until(beats.beat(), lambda: len(beats.plain()) >= seen + 6)
    assert [due(headers) - last for headers in beats.plain()[seen : seen + 6]] == [
        n * SECOND for n in range(1, 7)
    ]


@every_kind
def test_what_fell_due_over_a_long_outage_becomes_one_run(beats: Beats) -> None:
    beats.schedule(each=ORDINARY)
    first = beats.beat()
    tick_until(first, beats.plain)
    beats.kill(first)
    seen, last = len(beats.plain()), beats.age("each", 3600.5)
    tick_until(beats.beat(), lambda: len(beats.plain()) >= seen + 3)
    late = beats.plain()[seen:]
    assert (due(late[0]) - last) % SECOND == 0, "the intervals do not shift"
    assert due(late[0]) - last >= 3600 * SECOND
    assert steps(late) == {SECOND}


@every_kind
def test_a_missed_crontab_moment_is_sent_with_its_own_due_time(beats: Beats) -> None:
    beats.schedule(each={"schedule": crontab()})
    first = beats.beat()
    tick_until(first, lambda: "each" in first._runs.names)
    beats.kill(first)
    beats.age("each", 3 * 3600)
    second = beats.beat()
    tick_until(second, lambda: beats.admitted())
    for _ in range(3):
        second.tick()
    wait_until(lambda: beats.client.llen("jobs") == 0)
    found = [due(headers) for headers in beats.admitted()]
    assert {moment % (60 * SECOND) for moment in found} == {0}
    assert found[0] > time.time_ns() // 1000 - 70 * SECOND
    assert len(found) == 1 or found[1] - found[0] == 60 * SECOND, "the minute may have passed"


@every_kind
def test_a_changed_schedule_counts_from_now(beats: Beats) -> None:
    beats.schedule(each={"schedule": 200.0})
    first = beats.beat()
    tick_until(first, lambda: "each" in first._runs.names)
    beats.kill(first)
    beats.age("each", 8)
    changed = time.time_ns() // 1000
    beats.schedule(each={"schedule": 1.0})
    tick_until(beats.beat(), lambda: len(beats.admitted()) >= 2)
    assert due(beats.admitted()[0]) >= changed + SECOND
    assert steps(beats.admitted()) == {SECOND}


def test_a_beat_that_is_not_elected_sends_nothing_and_skips_nothing(beats: Beats) -> None:
    beats.schedule(each=ORDINARY)
    first = beats.beat()
    tick_until(first, beats.plain)
    second = beats.beat()
    second.max_interval = 0.01  # it would wait for the term's end
    until = len(beats.plain()) + 2

    def stand_by() -> bool:
        if first._elector.leading:
            second.tick()
        assert second._elector.term is None
        return len(beats.plain()) >= until

    tick_until(first, stand_by)
    beats.kill(first)
    until = len(beats.plain()) + 2
    tick_until(second, lambda: len(beats.plain()) >= until)
    assert steps(beats.plain()) == {SECOND}


def test_redbeats_own_lock_does_not_keep_a_second_beat_from_standing_by(server: Server) -> None:
    beats = Beats(server, redbeat())
    beats.schedule(each={})
    service = type("Service", (), {})()
    for _ in range(2):
        service.scheduler = beats.beat()
        beat_init.send(sender=service)
        assert service.scheduler.lock is None
    for scheduler in beats.alive:
        scheduler.close()


def test_celerys_own_entry_is_kept_beside_the_apps(beats: Beats) -> None:
    beats.schedule(each={})
    assert set(beats.beat().schedule) == {"each", "celery.backend_cleanup"}


def test_a_schedule_that_cannot_be_asked_does_not_stop_the_others(beats: Beats) -> None:
    class Broken(crontab):
        def is_due(self, last_run_at: datetime) -> Any:
            raise RuntimeError("broken")

    beats.schedule(broken={"schedule": Broken()}, each={})
    tick_until(beats.beat(), lambda: len(beats.admitted()) >= 2)
    assert steps(beats.admitted()) == {SECOND}


def test_a_run_whose_broker_does_not_answer_is_sent_later(
    beats: Beats, monkeypatch: pytest.MonkeyPatch
) -> None:
    beats.schedule(each={})
    beat = beats.beat()
    stock = beat.app.tasks["tick"].apply_async

    def fail(*args: Any, **kwargs: Any) -> None:
        raise ConnectionRefusedError("no broker")

    monkeypatch.setattr(beat.app.tasks["tick"], "apply_async", fail)
    tick_until(beat, lambda: beats.unsent())
    claimed = beats.unsent()["each"]
    monkeypatch.setattr(beat.app.tasks["tick"], "apply_async", stock)
    tick_until(beat, lambda: len(beats.admitted()) >= 2)
    assert due(beats.admitted()[0]) == claimed
    assert steps(beats.admitted()) == {SECOND}


@pytest.mark.parametrize("times", [1, 2])
def test_a_beat_that_is_asked_to_stop_finishes_the_run_that_it_publishes(
    beats: Beats, monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    beats.schedule(each=ORDINARY)
    beat = beats.beat()
    task = beats.app.tasks["plain"]
    stock = task.apply_async

    def asked_while_it_publishes(*args: Any, **options: Any) -> Any:
        for _ in range(times):
            signal.raise_signal(signal.SIGTERM)
        return stock(*args, **options)

    def stop(*_: object) -> None:  # as Celery's handler does
        beat.close()
        raise SystemExit

    monkeypatch.setattr(task, "apply_async", asked_while_it_publishes)
    before = signal.signal(signal.SIGTERM, stop)
    try:
        with pytest.raises(SystemExit):
            tick_until(beat, lambda: False)
        assert signal.getsignal(signal.SIGTERM) is stop
    finally:
        signal.signal(signal.SIGTERM, before)
    finished = times == 1  # who asks twice does not want to wait
    assert (len(beats.plain()), "each" in beats.unsent()) == (int(finished), not finished)
    assert beats.client.get(beats.keys.queue(beats.state, "leader")) is None


def test_a_beat_ends_although_the_exit_that_it_was_asked_for_was_lost(beats: Beats) -> None:
    """Celery's handler raises SystemExit wherever it strikes; in a __del__ Python ignores that."""
    beats.schedule(each=ORDINARY)
    beat = beats.beat()
    beat.tick()
    beat.close()
    with pytest.raises(SystemExit):
        beat.tick()
    assert not beats.plain()
