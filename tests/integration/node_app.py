"""The app of the pytest-celery workers. It is copied, not imported, and must run alone in a container.

CELERY_BROKER_URL and CELERY_RESULT_BACKEND come from the plugin.
"""

from __future__ import annotations

import time
from typing import Any

from celery import Celery

from celery_affinity import Affinity, AffinityQueue

app = Celery("celery_test_app")
app.conf.broker_connection_retry_on_startup = True
affinity = Affinity(
    app,
    queues=[AffinityQueue("jobs")],
    heartbeat_interval=0.5,
    heartbeat_timeout=2.0,
    leader_ttl=2.0,
)


@affinity.task(queue="jobs", tag_from="tag", bind=True, name="nodes.echo")
def echo(self: Any, tag: str, number: int, seconds: float = 0) -> list[Any]:
    """Return its own id, what it was given, and when it ran."""
    began = time.time()
    time.sleep(seconds)
    return [self.request.id, tag, number, began]


@app.task(name="pytest_celery.vendors.worker.tasks.ping")
def ping() -> str:
    """The plugin's own check."""
    return "pong"
