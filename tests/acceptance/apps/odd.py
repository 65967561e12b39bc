"""The acceptance app with tasks that do what one should not, and tasks that fail."""

from __future__ import annotations

import os

from billiard.process import current_process
from celery import Task

from acceptance.apps.affinity_app import affinity, app, recorded
from celery_affinity import affinity_task

__all__ = ("affinity", "app")

if "AFFINITY_TEST_VISIBILITY" in os.environ:
    app.conf.broker_transport_options = {
        "visibility_timeout": float(os.environ["AFFINITY_TEST_VISIBILITY"])
    }

if "AFFINITY_TEST_ACCEPT" in os.environ:
    app.conf.accept_content = ["json", os.environ["AFFINITY_TEST_ACCEPT"]]

#: While a file of this name is there, the repaired task succeeds.
REPAIRED_VARIABLE = "AFFINITY_TEST_REPAIRED"


class ReadByTheParentOnly:
    """An argument that can be unpickled in the worker's parent, and nowhere else."""

    def __reduce__(self) -> tuple[object, ...]:
        """Called where the message is made."""
        return only_in_the_parent, ()


def only_in_the_parent() -> str:
    """Called where it is read."""
    if current_process().name != "MainProcess":
        raise ValueError("not here")
    return "tag"


@affinity_task(queue="jobs", tag_from="tag", bind=True, name="jobs.much_later")
def much_later(self: Task, tag: str, seq: int, ms: float = 0) -> None:
    """Ask for a retry in thirty years."""
    with recorded(self, tag, seq):
        raise self.retry(countdown=1e9)


@affinity_task(queue="jobs", tag_from="tag", bind=True, name="jobs.repairable")
def repairable(self: Task, tag: str, seq: int, ms: float = 0) -> int:
    """Fail until somebody has mended what is broken."""
    with recorded(self, tag, seq):
        if not os.path.exists(os.environ.get(REPAIRED_VARIABLE, "")):
            raise ValueError(f"broken {seq}")
    return seq


@affinity_task(queue="jobs", tag_from="tag", bind=True, name="jobs.persistent",
               autoretry_for=(ValueError,), max_retries=2, retry_backoff=False,
               default_retry_delay=0)
def persistent(self: Task, tag: str, seq: int, ms: float = 0) -> int:
    """Fail twice and have Celery retry it."""
    with recorded(self, tag, seq):
        if self.request.retries < 2:
            raise ValueError(f"not yet {seq}")
    return seq
