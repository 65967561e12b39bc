"""A task whose retry belongs to another tag."""

from __future__ import annotations

import time

from celery import Task

from acceptance.apps.affinity_app import app, recorded
from celery_affinity import affinity_task, current

__all__ = ("app",)


@app.task(bind=True, name="jobs.plain_retry")
def plain_retry(self: Task, tag: str, seq: int) -> int:
    """An ordinary task that was sent with a tag, and sends its retry with headers of its own."""
    with recorded(self, tag, seq):
        if not self.request.retries:
            raise self.retry(headers={"mine": 1}, countdown=0)
    return seq


@affinity_task(queue="jobs", tag_from="tag", bind=True, name="jobs.astray")
def astray(self: Task, tag: str, seq: int) -> int:
    """Retry in a queue that is none of the affinity queues."""
    with recorded(self, tag, seq):
        raise self.retry(queue="nowhere", countdown=0)


@affinity_task(queue="jobs", tag_from="tag", bind=True, name="jobs.hop")
def hop(self: Task, tag: str, seq: int, to: str) -> int:
    """Become a task of another tag."""
    lease = current()
    assert lease is not None
    if lease.tag != to:
        raise self.retry(identify_tag=to, countdown=0)
    with recorded(self, to, seq):
        time.sleep(0.3)
    return seq
