"""The app of the contestant that BENCH_CONTESTANT names; what is not said here is a default.

`plain` and `acks_late` are Celery alone. Two are what one would build oneself: `hashed` has a queue
for each worker and a tag's tasks in one of them; `lock` runs a task while it holds its tag's lock
and otherwise retries, as celery-singleton and its like do.
"""

from __future__ import annotations

import os
import time
from collections import OrderedDict
from functools import cache
from typing import Any

from celery import Celery
from redis import Redis

from benchmarks.records import now_ns, write
from celery_affinity import Affinity, AffinityQueue, BatchRequest, affinity_task, current

__all__ = ("KEPT_TAGS", "QUEUE", "TASK", "app")

QUEUE = "bench"
TASK = "bench.work"
#: Tags whose set-up a process keeps, as one keeps a few tenants' connections open.
KEPT_TAGS = 8
#: Seconds after which a task whose tag is locked tries again. A tenth of it lets a thousand waiting
#: tasks of one tag do little else than try.
LOCK_RETRY_SECONDS = 1.0
#: Seconds after which the lock of a process that is gone ends.
LOCK_SECONDS = 60.0

CONTESTANT = os.environ["BENCH_CONTESTANT"]
BROKER = os.environ["BENCH_BROKER"]

app = Celery("bench", broker=BROKER)
app.conf.update(
    task_ignore_result=True, broker_connection_retry_on_startup=True, task_default_queue=QUEUE
)
if queue_type := os.environ.get("BENCH_QUEUE_TYPE"):  # on RabbitMQ
    app.conf.update(task_default_queue_type=queue_type, task_create_missing_queue_type=queue_type)

_kept: OrderedDict[str, None] = OrderedDict()


def _body(tag: str, seq: int, seconds: float, setup: float) -> None:
    """Set the tag up unless this process has it still, sleep, and write that down."""
    began = now_ns()
    cold = tag not in _kept
    _kept[tag] = None
    _kept.move_to_end(tag)
    if len(_kept) > KEPT_TAGS:
        _kept.popitem(last=False)
    if cold and setup:
        time.sleep(setup)
    if seconds:
        time.sleep(seconds)
    lease = current()
    write(began, tag, seq, lease.epoch if lease else 0, cold)


@cache
def _locks() -> Redis:
    return Redis.from_url(BROKER)


if CONTESTANT == "affinity":
    affinity = Affinity(app, queues=[AffinityQueue(QUEUE)])

    @affinity_task(queue=QUEUE, tag_from="tag", name=TASK)
    def work(tag: str, seq: int, seconds: float = 0, setup: float = 0) -> None:
        _body(tag, seq, seconds, setup)

elif CONTESTANT == "batch":
    affinity = Affinity(app, queues=[AffinityQueue(QUEUE, max_batch_size=100)])

    def _tag_of(tag: str, seq: int, seconds: float = 0, setup: float = 0) -> str:
        return tag

    @affinity_task(queue=QUEUE, tag_from=_tag_of, batch=True, name=TASK)
    def work(requests: list[BatchRequest]) -> None:
        for request in requests:
            _body(*request.args)

elif CONTESTANT == "lock":

    @app.task(bind=True, name=TASK, max_retries=None)
    def work(self: Any, tag: str, seq: int, seconds: float = 0, setup: float = 0) -> None:
        lock = _locks().lock(f"bench-lock:{tag}", timeout=LOCK_SECONDS, blocking=False)
        if not lock.acquire():
            raise self.retry(countdown=LOCK_RETRY_SECONDS)
        try:
            _body(tag, seq, seconds, setup)
        finally:
            lock.release()

else:

    @app.task(name=TASK, acks_late=CONTESTANT == "acks_late")
    def work(tag: str, seq: int, seconds: float = 0, setup: float = 0) -> None:
        _body(tag, seq, seconds, setup)
