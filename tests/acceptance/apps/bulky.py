"""The acceptance app with a task whose failure takes the worker's parent a while to read."""

from __future__ import annotations

from celery import Task

from acceptance.apps.affinity_app import affinity, app, recorded
from celery_affinity import affinity_task

__all__ = ("affinity", "app")


class Bulky(Exception):
    """Weighs a hundred and fifty megabytes."""

    def __init__(self) -> None:
        super().__init__()
        self.payload = bytes(150_000_000)


@affinity_task(queue="jobs", tag_from="tag", bind=True, name="jobs.bulky")
def bulky(self: Task, tag: str, seq: int, ms: float = 0) -> None:
    """Fail; of a task that succeeds only a short text is sent to the parent."""
    with recorded(self, tag, seq):
        raise Bulky
