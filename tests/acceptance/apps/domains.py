"""An app with two affinity queues, of which several may live on one Redis.

Environment: AFFINITY_TEST_BROKER; DOMAIN, the app's namespace and what its queues' names begin with;
AFFINITY_TEST_QUEUE, a JSON object of more settings of its queues; DECLARED=1 declares them to Celery,
too (task_queues).
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from billiard.process import current_process
from celery import Celery, Task
from kombu import Queue

from celery_affinity import Affinity, AffinityQueue, current
from history import record

QUEUES = ("invoices", "reports")


def work(self: Task, tag: str, seq: int, ms: float = 0, until: str = "") -> int:
    """Take a while, or wait until a file is there."""
    lease = current()
    domain = lease.queue if lease else self.app.conf.task_default_queue
    fields = {
        "tag": f"{domain}:{tag}", "seq": seq, "task_id": self.request.id,
        "worker": self.request.hostname, "retries": self.request.retries,
        "epoch": lease.epoch if lease else None, "attempt": lease.attempt if lease else None,
        "slot": lease.slot if lease else None, "queue": domain,
        "process_index": getattr(current_process(), "index", None),
    }
    record("start", **fields)
    try:
        time.sleep(ms / 1000)
        deadline = time.monotonic() + 60
        while until and not Path(until).exists() and time.monotonic() < deadline:
            time.sleep(0.02)
    finally:
        record("end", outcome="ok", **fields)
    return seq


def make_app(domain: str, broker_url: str, **settings: Any) -> tuple[Celery, Affinity]:
    """An app of a domain, with a task `<queue>.work` for each queue and `<domain>.plain_work`."""
    app = Celery(domain, broker=broker_url, set_as_current=False)
    app.conf.update(
        task_ignore_result=True, broker_connection_retry_on_startup=True,
        task_default_queue=f"{domain}-ordinary",
    )
    if os.environ.get("DECLARED"):
        app.conf.task_queues = [Queue(f"{domain}-{name}") for name in (*QUEUES, "ordinary")]
    options = json.loads(os.environ.get("AFFINITY_TEST_QUEUE", "{}"))
    queues = [
        # The ledger's name of a queue is not always its own.
        AffinityQueue(f"{domain}-{name}", state_prefix=f"state-{domain}-{name}", **options)
        for name in QUEUES
    ]
    affinity = Affinity(app, queues=queues, namespace=domain, **settings)
    for queue in queues:
        affinity.task(work, queue=queue.name, tag_from="tag", bind=True, name=f"{queue.name}.work")
    app.task(work, bind=True, name=f"{domain}.plain_work")
    return app, affinity


app, affinity = make_app(
    os.environ.get("DOMAIN", "shop"),
    os.environ.get("AFFINITY_TEST_BROKER", "redis://127.0.0.1:1/0"),
)
