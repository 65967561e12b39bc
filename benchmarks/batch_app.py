"""The contestant with a batch task: the work of affinity_app, for all that waits in one call."""

from __future__ import annotations

import os

from celery import Celery

from benchmarks.records import now_ns, write
from celery_affinity import Affinity, AffinityQueue, BatchRequest, affinity_task, current

app = Celery("bench_batch", broker=os.environ.get("BENCH_BROKER"))
app.conf.update(task_ignore_result=True, broker_connection_retry_on_startup=True)
affinity = Affinity(
    app, queues=[AffinityQueue("bench", max_batch_size=int(os.environ.get("BENCH_BATCH", "100")))]
)


def tag_of(tag: str, seq: int, seconds: float = 0) -> str:
    """The tag of a call."""
    return tag


@affinity_task(queue="bench", tag_from=tag_of, batch=True, name="bench.batch.work")
def work(requests: list[BatchRequest]) -> None:
    """Write down that each runs."""
    lease = current()
    for request in requests:
        tag, seq, _ = request.args
        write(now_ns(), tag, seq, lease.epoch if lease else 0)
