"""Remote control: `add_consumer` and `cancel_consumer` of affinity queues, `inspect affinity`.

To consume an affinity queue means to be a worker of it: to be registered for it and to consume the
worker queue of one's own. So these commands, also from Flower, change what the node serves. What
cannot be done is refused in the reply and in the log.

An affinity queue may be named by its own name, by that of its pending queue, and by that of this
node's worker queue, which is what `inspect active_queues` shows.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from celery.worker.control import Panel, inspect_command, nok

from celery_affinity.settings import AffinityQueue
from celery_affinity.topology import worker_queue_prefix

__all__ = ("refuse_in_replies", "steer")

logger = logging.getLogger(__name__)


@inspect_command()  # type: ignore[untyped-decorator]
def affinity(state: Any, **_: Any) -> dict[str, Any]:
    """This worker's slots with the tag and batch of each, and the affinity queues it serves."""
    own = getattr(state.app, "celery_affinity", None)
    if own is None:
        return {"error": "found no Affinity(app) in this worker's app"}
    if own.node is None:
        return {"role": own.settings.role, "queues": {}, "slots": []}
    return dict(own.node.info())


def refuse_in_replies() -> None:
    """Make ``add_consumer`` answer with an error where it is refused."""
    stock: Callable[..., Any] = Panel.data["add_consumer"]
    if hasattr(stock, "celery_affinity"):
        return

    def add_consumer(state: Any, queue: str, *args: Any, **options: Any) -> Any:
        reason = _refusal(getattr(state.app, "celery_affinity", None), queue)
        if reason is None:
            return stock(state, queue, *args, **options)
        logger.warning(reason, extra={"action": "add_consumer_refused", "queue": queue})
        return nok(reason)

    add_consumer.celery_affinity = True  # type: ignore[attr-defined]
    Panel.data["add_consumer"] = add_consumer


def steer(consumer: Any, affinity: Any) -> None:
    """Take care of affinity queues when this consumer adds or cancels a queue."""
    stock_add: Callable[..., Any] = consumer.add_task_queue
    stock_cancel: Callable[[str], Any] = consumer.cancel_task_queue
    if hasattr(stock_add, "celery_affinity"):
        return

    def add_task_queue(queue: str, *args: Any, **options: Any) -> Any:
        reason = _refusal(affinity, queue)
        if reason is not None:
            logger.warning(reason, extra={"action": "add_consumer_refused", "queue": queue})
            return None
        declared = _named(affinity, queue)
        if declared is None:
            return stock_add(queue, *args, **options)
        return affinity.node.start_serving(declared, stock_add)

    def cancel_task_queue(queue: str) -> Any:
        declared = _named(affinity, queue)
        if declared is None or affinity.node is None:
            return stock_cancel(queue)
        return affinity.node.stop_serving(declared, stock_cancel)

    add_task_queue.celery_affinity = True  # type: ignore[attr-defined]
    consumer.add_task_queue = add_task_queue
    consumer.cancel_task_queue = cancel_task_queue


def _named(affinity: Any, name: str) -> AffinityQueue | None:
    """The declared affinity queue that is meant by a name, or None."""
    own = affinity.node.worker_queues if affinity.node is not None else {}
    for queue in affinity.settings.queues:
        if name in (queue.name, queue.pending, own.get(queue.name)):
            found: AffinityQueue = queue
            return found
    return None


def _refusal(affinity: Any, name: str) -> str | None:
    """Why this worker cannot consume a queue; None if it can."""
    if affinity is None:
        return None
    declared = _named(affinity, name)
    if declared is None:
        for queue in affinity.settings.queues:
            if name.startswith(worker_queue_prefix(queue) + "."):
                return (
                    f"Not consuming {name!r}: it is the worker queue of another worker, whose "
                    f"messages are meant for that one. Expected {queue.name!r}."
                )
        return None
    if affinity.node is not None:
        return None
    if affinity.settings.role == "scheduler":
        return (
            f"Not consuming {name!r}: this worker's role is 'scheduler', which runs no affinity "
            "tasks. Start another worker with role 'worker' or 'both'."
        )
    return (
        f"Not consuming {name!r}: this worker serves no affinity queue, so its pool was started "
        f"without gates; its tasks come through the ledger. Start a worker with -Q {name} instead. "
        "(A worker that serves at least one affinity queue can be given more.)"
    )
