"""The acceptance app with tasks that end when a test says so."""

from __future__ import annotations

import os
import time
from pathlib import Path

from celery import Task

from acceptance.apps.affinity_app import affinity, app, recorded
from celery_affinity import affinity_task

__all__ = ("affinity", "app")

#: A folder; a file named by a tag lets the tag's tasks end, "broken" makes repairable ones fail.
GATES_VARIABLE = "AFFINITY_TEST_GATES"


def gates() -> Path:
    """Where the gates are."""
    return Path(os.environ[GATES_VARIABLE])


@affinity_task(queue="jobs", tag_from="tag", bind=True, name="jobs.gated")
def gated(self: Task, tag: str, seq: int, ms: float = 0) -> int:
    """Run until the tag's gate is open."""
    with recorded(self, tag, seq):
        while not (gates() / tag).exists():
            time.sleep(0.01)
    return seq


@affinity_task(queue="jobs", tag_from="tag", bind=True, name="jobs.poison")
def poison(self: Task, tag: str, seq: int, ms: float = 0) -> int:
    """Fail until somebody has mended what is broken."""
    with recorded(self, tag, seq):
        if (gates() / "broken").exists():
            raise ValueError(f"invoice {seq} has no address")
    return seq
