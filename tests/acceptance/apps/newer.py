"""The acceptance app one release on: it has a task that the others do not know."""

from __future__ import annotations

import os
import signal

from celery import Task

from acceptance.apps.affinity_app import affinity, app, recorded
from celery_affinity import affinity_task, current

__all__ = ("affinity", "app")


@affinity_task(queue="jobs", tag_from="tag", bind=True, name="jobs.newer")
def newer(self: Task, tag: str, seq: int, ms: float = 0) -> int:
    """Work that only the newer release can do."""
    with recorded(self, tag, seq):
        return seq


@affinity_task(queue="jobs", bind=True, name="jobs.untagged")
def untagged(self: Task, seq: int) -> str:
    """Work that belongs to nobody; returns the tag that it got."""
    tag = str(self.request.headers["identify_tag"])
    with recorded(self, tag, seq):
        return tag


@affinity_task(queue="jobs", tag_from=lambda failed: "errback", bind=True, name="jobs.told")
def told(self: Task, failed: str) -> None:
    """An errback, itself a task."""
    with recorded(self, "errback", 0):
        pass


def die_once(self: Task, *about: object) -> None:
    """Called after the result was stored, before the settle."""
    lease = current()
    if lease and lease.attempt == 1:
        os.kill(os.getpid(), signal.SIGKILL)


@affinity_task(queue="jobs", tag_from="tag", bind=True, name="jobs.stored", after_return=die_once)
def stored(self: Task, tag: str, seq: int, ms: float = 0) -> int:
    """Succeed, and lose the process right after that."""
    with recorded(self, tag, seq):
        return seq


@affinity_task(queue="jobs", tag_from="tag", bind=True, name="jobs.thrice")
def thrice(self: Task, tag: str, seq: int, ms: float = 300) -> int:
    """Ask for two retries, then succeed."""
    with recorded(self, tag, seq):
        if self.request.retries < 2:
            raise self.retry(countdown=ms / 1000, max_retries=2)
    return seq
