"""The test app with periodic tasks that record the due time of their run.

Environment: that of affinity_app; AFFINITY_TEST_DEFAULTS=1 has Celery's own entry installed.
"""

from __future__ import annotations

from datetime import datetime, timedelta, timezone

from celery import Task

from acceptance.apps.affinity_app import affinity, app, recorded
from celery_affinity import affinity_task

__all__ = ("affinity", "app")

EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)


def due_micros(task: Task) -> int:
    """When this run was due, in microseconds since the epoch."""
    due = datetime.fromisoformat(task.request.affinity_due)
    return (due - EPOCH) // timedelta(microseconds=1)


@affinity_task(queue="jobs", tag_from="tag", bind=True, name="jobs.tick")
def tick(self: Task, tag: str) -> None:
    """Record the run, its due time in the place of a number."""
    with recorded(self, tag, due_micros(self)):
        pass


@app.task(bind=True, name="jobs.ordinary_tick")
def ordinary_tick(self: Task, tag: str) -> None:
    """The same on an ordinary queue."""
    with recorded(self, tag, due_micros(self)):
        pass


app.conf.beat_schedule = {
    "every second": {"task": "jobs.tick", "schedule": 1.0, "args": ("tick",)},
    "ordinary": {"task": "jobs.ordinary_tick", "schedule": 1.0, "args": ("ordinary",)},
    # Raises in beat: it has no tag.
    "broken": {"task": "jobs.tick", "schedule": 1.0, "args": (None,)},
}
