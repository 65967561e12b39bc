"""The test app for stops.

Environment: that of affinity_app. "soften" is a remote control command.
"""

from __future__ import annotations

import time
from typing import Any

from celery import Task
from celery.worker.control import control_command

from acceptance.apps.affinity_app import affinity, app, recorded
from celery_affinity import affinity_task, current

__all__ = ("affinity", "app")


@control_command(args=[("seconds", float)])
def soften(state: Any, seconds: float) -> dict[str, float]:
    """Set how long a cold stop waits for tasks, 0: not at all."""
    state.app.conf.worker_soft_shutdown_timeout = seconds
    return {"ok": seconds}


@affinity_task(queue="jobs", tag_from="tag", bind=True, name="jobs.long_at_first")
def long_at_first(self: Task, tag: str, seq: int, ms: float = 60_000) -> int:
    """Take long, in short sleeps; not if it runs again."""
    lease = current()
    with recorded(self, tag, seq):
        deadline = time.monotonic() + (ms / 1000 if lease is None or lease.attempt == 1 else 0)
        while time.monotonic() < deadline:
            time.sleep(0.02)
    return seq
