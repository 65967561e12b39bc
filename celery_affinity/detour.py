"""Affinity tasks that reached a worker past the ledger: sent to an ordinary queue by mistake.

They go to their pending queue, and from there through the ledger, instead of running beside it.

Crash window: between the publish and the ack the message is in both queues, and may be admitted
twice: delivery is at least once (test_an_affinity_task_in_an_ordinary_queue_takes_the_detour).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from celery_affinity.message import STAMP_HEADER, TAG_HEADER, Stamp

__all__ = ("to_pending_queue",)

logger = logging.getLogger(__name__)

#: Properties of a message that its copy keeps.
KEPT = ("correlation_id", "reply_to", "priority", "delivery_mode", "expiration")


def to_pending_queue(app: Any, task_name: str, pending: str, stock: Any, errors: Any) -> Any:
    """The strategy of an affinity task: a message without the ledger's stamp is passed on.

    Arguments:
        stock: The strategy for dispatched messages.
        errors: The connection's errors, for the ack.
    """

    def handler(message: Any, body: Any, ack: Any, reject: Any, callbacks: Any) -> Any:
        headers = message.headers or {}
        if Stamp.parse(headers.get(STAMP_HEADER)):
            return stock(message, body, ack, reject, callbacks)
        try:
            _publish(app, message, headers, pending)
        except Exception:
            logger.exception(
                "Could not pass task %s[%s] on to %r; it goes back to its queue.",
                task_name,
                headers.get("id"),
                pending,
                extra={"action": "detour_failed", "queue": pending},
            )
            reject(logger, errors, True)
        else:
            logger.warning(
                "Task %s[%s] came by queue %r, past the ledger; passed on to %r. Send it there.",
                task_name,
                headers.get("id"),
                (message.delivery_info or {}).get("routing_key"),
                pending,
                extra={"action": "detour", "queue": pending, "task_id": headers.get("id")},
            )
            ack(logger, errors)
        return None

    return handler


def _publish(app: Any, message: Any, headers: Mapping[str, Any], pending: str) -> None:
    properties: Mapping[str, Any] = message.properties or {}
    kept = {name: properties[name] for name in KEPT if properties.get(name) is not None}
    if TAG_HEADER not in headers and properties.get(TAG_HEADER) is not None:
        headers = {**headers, TAG_HEADER: properties[TAG_HEADER]}
    queue = app.amqp.queues[pending]
    with app.producer_pool.acquire(block=True) as producer:
        producer.publish(
            message.body,
            exchange=queue.exchange,
            routing_key=queue.routing_key,
            declare=[queue],
            headers=headers,
            content_type=message.content_type,
            content_encoding=message.content_encoding,
            **kept,
        )
