"""Whoever waits for the result of a buried task is told: by whichever leader, at least once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import pytest
from billiard.exceptions import WorkerLostError
from celery.worker import state as worker_state
from redis.exceptions import ConnectionError as RedisConnectionError

from celery_affinity.burials import Burials
from celery_affinity.reporter import Reporter
from celery_affinity.request import DispatchedRequest
from celery_affinity.watchdog import Lifeline

from .conftest import Bench, Copy


class Backend:
    """Remembers what it was told; out of reach at first, if so wanted."""

    def __init__(self, failures: int = 0) -> None:
        self.told: list[tuple[Any, str]] = []
        self._failures = failures

    def __call__(self, message: Mapping[str, Any], reason: str) -> None:
        if self._failures:
            self._failures -= 1
            raise ConnectionError("the result backend is away")
        headers = message.get("headers")
        self.told.append((headers["id"] if isinstance(headers, dict) else None, reason))


def bury(bench: Bench, *tags: object) -> None:
    for tag in tags:
        bench.send(tag, "one")
    bench.admit_all()


def test_whoever_waits_for_a_buried_message_is_told_once(bench: Bench) -> None:
    bench.lead()
    backend = Backend()
    burials = Burials(bench.scripts, "q", backend)
    bury(bench, 1.5)
    bench.push(b'{"headers": null}')
    bench.push(b"\xff\xfe no message at all")
    bench.admit_all()
    assert bench.promote()[2] == 3
    burials.run(bench.fence)
    burials.run(bench.fence)
    assert [task_id for task_id, _ in backend.told] == ["1.5-one", None, None]
    assert "found float 1.5" in backend.told[0][1]
    assert bench.promote()[2] == 0
    assert len(bench.dead()) == 3, "the message is kept"


def test_a_burial_that_could_not_be_told_is_told_later_and_holds_up_nobody(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.lead()
    backend = Backend(failures=1)  # of the first one's errback, maybe
    burials = Burials(bench.scripts, "q", backend)
    bury(bench, 1.5, 2.5)
    burials.run(bench.fence)
    burials.start(bench.fence)
    assert burials._thread is None and backend.told == [], "not before its pause is over"
    monkeypatch.setattr(burials, "_not_before", 0.0)
    burials.start(bench.fence)
    burials._thread.join()
    assert [task_id for task_id, _ in backend.told] == ["2.5-one", "1.5-one"]


@pytest.mark.proves(
    "7: a leader dies while it tells of a burial",
    "the next one tells of it",
)
def test_a_burial_is_told_by_the_next_leader_if_the_first_died_over_it(bench: Bench) -> None:
    bench.lead(candidate="first/1")
    bury(bench, 1.5)
    assert len(bench.scripts.untold("q", 10)) == 1  # and here the first leader dies
    old = bench.fence
    bench.scripts.resign("q", old)
    bench.lead(candidate="second/1")
    backend = Backend()
    Burials(bench.scripts, "q", backend).run(bench.fence)
    assert [task_id for task_id, _ in backend.told] == ["1.5-one"]
    assert bench.scripts.untold("q", 10) == []


def test_a_superseded_leader_strikes_no_note_off(bench: Bench) -> None:
    bench.lead(candidate="first/1")
    old = bench.fence
    bury(bench, 1.5)
    bench.scripts.resign("q", old)
    bench.lead(candidate="second/1")
    Burials(bench.scripts, "q", Backend()).run(old)
    assert len(bench.scripts.untold("q", 10)) == 1


# A worker's parent buries, and tells of it itself


class Stock:
    """Celery's request. Stores the failure, if its result backend is there."""

    id, name, worker_pid = "id", "task", 1
    task = SimpleNamespace()
    away = False
    _already_cancelled = _already_revoked = False

    def on_failure(self, *_: Any) -> None:
        if self.away:
            raise ConnectionError("the result backend is away")
        self.told += 1  # type: ignore[attr-defined]


@pytest.fixture
def parent_of(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """The request of a copy, in its parent."""
    monkeypatch.setattr(worker_state, "task_ready", lambda request: None)

    def make(copy: Copy, scripts: Any = None, **attributes: Any) -> Any:
        reporter = Reporter(lambda: scripts or bench.scripts, "n", dict, 60.0, Lifeline())
        ends = {"affinity_ends": reporter, "affinity_in_process": False, **attributes}
        kind: Any = type("Request", (DispatchedRequest, Stock), ends)
        request = kind.__new__(kind)
        request.affinity_stamp = copy.stamp
        request.told = 0
        return request

    return make


def lose(request: Any) -> None:
    """Its process is gone."""
    request.on_failure(SimpleNamespace(exception=WorkerLostError("killed")))


def last_delivery(bench: Bench) -> Copy:
    copy = bench.opening(1, deliveries=1).take()
    copy.start()
    return copy


def too_late(bench: Bench) -> None:
    """The worker has had its time to tell."""
    telling = bench.queue_key("telling")
    for entry in bench.client.zrange(telling, 0, -1):
        assert 25_000 < bench.client.zscore(telling, entry) - bench.now_ms() <= 30_000
        bench.client.zadd(telling, {entry: bench.now_ms() - 1})


def told_by_the_leader(bench: Bench) -> int:
    backend = Backend()
    bench.promote()
    Burials(bench.scripts, "q", backend).run(bench.fence)
    return len(backend.told)


def unknown(bench: Bench) -> None:
    assert bench.opening(1).take().discard("unknown", "t") == 1


def lost(bench: Bench) -> None:
    assert last_delivery(bench).lost() == "buried"


@pytest.mark.parametrize("buried", [lost, unknown])
def test_a_burial_by_a_parent_that_dies_before_it_has_told_is_told_by_the_leader(
    bench: Bench, buried: Callable[[Bench], None]
) -> None:
    buried(bench)
    assert bench.promote()[2] == 0 == told_by_the_leader(bench), "the parent is about to"
    too_late(bench)
    assert bench.promote()[2] == 1 == told_by_the_leader(bench)
    assert bench.promote()[2] == 0 == told_by_the_leader(bench)


def test_what_a_parent_has_told_the_leader_does_not_tell_again(
    bench: Bench, parent_of: Callable[..., Any]
) -> None:
    request = parent_of(last_delivery(bench))
    lose(request)
    assert request.told == 1
    too_late(bench)
    assert told_by_the_leader(bench) == 0


@pytest.mark.parametrize("why", ["away", "_already_cancelled"])
def test_what_a_parent_could_not_tell_or_did_not_the_leader_tells(
    bench: Bench, parent_of: Callable[..., Any], why: str
) -> None:
    request = parent_of(last_delivery(bench), **{why: True})
    try:
        lose(request)
    except ConnectionError:
        assert why == "away"
    too_late(bench)
    assert told_by_the_leader(bench) == 1


def test_a_parent_that_cannot_say_that_it_has_told_says_so_when_redis_is_back(
    bench: Bench, parent_of: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(*_: Any) -> bool:
        raise RedisConnectionError("away")

    request = parent_of(last_delivery(bench))
    with monkeypatch.context() as patch:
        patch.setattr(bench.scripts, "known", away)
        lose(request)
        assert request.told == 1, "Redis is away for the ledger only"
    request.affinity_ends._unanswered.again(bench.scripts)
    too_late(bench)
    assert told_by_the_leader(bench) == 0


@pytest.mark.parametrize("first", ["leader", "parent"])
def test_a_burial_that_the_slots_next_process_caused_is_told_once(
    bench: Bench, parent_of: Callable[..., Any], first: str
) -> None:
    """That one may be up before the parent has asked what became of the task."""
    copy = last_delivery(bench)
    bench.scripts.process_up("n", 0)
    told = told_by_the_leader(bench) if first == "leader" else 0
    request = parent_of(copy)
    lose(request)
    too_late(bench)
    assert (told, request.told, told_by_the_leader(bench)) == (
        (1, 0, 0) if first == "leader" else (0, 1, 0)
    )


def test_a_dead_letter_is_not_purged_while_its_parent_is_about_to_tell(bench: Bench) -> None:
    copy = last_delivery(bench)
    assert copy.lost() == "buried"
    entry = int(copy.stamp.entry)
    assert bench.scripts.purge("q", "one", [entry]) == 0
    assert bench.scripts.known("q", str(entry))
    assert not bench.scripts.known("q", str(entry)), "a repeat"
    assert bench.scripts.purge("q", "two", [entry]) == 1


def test_a_dead_letter_that_runs_again_is_not_told_as_failed(bench: Bench) -> None:
    copy = last_delivery(bench)
    assert copy.lost() == "buried"
    assert bench.scripts.requeue("q", "token", [int(copy.stamp.entry)])[0] == 1
    assert not bench.client.exists(bench.queue_key("telling"))
    assert told_by_the_leader(bench) == 0
