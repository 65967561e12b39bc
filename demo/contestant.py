"""What both contestants have in common: the app's settings and the task's body."""

from __future__ import annotations

import os
import socket
from functools import cache
from pathlib import Path

from celery import Celery

from demo.index import Index

__all__ = ("INDEX_VARIABLE", "NODE_VARIABLE", "QUEUE", "add_file", "close_tag", "make_app")

#: Names the directory of the index that a worker adds to.
INDEX_VARIABLE = "DEMO_INDEX"
#: Names the worker, for the table; its host does without.
NODE_VARIABLE = "DEMO_NODE"
#: The only queue.
QUEUE = "sources"


def make_app(name: str) -> Celery:
    """A Celery app; ``CELERY_BROKER_URL`` says where its broker is."""
    app = Celery(name)
    app.conf.update(
        task_default_queue=QUEUE,
        # What a task did stands in the index; nobody asks Celery for it.
        task_ignore_result=True,
        broker_connection_retry_on_startup=True,
    )
    return app


def add_file(tag: str, seq: int, name: str, path: str, sent_at: float) -> None:
    """Add a file to the index that this process works on."""
    owner = f"{os.environ.get(NODE_VARIABLE) or socket.gethostname()}:{os.getpid()}"
    _index().add(tag, seq, name, Path(path), sent_at, owner)


def close_tag(tag: str) -> None:
    """Drop what this process has of a tag in its memory."""
    _index().close(tag)


@cache
def _index() -> Index:
    return Index(Path(os.environ[INDEX_VARIABLE]))
