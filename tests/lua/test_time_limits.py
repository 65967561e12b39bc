"""A hard time limit has one outcome: the task has failed, or it runs again and nobody hears of it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from billiard.exceptions import TimeLimitExceeded
from celery.worker import state as worker_state
from redis.exceptions import ConnectionError as RedisConnectionError

from celery_affinity.embedded import Server
from celery_affinity.reporter import Reporter
from celery_affinity.request import DispatchedRequest
from celery_affinity.watchdog import Lifeline
from harness import wait_until

from .conftest import Bench, Copy, Node


class Away:
    """Scripts on a ledger that does not answer to `finish`; or whose answer is lost."""

    def __init__(self, scripts: Any) -> None:
        self._scripts = scripts
        self.away: str = "asked"

    def __getattr__(self, name: str) -> Any:
        return getattr(self._scripts, name)

    def finish(self, *arguments: Any) -> int:
        if self.away == "asked":
            raise RedisConnectionError("away")
        answer = self._scripts.finish(*arguments)
        if self.away == "answered":
            raise RedisConnectionError("the answer is lost")
        return int(answer)


class Stock:
    """Celery's request."""

    id, name, worker_pid = "id", "task", 2**22 + 1  # no process has that one
    task = SimpleNamespace()
    _already_cancelled = _already_revoked = False

    def on_failure(self, *_: Any) -> None:
        self.told.append("failure")  # type: ignore[attr-defined]

    def on_timeout(self, *_: Any) -> None:
        self.told.append("limit")  # type: ignore[attr-defined]


@pytest.fixture
def over(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """The request of a copy, after its time limit struck."""
    monkeypatch.setattr(worker_state, "task_ready", lambda request: None)

    def strike(copy: Copy, scripts: Any = None, in_process: bool = False) -> Any:
        reporter = Reporter(lambda: scripts or bench.scripts, "n", dict, 60.0, Lifeline())
        ends = {"affinity_ends": reporter, "affinity_in_process": in_process}
        request: Any = type("Request", (DispatchedRequest, Stock), ends)
        request = request.__new__(request)
        request.affinity_stamp = copy.stamp
        request.told = []
        reporter.held.arrived(copy.stamp, request)
        if not in_process:
            request.on_failure(SimpleNamespace(exception=TimeLimitExceeded(1)))
        request.on_timeout(False, 1)
        return request

    return strike


def started(bench: Bench, *ids: int) -> tuple[Node, Copy]:
    """A node, and the message of a tag's first task, which runs there."""
    node = bench.opening(*ids)
    copy = node.take()
    assert copy.start() == 1
    return node, copy


@pytest.mark.parametrize("in_process", [False, True])
def test_a_hard_limit_is_told_and_its_task_runs_no_more(
    bench: Bench, over: Callable[..., Any], in_process: bool
) -> None:
    node, copy = started(bench, 1, 2)
    request = over(copy, in_process=in_process)
    bench.scripts.process_up("n", 0)
    assert request.told == (["limit"] if in_process else ["failure", "limit"])
    assert request.affinity_ends.held.names() == []
    assert node.drain_all() == ["a-2"]


@pytest.mark.parametrize("in_process", [False, True])
def test_a_hard_limit_that_strikes_before_the_start_is_not_told_and_the_task_runs(
    bench: Bench, over: Callable[..., Any], in_process: bool
) -> None:
    """The gate waits for Redis, or for a late heartbeat, for longer than the limit."""
    node = bench.opening(1, 2)
    request = over(node.take(), in_process=in_process)
    assert request.told == []
    assert request.affinity_ends.held.names() == [], "the heartbeat has it sent again"
    node.beat(1)
    assert node.drain_all() == ["a-1", "a-2"]


def test_a_hard_limit_of_a_task_whose_lease_was_taken_away_is_not_told(
    bench: Bench, over: Callable[..., Any]
) -> None:
    _, copy = started(bench, 1)
    bench.overdue("n")
    wait_until(lambda: bench.scripts.rescue("q", bench.fence, 10)[0] == 1, what="the rescue")
    assert over(copy).told == []
    assert bench.node("other").drain_all() == ["a-1"]


@pytest.mark.parametrize("where", ["asked", "answered"])
def test_a_hard_limit_while_redis_is_away_is_told_once_the_ledger_has_answered(
    bench: Bench, over: Callable[..., Any], where: str
) -> None:
    node, copy = started(bench, 1, 2)
    scripts = Away(bench.scripts)
    scripts.away = where
    request = over(copy, scripts)
    reporter = request.affinity_ends
    assert request.told == [], "nobody knows yet whether it runs again"
    assert reporter.held.names() == [copy.stamp.held], "no heartbeat gives it back meanwhile"
    scripts.away = ""
    reporter._unanswered.again(scripts)
    wait_until(lambda: request.told == ["failure", "limit"], what="the telling")
    wait_until(lambda: reporter.held.names() == [], what="the end")
    bench.scripts.process_up("n", 0)
    assert node.drain_all() == ["a-2"]


def test_a_task_over_its_limit_that_was_given_back_meanwhile_is_not_told_as_failed(
    bench: Bench, over: Callable[..., Any]
) -> None:
    """The slot's next process reaches the ledger before the heartbeat does."""
    node, copy = started(bench, 1)
    scripts = Away(bench.scripts)
    request = over(copy, scripts)
    bench.scripts.process_up("n", 0)
    scripts.away = ""
    request.affinity_ends._unanswered.again(scripts)
    assert node.drain_all() == ["a-1"]
    assert request.told == []


def settled_by_its_successor(bench: Bench) -> None:
    bench.scripts.process_up("n", 0)


def settled_by_a_rescue(bench: Bench) -> None:
    bench.overdue("n")
    wait_until(lambda: bench.scripts.rescue("q", bench.fence, 10)[0] == 1, what="the rescue")


@pytest.mark.parametrize("settled", [settled_by_its_successor, settled_by_a_rescue])
def test_a_hard_limit_whose_answer_was_lost_is_told_all_the_same(
    bench: Bench, over: Callable[..., Any], settled: Callable[[Bench], None]
) -> None:
    node, copy = started(bench, 1)
    scripts = Away(bench.scripts)
    scripts.away = "answered"
    request = over(copy, scripts)
    settled(bench)
    assert bench.backlog("a") == [] and node.receive() is None, "its entry has ended"
    scripts.away = ""
    request.affinity_ends._unanswered.again(scripts)
    wait_until(lambda: request.told == ["failure", "limit"], what="the telling")


def test_a_worker_that_stops_asks_once_more_what_becomes_of_a_task_over_its_limit(
    bench: Bench, over: Callable[..., Any]
) -> None:
    _, copy = started(bench, 1)
    scripts = Away(bench.scripts)
    request = over(copy, scripts)
    scripts.away = ""
    request.affinity_ends.leave()
    wait_until(lambda: request.told == ["failure", "limit"], what="the telling, for which the interpreter's end waits")
    assert bench.node("other").receive() is None


def test_a_call_of_several_tasks_over_its_limit_is_not_told(
    bench: Bench, over: Callable[..., Any]
) -> None:
    node, copy = started(bench, 1, 2)
    fence = copy.stamp.incarnation, copy.stamp.slot, copy.stamp.entry, copy.stamp.epoch
    assert bench.scripts.take(*fence, copy.token, 0, "t", 10_000)[1]
    assert over(copy).told == []
    bench.scripts.process_up("n", 0)
    assert node.drain_all() == ["a-1", "a-2"]


@pytest.mark.parametrize("in_process", [False, True])
def test_a_telling_that_fails_ends_neither_the_worker_nor_the_hold_on_its_task(
    bench: Bench, over: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, in_process: bool
) -> None:
    """Celery's result backend is away, which may be a Redis, too."""

    def fails(*_: Any) -> None:
        raise RedisConnectionError("the result backend")

    for name in ("on_failure", "on_timeout"):
        monkeypatch.setattr(Stock, name, fails)
    _, copy = started(bench, 1)
    request = over(copy, in_process=in_process)
    reporter = request.affinity_ends
    assert reporter.held.names() == []
    reporter.leave()
    assert not bench.client.exists(bench.scripts.keys.worker("n", "info")), "it has left"


GEVENT = """
from gevent import monkey; monkey.patch_all()
import sys, threading
from types import SimpleNamespace
import gevent, redis
from celery_affinity.internals import native_thread
from celery_affinity.limits import HardLimit
client = redis.Redis.from_url(sys.argv[1])
client.ping()
answer, told = [], []
ends = SimpleNamespace(past_limit=lambda stamp, answered: answer.append(answered), process_lost=lambda stamp: None)
request = SimpleNamespace(
    affinity_ends=ends, affinity_stamp=None, affinity_in_process=True, _stops=lambda: None,
    _vanish=lambda: told.append("gone"), name="task", id="id",
)
HardLimit(request).tell(lambda: told.append(client.blpop("nothing", 0.05)))
native_thread(lambda: answer[0](1), "the heartbeat's")
gevent.sleep(1)
print(told)
"""


def test_on_gevent_an_answer_that_came_late_is_told_where_its_connections_are(shared_server: Server) -> None:
    """The heartbeat's thread has a hub of its own: "cannot switch to a different thread"."""
    done = subprocess.run(
        [sys.executable, "-c", GEVENT, shared_server.url()], capture_output=True, text=True, timeout=60
    )
    assert done.stdout.strip() == "[None, 'gone']", done.stdout + done.stderr
