"""A plain Celery app, whose tasks record when they ran."""

from __future__ import annotations

import os
import time

from celery import Celery, Task

from history import record


def make_app(broker_url: str | None = None) -> Celery:
    """An app on a broker; default: where AFFINITY_TEST_BROKER points."""
    app = Celery("plain", broker=broker_url or os.environ.get("AFFINITY_TEST_BROKER"))
    app.conf.update(
        task_default_queue="plain", task_ignore_result=True, broker_connection_retry_on_startup=True
    )
    app.task(work, name="plain.work", bind=True)
    return app


def work(self: Task, tag: str, seq: int, ms: float = 0) -> None:
    """Take a while."""
    fields = {
        "tag": tag, "seq": seq, "task_id": self.request.id, "worker": self.request.hostname,
        "retries": self.request.retries,
    }
    record("start", **fields)
    time.sleep(ms / 1000)
    record("end", **fields)


app = make_app()
