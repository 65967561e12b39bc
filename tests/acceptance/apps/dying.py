"""The acceptance app in a worker that dies where its name says, once its queue is declared."""

from __future__ import annotations

import os
import signal

from acceptance.apps.affinity_app import affinity, app
from celery_affinity.node import Node

__all__ = ("affinity", "app")


def die(self: Node, consumer: object) -> None:
    """Instead of the first thing that follows after the consumer's start."""
    os.kill(os.getpid(), signal.SIGKILL)


Node.consumer_started = die  # type: ignore[method-assign, assignment]
