"""Messages of RabbitMQ as the ledger keeps them, and back."""

from __future__ import annotations

import json
from base64 import b64decode, b64encode
from collections.abc import Mapping
from hashlib import blake2b
from typing import Any

from amqp import Message

from celery_affinity.message import ROUTE_HEADER

__all__ = ("enveloped", "unwrapped")

#: Headers with which RabbitMQ counts deliveries: they differ between copies of one message.
COUNTERS = frozenset(("x-delivery-count", "x-acquired-count"))
#: Properties that a message keeps on its way. (An expiration would be that of its way only.)
KEPT = frozenset(("correlation_id", "reply_to", "priority", "message_id", "type", "app_id"))


def _plain(value: Any) -> Any:
    """What JSON does not know: AMQP tables may hold bytes and times."""
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def enveloped(message: Any) -> tuple[bytes, str]:
    """A message of RabbitMQ as the ledger keeps it, and its identity.

    Arguments:
        message: py-amqp's, not decoded.
    """
    properties: dict[str, Any] = dict(message.properties)
    found = properties.pop("application_headers", None) or {}
    headers = {key: value for key, value in found.items() if key not in COUNTERS}
    body = message.body.encode() if isinstance(message.body, str) else message.body
    content = {
        "headers": headers,
        "body": b64encode(body).decode(),
        "content-type": properties.pop("content_type", None) or "",
        "content-encoding": properties.pop("content_encoding", None) or "utf-8",
    }
    text = json.dumps([content, properties], default=_plain, sort_keys=True)
    identity = blake2b(text.encode(), digest_size=16).hexdigest()
    info = message.delivery_info
    route = {"exchange": info.get("exchange") or "", "routing_key": info.get("routing_key") or ""}
    content["properties"] = {
        **properties,
        "priority": properties.get("priority") or 0,
        "delivery_info": route,
        "body_encoding": "base64",
        "delivery_tag": identity,
    }
    return json.dumps(content, default=_plain).encode(), identity


def unwrapped(raw: bytes, *, durable: bool, message_id: str | None = None) -> Any:
    """The ledger's message as py-amqp's. One for a worker says how its producer had sent it."""

    found: Mapping[str, Any] = json.loads(raw)
    properties = found["properties"]
    headers = dict(found["headers"])
    if not durable:
        route = properties.get("delivery_info") or {}
        headers[ROUTE_HEADER] = [route.get("exchange") or "", route.get("routing_key") or ""]
    kept = {name: value for name, value in properties.items() if name in KEPT and value is not None}
    if message_id is not None:
        kept["message_id"] = message_id
    body = found["body"]
    return Message(
        b64decode(body) if properties.get("body_encoding") == "base64" else body.encode(),
        application_headers=headers,
        content_type=found.get("content-type"),
        content_encoding=found.get("content-encoding"),
        delivery_mode=2 if durable else 1,
        **kept,
    )
