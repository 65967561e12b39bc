"""The contestant without: the same task on plain Celery, with its defaults."""

from __future__ import annotations

import os
import time

from celery import Celery

from benchmarks.records import now_ns, write

app = Celery("bench_plain", broker=os.environ.get("BENCH_BROKER"))
app.conf.update(
    task_ignore_result=True, broker_connection_retry_on_startup=True, task_default_queue="bench"
)


@app.task(name="bench.plain.work")
def work(tag: str, seq: int, seconds: float = 0) -> None:
    """Write down that it runs, and sleep."""
    began = now_ns()
    write(began, tag, seq)
    if seconds:
        time.sleep(seconds)
