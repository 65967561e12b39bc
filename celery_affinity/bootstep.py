"""Celery's hooks for a worker that serves affinity queues: wiring only, the work is in `Node`."""

from __future__ import annotations

from typing import Any

from celery import bootsteps

from celery_affinity import internals

__all__ = ("ConsumerStep", "WorkerStep")


class WorkerStep(bootsteps.StartStopStep):  # type: ignore[misc]
    """Refuses a start with wrong settings; schedules with role both; drains at a stop."""

    requires = ("celery.worker.components:Pool",)

    def __init__(self, worker: Any, **kwargs: Any) -> None:
        worker.app.celery_affinity.raise_startup_error()
        super().__init__(worker, **kwargs)

    def start(self, worker: Any) -> None:
        """The pool is up."""
        worker.app.celery_affinity.worker_started()

    def stop(self, worker: Any) -> None:
        """Called before the pool stops."""
        worker.app.celery_affinity.worker_stopping()

    terminate = stop


class ConsumerStep(bootsteps.StartStopStep):  # type: ignore[misc]
    """Receives dispatched messages after each (re)connection; leaves at the very end."""

    requires = ("celery.worker.consumer:Tasks",)

    def __init__(self, consumer: Any, **kwargs: Any) -> None:
        internals.outlive_lost_connections(consumer)
        super().__init__(consumer, **kwargs)

    def start(self, consumer: Any) -> None:
        """The strategies and tracers were built anew."""
        consumer.app.celery_affinity.consumer_started(consumer)

    def stop(self, consumer: Any) -> None:
        """The connection is gone or the worker stops: the heartbeat goes on."""

    def shutdown(self, consumer: Any) -> None:
        """The pool has stopped."""
        consumer.app.celery_affinity.worker_stopped()

    def info(self, consumer: Any) -> dict[str, Any]:
        """Shown by ``celery inspect stats`` and Flower's worker page and API."""
        node = consumer.app.celery_affinity.node
        return {"affinity": node.info()} if node is not None else {}
