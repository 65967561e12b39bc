"""Which queue a task goes to, asked of ``task_routes`` as Celery asks it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from celery_affinity.exceptions import UndeclaredQueueError
from celery_affinity.settings import AffinitySettings

__all__ = ("pending_queue", "queue_of_route", "usual_pending_queue", "usual_queue")

logger = logging.getLogger(__name__)


def queue_of_route(task: Any, args: Any, kwargs: Any, options: Any) -> str | None:
    """The name of the queue that ``task_routes`` has for a call; None if it has none."""
    router = task._get_app().amqp.router
    route = router.lookup_route(task.name, args or (), kwargs or {}, options or {}, task)
    queue = route.get("queue") if isinstance(route, Mapping) else route
    return str(getattr(queue, "name", queue)) if queue else None


def usual_queue(task: Any) -> str | None:
    """The same for a task without a call, at a process' start; None if no route can tell.

    A function in ``task_routes`` may need the call's arguments.
    """
    try:
        return queue_of_route(task, (), {}, {})
    except Exception as error:
        logger.debug(
            "task_routes cannot tell the queue of task %r without a call: %s: %s",
            task.name,
            type(error).__name__,
            error,
            extra={"action": "route_unknown", "task": task.name},
        )
        return None


def pending_queue(
    task: Any,
    settings: AffinitySettings,
    args: Any = (),
    kwargs: Any = None,
    queue: Any = None,
    options: Any = None,
) -> str:
    """The Celery queue to publish to: the call's, the task's, the route's, or the only one.

    Raises:
        UndeclaredQueueError: If that is not an affinity queue, or several could be.
    """
    if queue is None:
        queue = task.affinity_queue
    if queue is None:
        queue = queue_of_route(task, args, kwargs, options)
    if queue is None and len(settings.queues) == 1:
        return settings.queues[0].pending
    name = getattr(queue, "name", queue)
    for declared in settings.queues:
        if name in (declared.name, declared.pending):
            return declared.pending
    raise UndeclaredQueueError(str(name), settings.queue_names, task.name)


def usual_pending_queue(task: Any, settings: AffinitySettings) -> str | None:
    """The same for a task without a call; None if that depends on the call, or is none."""
    try:
        return pending_queue(task, settings)
    except Exception:
        return None
