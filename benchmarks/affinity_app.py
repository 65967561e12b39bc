"""The contestant with celery_affinity: everything that is not named here is a default."""

from __future__ import annotations

import os
import time

from celery import Celery

from benchmarks.records import now_ns, write
from celery_affinity import Affinity, AffinityQueue, affinity_task, current

app = Celery("bench_affinity", broker=os.environ.get("BENCH_BROKER"))
app.conf.update(task_ignore_result=True, broker_connection_retry_on_startup=True)
affinity = Affinity(app, queues=[AffinityQueue("bench")])


@affinity_task(queue="bench", tag_from="tag", name="bench.affinity.work")
def work(tag: str, seq: int, seconds: float = 0) -> None:
    """Write down that it runs, and sleep."""
    began = now_ns()
    lease = current()
    write(began, tag, seq, lease.epoch if lease else 0)
    if seconds:
        time.sleep(seconds)
