"""What a worker's parent process makes of a message that it gets.

An ordinary message takes Celery's own strategy. A dispatched one (it carries the ledger's stamp)
becomes a DispatchedRequest; one that cannot be made a request is buried instead of stopping the
worker, and one whose task is unknown here goes to a worker that knows it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from celery import signals
from celery.app import trace as celery_trace
from celery.utils.imports import symbol_by_name
from celery.worker import state as worker_state
from celery.worker.request import create_request_cls

from celery_affinity.message import REVOKED_HEADER, ROUTE_HEADER, STAMP_HEADER, Stamp
from celery_affinity.request import DispatchedRequest, LedgerEnds

__all__ = ("Strategy", "requeue_unknown_tasks")

logger = logging.getLogger(__name__)


class Strategy:
    """Celery's strategy for a task, with the one for dispatched messages in front.

    Arguments:
        stock: The strategy that Celery has built.
        to_pool: Hands a request to the pool.
    """

    def __init__(
        self,
        task: Any,
        app: Any,
        consumer: Any,
        stock: Any,
        ends: LedgerEnds,
        to_pool: Callable[[Any], None],
    ) -> None:
        self.task = task
        self.app = app
        self.consumer = consumer
        self.stock = stock
        self.ends = ends
        self.to_pool = to_pool
        self.request_class = self._request_class()

    def _request_class(self) -> Any:
        consumer = self.consumer
        stock_class = create_request_cls(
            symbol_by_name(self.task.Request),
            self.task,
            consumer.pool,
            consumer.hostname,
            consumer.event_dispatcher,
            app=self.app,
        )
        return type(
            "DispatchedRequest",
            (DispatchedRequest, stock_class),
            {
                "affinity_ends": self.ends,
                "affinity_in_process": not consumer.pool.uses_semaphore,
                "affinity_pool": consumer.pool,
            },
        )

    def __call__(self, message: Any, body: Any, ack: Any, reject: Any, callbacks: Any) -> Any:
        """Take a message; never raises for a dispatched one."""
        stamp = Stamp.parse((message.headers or {}).get(STAMP_HEADER))
        if stamp is None:
            return self.stock(message, body, ack, reject, callbacks)
        if self.ends.held.was_discarded(stamp):
            return None
        _as_sent(message)
        request = None
        try:
            request = self._request(message)
            self._receive(request, message)
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"[:1000]
            buried = self.ends.discard(stamp, "bury", reason)
            self.ends.held.ended(stamp, request)
            if not buried:
                self.ends.held.may_run(stamp)
                return None
            logger.exception(
                "Buried a message that is not a usable task: %s",
                reason,
                extra={"action": "bury", "reason": reason},
            )
        return None

    def _request(self, message: Any) -> Any:
        consumer = self.consumer
        return self.request_class(
            message,
            app=self.app,
            hostname=consumer.hostname,
            eventer=consumer.event_dispatcher,
            task=self.task,
            connection_errors=consumer.connection_errors,
            body=message.body,
            headers=message.headers,
            decoded=False,
            utc=self.app.uses_utc_timezone(),
        )

    def _receive(self, req: Any, message: Any) -> None:
        """Do what Celery's own strategy does from here on, in its order."""
        consumer = self.consumer
        data = {
            "id": req.id,
            "name": req.name,
            "args": req.argsrepr,
            "kwargs": req.kwargsrepr,
            "eta": None,
        }
        logger.info(celery_trace.LOG_RECEIVED, data, extra={"data": data})
        if message.headers.get(REVOKED_HEADER):
            worker_state.revoked.add(req.id)
        if (req.expires or req.id in worker_state.revoked) and req.revoked():
            return
        signals.task_received.send(sender=consumer, request=req)
        if req.first_copy:
            req.announce_received()
        bucket = None if consumer.disable_rate_limits else consumer.task_buckets[self.task.name]
        if bucket:
            consumer._limit_task(req, bucket, 1)
            return
        worker_state.task_reserved(req)
        for callback in consumer.on_task_message:
            callback(req)
        self.to_pool(req)


def _as_sent(message: Any) -> None:
    """Have it come as its producer had sent it, as it does on Redis: a retry is sent that way."""
    route = message.headers.pop(ROUTE_HEADER, None)
    if isinstance(route, (list, tuple)) and len(route) == 2:
        info = message.delivery_info or {}
        message.delivery_info = {**info, "exchange": route[0], "routing_key": route[1]}


def requeue_unknown_tasks(consumer: Any, ends: LedgerEnds) -> None:
    """Give back dispatched messages whose task this worker does not know.

    Where no worker is left that may know it, the ledger buries it and Celery's own handler tells
    whoever waits for the result.
    """
    stock = type(consumer).on_unknown_task

    def on_unknown_task(body: Any, message: Any, exc: Exception) -> None:
        stamp = Stamp.parse((message.headers or {}).get(STAMP_HEADER))
        if stamp is not None and not ends.discard(stamp, "unknown", str(message.headers["task"])):
            logger.warning(
                "Task %s[%s] is unknown here; it goes to a worker that knows it.",
                message.headers["task"],
                message.headers.get("id"),
                extra={"action": "requeue_unknown", "task": message.headers["task"]},
            )
            return
        stock(consumer, body, message, exc)
        if stamp is not None:
            ends.told(stamp)
            logger.warning(
                "Buried task %s[%s], which no worker of its queue knows: it was not discarded, it "
                "is in the dead letters.",
                message.headers["task"],
                message.headers.get("id"),
                extra={"action": "bury", "task": message.headers["task"]},
            )

    consumer.on_unknown_task = on_unknown_task
