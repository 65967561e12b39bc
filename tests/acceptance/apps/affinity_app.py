"""The app of the acceptance tests: affinity tasks that record when, where and under which lease.

Environment: AFFINITY_TEST_BROKER; BATCH is max_batch_size; AFFINITY_TEST_QUEUE is a JSON object of
more settings of the queue; AFFINITY_TEST_RESULTS=1 keeps results in database 1 of the broker's
server, a URL there; AFFINITY_TEST_MASTER is what sentinels call it; AFFINITY_TEST_QUEUE_TYPE is that of
queues on RabbitMQ; the library itself reads AFFINITY_HEARTBEAT_INTERVAL, AFFINITY_LEADER_TTL and so on.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from billiard.process import current_process
from celery import Celery, Task
from celery.exceptions import Retry

from celery_affinity import Affinity, AffinityQueue, affinity_task, current
from harness import QUEUE_TYPE_VARIABLE, RESULTS_URL_VARIABLE, wait_until
from history import HISTORY_VARIABLE, record


def make_app(broker_url: str | None = None, **settings: Any) -> tuple[Celery, Affinity]:
    """An app on a broker, default: where AFFINITY_TEST_BROKER points; settings of `Affinity`."""
    broker_url = broker_url or os.environ.get("AFFINITY_TEST_BROKER", "redis://127.0.0.1:1/0")
    results = os.environ.get("AFFINITY_TEST_RESULTS", "")
    keep_results = bool(results)
    if results == "1":
        results = os.environ.get(RESULTS_URL_VARIABLE) or broker_url.rpartition("/")[0] + "/1"
    app = Celery("affinity_app", broker=broker_url, backend=results or None)
    app.conf.update(
        task_ignore_result=not keep_results, broker_connection_retry_on_startup=True,
        task_default_queue="ordinary",
    )
    if master := os.environ.get("AFFINITY_TEST_MASTER"):
        app.conf.broker_transport_options = {"master_name": master}
    if queue_type := os.environ.get(QUEUE_TYPE_VARIABLE):
        app.conf.update(task_default_queue_type=queue_type, task_create_missing_queue_type=queue_type)
    # These go to the default queue.
    app.task(plain_work, name="jobs.plain_work", bind=True)
    app.task(plain_hold, name="jobs.plain_hold", bind=True, acks_late=True)
    queue = {
        "max_batch_size": int(os.environ.get("BATCH", "10")),
        **json.loads(os.environ.get("AFFINITY_TEST_QUEUE", "{}")),
    }
    return app, Affinity(app, queues=[AffinityQueue("jobs", **queue)], **settings)


@contextmanager
def recorded(task: Task, tag: str, seq: int) -> Iterator[None]:
    """Record the start and the end of what is done inside, and how it ended."""
    lease = current()
    fields = {
        "tag": tag, "seq": seq, "task_id": task.request.id, "worker": task.request.hostname,
        "retries": task.request.retries,
        "epoch": lease.epoch if lease else None, "attempt": lease.attempt if lease else None,
        "slot": lease.slot if lease else None,
        "process_index": getattr(current_process(), "index", None),
    }
    record("start", **fields)
    outcome = "aborted"  # what a stopped pool raises is no Exception
    try:
        yield
        outcome = "ok"
    except Retry:
        outcome = "retry"
        raise
    except Exception:
        outcome = "failed"
        raise
    finally:
        record("end", outcome=outcome, **fields)


@affinity_task(queue="jobs", tag_from="tag", bind=True, name="jobs.work")
def work(self: Task, tag: str, seq: int, ms: float = 0) -> int:
    """Take a while."""
    with recorded(self, tag, seq):
        time.sleep(ms / 1000)
    return seq


def release_held() -> None:
    """Let all tasks that hold end in this history, those that come later too."""
    held_go().touch()


def held_go() -> Path:
    """The file whose being there is the release."""
    return Path(os.environ[HISTORY_VARIABLE] + ".go")


@affinity_task(queue="jobs", tag_from="tag", bind=True, name="jobs.hold")
def hold(self: Task, tag: str, seq: int, ms: float = 0) -> int:
    """Run until `release_held`."""
    with recorded(self, tag, seq):
        wait_until(held_go().exists, 90, "the release")
    return seq


@affinity_task(queue="jobs", tag_from="tag", bind=True, name="jobs.flaky")
def flaky(self: Task, tag: str, seq: int, ms: float = 0) -> int:
    """Ask for one retry, then succeed."""
    with recorded(self, tag, seq):
        time.sleep(ms / 1000)
        if not self.request.retries:
            raise self.retry(countdown=0, max_retries=1)
    return seq


@affinity_task(queue="jobs", tag_from="tag", bind=True, name="jobs.boom")
def boom(self: Task, tag: str, seq: int, ms: float = 0) -> None:
    """Fail."""
    with recorded(self, tag, seq):
        time.sleep(ms / 1000)
        raise ValueError(f"boom {seq}")


@affinity_task(queue="jobs", tag_from="tag", bind=True, name="jobs.long")
def long(self: Task, tag: str, seq: int, ms: float = 10_000) -> int:
    """Take long, in short sleeps that signals and limits interrupt."""
    with recorded(self, tag, seq):
        deadline = time.monotonic() + ms / 1000
        while time.monotonic() < deadline:
            time.sleep(0.02)
    return seq


def plain_work(self: Task, tag: str, seq: int, ms: float = 0) -> int:
    """An ordinary task of an ordinary queue."""
    with recorded(self, tag, seq):
        time.sleep(ms / 1000)
    return seq


def plain_hold(self: Task, tag: str, seq: int, ms: float = 0) -> int:
    """An ordinary task that is not acked before it ends: run until `release_held`."""
    with recorded(self, tag, seq):
        wait_until(held_go().exists, 90, "the release")
    return seq


app, affinity = make_app()
