"""Messages that are consumed without acks, as those of worker queues are: nobody settles them.

Celery does so in many places: of an unknown or invalid task, of a body that it cannot decode, of
a `Reject`. On AMQP kombu ignores an ack of such a message, but not a reject or requeue: RabbitMQ
closes the channel over it (406, unknown delivery tag), and what the worker has not acked of
ordinary queues runs twice. On Redis each is a command in vain, and the tag is kept in memory.

One touch, checked on kombu 5.7.0 and 5.4.2: a message's `ack`, `reject` and `requeue`, to which all
other ways of it lead. A transport that does not tell how it was consumed is left alone.
"""

from __future__ import annotations

from typing import Any

__all__ = ("settle_nothing",)


def settle_nothing(message: Any) -> None:
    """Have nothing come of an ack, reject or requeue, if the message was consumed without acks.

    Call it when the message is received: only then each transport can tell.
    """
    if _is_without_acks(message):
        message.ack = message.reject = message.requeue = _nothing


def _is_without_acks(message: Any) -> bool:
    channel = message.channel
    consumers = getattr(channel, "no_ack_consumers", None)
    if consumers is not None:  # AMQP
        return message.delivery_info.get("consumer_tag") in consumers
    try:
        channel.qos.get(message.delivery_tag)  # a virtual transport's, such as that of Redis
    except (KeyError, TypeError):  # or a tag that nothing can be kept under
        return True
    except AttributeError:
        pass
    return False


def _nothing(*args: object, **options: object) -> None:
    return None
