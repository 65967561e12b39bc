"""Keeps a worker from running affinity tasks past the ledger because its app has no `Affinity`.

Such a worker would consume the pending queue as plain Celery does, beside the workers of the
library, and so break order and exclusion without a word.
"""

from __future__ import annotations

from typing import Any

from celery import bootsteps, signals

from celery_affinity import internals
from celery_affinity.exceptions import ConfigurationError
from celery_affinity.routing import usual_queue

__all__ = ("refuse_workers_without_affinity",)


def refuse_workers_without_affinity() -> None:
    """Watch the start of every worker of this process."""
    signals.worker_init.connect(_on_worker_init, weak=False)


def _on_worker_init(sender: Any, **_: Any) -> None:
    if getattr(sender.app, "celery_affinity", None) is None:
        found = _affinity_tasks_on(sender.app)
        if found:
            # Celery swallows what a receiver raises, but not what a bootstep does.
            sender.app.steps["worker"].add(_refusal(*found))


def _affinity_tasks_on(app: Any) -> tuple[str, str] | None:
    """An affinity task that this worker would run, and the queue it comes by."""
    consumed = internals.selected_queues(app)
    consumed = list(app.amqp.queues) if consumed is None else consumed
    for task in app.tasks.values():
        if not hasattr(task, "affinity_tag_from"):
            continue
        queue = task.affinity_queue or usual_queue(task) or app.conf.task_default_queue
        name = str(getattr(queue, "name", queue))
        if name in consumed:
            return str(task.name), name
    return None


def _refusal(task: str, queue: str) -> type[Any]:
    error = ConfigurationError(
        f"this worker consumes {queue!r} and knows the affinity task {task!r}, but its app has no "
        "Affinity: it would run tasks of one tag side by side and out of order. Add to the app's "
        f"module:  affinity = Affinity(app, queues=[AffinityQueue({queue!r})])"
    )

    class RefusedStart(bootsteps.StartStopStep):  # type: ignore[misc]
        """Raises at the worker's start."""

        def __init__(self, parent: Any, **kwargs: Any) -> None:
            raise error

    return RefusedStart
