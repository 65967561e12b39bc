"""Beats in this process: what is sent after a crash in each window, by each kind of scheduler."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import django
import pytest
from celery import Celery
from celery.schedules import crontab
from celery.signals import beat_init
from django.conf import settings as django_settings

from celery_affinity import Affinity, AffinityQueue
from celery_affinity.beat import AffinityBeat, AffinityScheduler
from celery_affinity.embedded import Server
from celery_affinity.keys import Keys
from harness import wait_until

SECOND = 1_000_000
#: An entry whose runs are to be seen as soon as they are published.
ORDINARY: dict[str, Any] = {"task": "plain", "args": []}


class Died(BaseException):
    """Stands for the end of a process."""


def die(*args: object, **kwargs: object) -> None:
    raise Died


def tick(tag: str) -> None: ...


def plain() -> None: ...


class Beats:
    """Beats of one app, and what they have published."""

    def __init__(self, server: Server, cls: type[Any]) -> None:
        self.cls = cls
        self.app = Celery("shop", broker=server.url())
        self.app.conf.update(
            task_default_queue="plain", task_ignore_result=True, redbeat_redis_url=server.url()
        )
        self.affinity = Affinity(self.app, queues=[AffinityQueue("jobs")], leader_ttl=1.0)
        self.affinity.task(queue="jobs", tag_from="tag", name="tick")(tick)
        self.app.task(name="plain")(plain)
        self.app.set_current()
        self.client = server.client()
        self.keys = Keys("default")
        self.state = Keys.beat_state("shop")
        self.alive: list[Any] = []

    def schedule(self, **entries: Any) -> None:
        """Set the app's entries."""
        self.app.conf.beat_schedule = {
            name: {"task": "tick", "schedule": 1.0, "args": ["a"], **options}
            for name, options in entries.items()
        }

    def beat(self) -> Any:
        scheduler = self.cls(app=self.app)
        self.alive.append(scheduler)
        return scheduler

    def kill(self, scheduler: Any) -> None:
        """As if its process were gone, and its term over."""
        self.alive.remove(scheduler)
        self.client.delete(self.keys.queue(self.state, "leader"))
        self.affinity.stop_scheduling()

    def admitted(self) -> list[dict[str, Any]]:
        """Headers of what the ledger holds, in the order of admission."""
        held: Any = self.client.hgetall(self.keys.queue("jobs", "m"))
        return [json.loads(held[entry])["headers"] for entry in sorted(held, key=int)]

    def plain(self) -> list[dict[str, Any]]:
        """Headers of what waits in the ordinary queue, in the order of publishing."""
        found: Any = self.client.lrange("plain", 0, -1)
        return [json.loads(raw)["headers"] for raw in reversed(found)]

    def unsent(self) -> dict[str, int]:
        found: Any = self.client.hgetall(self.keys.queue(self.state, "unsent"))
        return {name.decode(): int(due) for name, due in found.items()}

    def record(self, name: str) -> tuple[int, str]:
        found: Any = self.client.hget(self.keys.queue(self.state, "runs"), name)
        due, mark = found.decode().split()
        return int(due), mark

    def age(self, name: str, seconds: float) -> int:
        """Have the last run of an entry been so many seconds ago; its due time then."""
        due = time.time_ns() // 1000 - int(seconds * SECOND)
        record = f"{due} {self.record(name)[1]}"
        self.client.hset(self.keys.queue(self.state, "runs"), name, record)
        return due


class Plain(AffinityScheduler):
    """Of Celery's own entries."""


def redbeat() -> type[Any]:
    from redbeat import RedBeatScheduler

    return type("OverRedBeat", (AffinityBeat, RedBeatScheduler), {})


def database(tmp_path: Path) -> type[Any]:
    if not django_settings.configured:
        django_settings.configure(
            INSTALLED_APPS=["django_celery_beat"], USE_TZ=True,
            DATABASES={"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:"}},
        )
        django.setup()
    from django.core.management import call_command

    call_command("migrate", verbosity=0)
    call_command("flush", verbosity=0, interactive=False)
    from django_celery_beat.schedulers import DatabaseScheduler

    return type("OverDatabase", (AffinityBeat, DatabaseScheduler), {})


KINDS = {"celery": lambda _: Plain, "redbeat": lambda _: redbeat(), "django": database}


@pytest.fixture
def beats(server: Server, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Beats]:
    made = Beats(server, KINDS[getattr(request, "param", "celery")](tmp_path))
    yield made
    for scheduler in made.alive:
        scheduler.close()


every_kind = pytest.mark.parametrize("beats", KINDS, indirect=True)


def tick_until(scheduler: Any, done: Callable[[], Any], timeout: float = 20.0) -> None:
    """As `celery beat` does, without its sleeps."""
    wait_until(lambda: (scheduler.tick(), done())[1], timeout)


def due(headers: dict[str, Any]) -> int:
    return round(datetime.fromisoformat(headers["affinity_due"]).timestamp() * SECOND)


def steps(found: list[dict[str, Any]]) -> set[int]:
    return {due(later) - due(earlier) for earlier, later in pairwise(found)}


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
