"""A pytest plugin for apps with affinity tasks: see docs/howto_testing.md.

Three ways, from the quickest to the most honest: `lease` calls a task's function under a context,
`affinity_eager` has tasks run where they are sent, and `affinity_worker` is a real worker (in a
thread of the test's process, so that what the test patches is patched for its tasks too) on a real
server. `affinity_history` writes down what all tasks do, and judges it (history.py).

The plugin is found by pytest itself once the library is installed. What it needs is imported when
a fixture is first used.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from celery_affinity import context
from celery_affinity.context import AffinityContext
from celery_affinity.exceptions import ConfigurationError
from celery_affinity.history import History, record
from celery_affinity.message import TAG_HEADER, tag_text

if TYPE_CHECKING:
    from celery import Celery

__all__ = ("AffinityWorker", "TaskHistory", "lease", "running_worker")

#: Seconds that `wait_until_idle` waits unless told otherwise.
IDLE_SECONDS = 30.0
POLL_SECONDS = 0.02
#: Seconds for tasks that run when a test is over.
END_SECONDS = 10.0
#: Concurrency of the worker: enough for several tags at once.
SLOTS = 4


@contextmanager
def lease(tag: object, queue: str = "", **fields: Any) -> Iterator[AffinityContext]:
    """Let `current()` and `self.affinity` say that this code runs under a lease.

    For calls of a task's function itself. Nothing is held.

    Arguments:
        tag: As for `apply_async`.
        queue: Name of the affinity queue.
        fields: Other fields of `AffinityContext`, such as ``epoch`` or ``attempt``.
    """
    values: dict[str, Any] = {
        "epoch": 1, "place": 1, "attempt": 1, "worker": "test", "slot": 0, "entry": 1, **fields,
    }  # fmt: skip
    made = AffinityContext(tag_text(tag), queue=queue, **values)
    token = context.enter(made)
    try:
        yield made
    finally:
        context.leave(token)


class AffinityWorker:
    """A running worker of all the app's queues, as a test sees it."""

    def __init__(self, app: Celery, controller: Any) -> None:
        self.app = app
        #: The app's `Affinity`.
        self.affinity: Any = app.celery_affinity  # type: ignore[attr-defined]
        #: Celery's worker.
        self.controller = controller

    @property
    def name(self) -> str:
        """The node's name."""
        return str(self.controller.hostname)

    def wait_until_idle(self, timeout: float = IDLE_SECONDS) -> None:
        """Wait until nothing waits, runs or is due later, in any affinity queue.

        Raises:
            AssertionError: After `timeout` seconds, saying what is left.
        """
        deadline = time.monotonic() + timeout
        while left := self._left():
            if time.monotonic() > deadline:
                raise AssertionError(f"after {timeout:g} s there is work left: {', '.join(left)}")
            time.sleep(POLL_SECONDS)

    def _left(self) -> list[str]:
        found = [self.affinity.stats(name) for name in self.affinity.settings.queue_names]
        return [
            f"{s.queue!r} has {s.pending} pending, {s.entries} entries ({s.scheduled} due later), "
            f"{s.halted_tags} halted tags"
            for s in found
            if s.pending or s.entries
        ]


@contextmanager
def running_worker(app: Celery, concurrency: int = SLOTS) -> Iterator[AffinityWorker]:
    """A worker of the app in a thread of this process, with Celery's "threads" pool.

    At its end what waits is given back, and what runs has 10 s.

    Arguments:
        concurrency: Its slots.

    Raises:
        ConfigurationError: If the app has no `Affinity`, or the worker cannot start.
        RuntimeError: If a task does not end.
    """
    from celery.contrib.testing.worker import start_worker

    affinity = getattr(app, "celery_affinity", None)
    if affinity is None:
        raise ConfigurationError(
            "found no Affinity(app) in this app: add affinity = Affinity(app, queues=[...])"
        )
    names = affinity.settings.queue_names
    worker: Any = start_worker(
        app,
        pool="threads",
        concurrency=concurrency,
        perform_ping_check=False,
        loglevel=logging.getLevelName(logging.WARNING),
        queues=[*names, app.conf.task_default_queue],
    )
    with worker as controller:
        try:
            yield AffinityWorker(app, controller)
        finally:
            _finish(affinity)


def _finish(affinity: Any) -> None:
    """Take no more tasks, and let those that run end: Celery's test worker does not wait."""
    from celery.worker import state

    affinity.node.reporter.drain()
    deadline = time.monotonic() + END_SECONDS
    while state.active_requests:
        if time.monotonic() > deadline:
            names = sorted({str(request.name) for request in state.active_requests})
            raise RuntimeError(
                f"{END_SECONDS:g} s after the test's end there still run {', '.join(names)}: "
                "they cannot be stopped in a thread, and go on beside the next tests"
            )
        time.sleep(POLL_SECONDS)


class TaskHistory:
    """What the tasks of this process do, from its making on, in a file that the judge reads.

    A task is known by its tag and its number: the how many-th of its tag was sent.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._numbers: dict[str, tuple[str, int]] = {}
        self._counts: dict[str, int] = {}
        self._stack = ExitStack()

    @property
    def history(self) -> History:
        """All that has happened so far."""
        return History.load(self.path)

    def assert_lawful(self, **options: Any) -> None:
        """Fail if a task was lost, ran twice, beside another of its tag, or in the wrong order.

        Arguments:
            options: Those of `History.violations`, such as ``concurrency``.
        """
        self.history.assert_lawful(**{"lease_within": "worker", **options})

    def connect(self) -> None:
        """Listen to Celery's signals."""
        from celery import signals

        for signal, receiver in (
            (signals.before_task_publish, self._sent),
            (signals.task_prerun, self._started),
            (signals.task_postrun, self._ended),
        ):
            signal.connect(receiver, weak=False)
            self._stack.callback(signal.disconnect, receiver)

    def close(self) -> None:
        """Listen no more."""
        self._stack.close()

    def _sent(self, headers: Mapping[str, Any] | None = None, **_: Any) -> None:
        tag, task_id = (headers or {}).get(TAG_HEADER), (headers or {}).get("id")
        if tag is None or task_id is None or task_id in self._numbers:
            return  # no affinity task, or a retry
        tag = str(tag)
        number = self._counts[tag] = self._counts.get(tag, 0) + 1
        self._numbers[task_id] = tag, number
        record("submit", path=self.path, tag=tag, seq=number)

    def _started(self, task_id: str, task: Any, **_: Any) -> None:
        self._record("start", task_id, task)

    def _ended(self, task_id: str, task: Any, state: str | None = None, **_: Any) -> None:
        outcome = {"SUCCESS": "ok", "RETRY": "retry", "FAILURE": "failed"}.get(
            str(state), "aborted"
        )
        self._record("end", task_id, task, outcome=outcome)

    def _record(self, event: str, task_id: str, task: Any, **more: Any) -> None:
        here = context.current()
        if here is None or here.eager or task_id not in self._numbers:
            return
        tag, number = self._numbers[task_id]
        record(
            event,
            path=self.path,
            tag=tag,
            seq=number,
            task_id=task_id,
            worker=here.worker,
            epoch=here.epoch,
            attempt=here.attempt,
            retries=task.request.retries,
            **more,
        )


# The fixtures


@pytest.fixture(scope="session")
def affinity_broker() -> Iterator[str]:
    """URL of a Redis that the tests may empty: an embedded server, for the whole session.

    Override it to name a server of your own.
    """
    from celery_affinity.embedded import find_binary, start_server

    try:
        find_binary()
    except ConfigurationError as error:
        pytest.fail(str(error))
    with start_server() as server:
        yield server.url()


@pytest.fixture(scope="session")
def affinity_app(affinity_broker: str) -> Celery:
    """Your app on that broker: override this."""
    pytest.fail(
        "the fixture affinity_app is yours to define: return your app, set up for the broker "
        "affinity_broker (docs/howto_testing.md)"
    )


@pytest.fixture
def affinity_eager(affinity_app: Celery) -> Iterator[Celery]:
    """Tasks run where they are sent, with their context; their errors are raised there."""
    conf = affinity_app.conf
    names = ("task_always_eager", "task_eager_propagates")
    before = {name: conf[name] for name in names}
    conf.update(dict.fromkeys(names, True))
    try:
        yield affinity_app
    finally:
        conf.update(before)


@pytest.fixture
def affinity_worker(affinity_app: Celery, affinity_broker: str) -> Iterator[AffinityWorker]:
    """A real worker of all queues, in a thread; the broker is empty before and after."""
    from redis import Redis

    client: Any = Redis.from_url(affinity_broker)
    client.flushdb()
    try:
        with running_worker(affinity_app) as worker:
            yield worker
    finally:
        client.flushdb()
        client.close()


@pytest.fixture
def affinity_history(tmp_path: Path) -> Iterator[TaskHistory]:
    """What the tasks of this process do during the test; ask it to `assert_lawful`."""
    history = TaskHistory(tmp_path / "affinity-history.jsonl")
    history.connect()
    try:
        yield history
    finally:
        history.close()
