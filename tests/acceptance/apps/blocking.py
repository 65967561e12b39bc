"""The acceptance app with a task that gives nobody else a turn, greenlets neither."""

from __future__ import annotations

import time

from celery import Task

from acceptance.apps.affinity_app import affinity, app, recorded
from celery_affinity import affinity_task

__all__ = ("affinity", "app")


@affinity_task(queue="jobs", tag_from="tag", bind=True, name="jobs.blocking")
def blocking(self: Task, tag: str, seq: int, ms: float = 0) -> int:
    """Spin."""
    with recorded(self, tag, seq):
        deadline = time.monotonic() + ms / 1000
        while time.monotonic() < deadline:
            pass
    return seq
