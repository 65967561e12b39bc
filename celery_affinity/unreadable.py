"""Messages that Celery or kombu cannot make a request of: they must not end the worker.

In stock Celery a body that is no base64, a header ``task`` that is a list or a missing id raise in
the event loop: the worker ends, or reconnects for ever, and the message comes again. Here a
dispatched one is buried with the error, and any other is rejected, as Celery does with a task that
is not valid.

Two touches, checked on celery 5.7.0 and kombu 5.7.0: the class of which the consumer's channel
makes messages (a channel without one is left alone) and the consumer's ``create_task_handler``.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

from celery.exceptions import InvalidTaskError

from celery_affinity.held import Held
from celery_affinity.message import STAMP_HEADER, Stamp
from celery_affinity.no_acks import settle_nothing

__all__ = ("check_limits", "survive_unreadable")

logger = logging.getLogger(__name__)


class Buries(Protocol):
    """What is told of a dispatched message that cannot be read."""

    held: Held

    def discard(self, stamp: Stamp, verdict: str, reason: str = "") -> bool:
        """It ended without being started; False if another copy of it may have been."""


def survive_unreadable(consumer: Any, ends: Buries) -> None:
    """Bury or reject what this consumer cannot read. Call it before its loop starts.

    Both ways by which a message comes lead through here, so here it is seen how it was consumed.
    """
    _tolerate_bodies(consumer.task_consumer.channel)
    stock_decode_error = consumer.task_consumer.on_decode_error
    # Not the consumer's own one: after a reconnect that is the one below.
    stock_handler = partial(type(consumer).create_task_handler, consumer)

    def on_decode_error(message: Any, error: Exception) -> None:
        settle_nothing(message)
        if not _bury(ends, message, error):
            stock_decode_error(message, error)

    def create_task_handler(*args: Any, **options: Any) -> Callable[[Any], Any]:
        receive = stock_handler(*args, **options)

        def on_task_received(message: Any) -> Any:
            settle_nothing(message)
            try:
                if isinstance(message.headers, dict):
                    check_limits(message.headers)
                return receive(message)
            except MemoryError:
                raise
            except Exception as error:
                # kombu counts a KeyError among the errors of a lost connection.
                if isinstance(error, consumer.connection_errors) and not isinstance(
                    error, (KeyError, ValueError)
                ):
                    raise
                if not _bury(ends, message, error):
                    _reject(consumer, message, error)

        return on_task_received

    consumer.task_consumer.on_decode_error = on_decode_error
    consumer.create_task_handler = create_task_handler


def check_limits(headers: dict[str, Any]) -> None:
    """Refuse time limits that the pool would stumble over once it has a slot for the task.

    Raises:
        InvalidTaskError: If they are not two numbers (or null).
    """
    limits = headers.get("timelimit")
    if not limits:
        return
    if (
        not isinstance(limits, (list, tuple))
        or len(limits) != 2
        or any(isinstance(x, bool) or not isinstance(x, (int, float, type(None))) for x in limits)
    ):
        raise InvalidTaskError(f"timelimit is {limits!r:.80}, expected two numbers or nulls")


def _tolerate_bodies(channel: Any) -> None:
    """Have messages whose body cannot be decoded come as messages with an error."""
    stock = getattr(channel, "Message", None)
    if stock is None or getattr(stock, "celery_affinity", False):
        return

    class Message(stock):  # type: ignore[misc,valid-type]
        celery_affinity = True

        def __init__(self, payload: Any, channel: Any = None, **options: Any) -> None:
            try:
                super().__init__(payload, channel=channel, **options)
            except Exception:
                error = sys.exc_info()
                properties = {"delivery_tag": "", **(payload.get("properties") or {})}
                emptied = {**payload, "body": "", "properties": properties}
                super().__init__(emptied, channel=channel, **options)
                self.errors.append(error)

    channel.Message = Message


def _bury(ends: Buries, message: Any, error: Exception) -> bool:
    """Bury a dispatched message; False if it is not one."""
    headers = message.headers if isinstance(message.headers, dict) else {}
    stamp = Stamp.parse(headers.get(STAMP_HEADER))
    if stamp is None:
        return False
    reason = f"{type(error).__name__}: {error}"[:1000]
    if not ends.discard(stamp, "bury", reason):
        ends.held.may_run(stamp)
        return True
    logger.error(
        "Buried a message that cannot be read: %s",
        reason,
        extra={"action": "bury", "reason": reason},
    )
    return True


def _reject(consumer: Any, message: Any, error: Exception) -> None:
    if message.acknowledged:
        logger.error(
            "A message was not a usable task: %.200r",
            message.headers,
            exc_info=error,
            extra={"action": "reject_unreadable"},
        )
    else:
        consumer.on_invalid_task(None, message, error)
