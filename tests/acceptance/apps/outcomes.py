"""The test app with periodic tasks, and with tasks that end in every way that Celery knows."""

from __future__ import annotations

import os
import signal

from billiard.process import current_process
from celery import Task
from celery.exceptions import Ignore, Reject

from acceptance.apps.affinity_app import affinity, app, recorded
from celery_affinity import affinity_task

__all__ = ("affinity", "app")

app.conf.beat_schedule = {
    "ordinary": {"task": "jobs.plain_work", "schedule": 1.0, "args": ("ordinary tick", 0)},
    "affinity": {"task": "jobs.work", "schedule": 1.0, "args": ("affinity tick", 0)},
}


@affinity_task(queue="jobs", tag_from="tag", bind=True, name="jobs.flaky_later")
def flaky_later(self: Task, tag: str, seq: int, ms: float = 0) -> int:
    """Ask for one retry in a second, then succeed."""
    with recorded(self, tag, seq):
        if not self.request.retries:
            raise self.retry(countdown=1, max_retries=1)
    return seq


@affinity_task(queue="jobs", tag_from="tag", bind=True, name="jobs.ignoring")
def ignoring(self: Task, tag: str, seq: int, ms: float = 0) -> None:
    """Leave no state."""
    with recorded(self, tag, seq):
        raise Ignore()


@affinity_task(queue="jobs", tag_from="tag", bind=True, name="jobs.rejecting")
def rejecting(self: Task, tag: str, seq: int, ms: float = 0) -> None:
    """Refuse the message."""
    with recorded(self, tag, seq):
        raise Reject("not mine")


@affinity_task(queue="jobs", tag_from="tag", bind=True, name="jobs.requeuing")
def requeuing(self: Task, tag: str, seq: int, ms: float = 0) -> int:
    """Give the message back until the tag's backlog has passed by once."""
    with recorded(self, tag, seq):
        requeuing.__dict__["times"] = requeuing.__dict__.get("times", 0) + 1
        if requeuing.__dict__["times"] == 1:
            raise Reject("later", requeue=True)
    return seq


class Strikes(Exception):
    """Has the worker stopped cold by whoever unpickles it: its parent, while it reads a result."""

    def __reduce__(self) -> tuple[object, ...]:
        """Called in the pool process."""
        return strike, ()


def strike() -> Strikes:
    """Called where the exception is unpickled; pool processes do that too, as a trial."""
    if current_process().name == "MainProcess":
        os.kill(os.getpid(), signal.SIGQUIT)
    return Strikes()


@affinity_task(queue="jobs", tag_from="tag", bind=True, name="jobs.striking")
def striking(self: Task, tag: str, seq: int, ms: float = 0) -> None:
    """Fail in a way that stops the worker while it reads of it."""
    with recorded(self, tag, seq):
        raise Strikes
