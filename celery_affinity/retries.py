"""A task's own retry, kept for its settle instead of being published."""

from __future__ import annotations

from typing import Any

from celery_affinity.context import current
from celery_affinity.message import TAG_HEADER, due_ms, envelope
from celery_affinity.running import Run

__all__ = ("RetryCatcher",)


class RetryCatcher:
    """Stands in for the producer while a task publishes its own retry."""

    def __init__(self, producer: Any, run: Run, pending: str, serializer: str) -> None:
        self._producer = producer
        self._run = run
        self._pending = pending
        self._serializer = serializer
        self.connection = producer.connection

    def publish(self, body: Any, **options: Any) -> Any:
        """Keep the retry; pass on whatever else is published on the way (events)."""
        headers = options.get("headers") or {}
        if headers.get(TAG_HEADER) is None and (lease := current()) is not None:
            headers = {**headers, TAG_HEADER: lease.tag}  # self.retry(headers=...) has its own only
        if headers.get("id") != self._run.task_id or "task" not in headers:
            return self._producer.publish(body, **options)
        properties = {
            name: value
            for name, value in options.items()
            if name in ("correlation_id", "reply_to", "priority", "delivery_mode", "expiration")
            and value is not None
        }
        if "expiration" in properties:  # as kombu's producer would have it
            properties["expiration"] = str(int(properties["expiration"] * 1000))
        message = envelope(
            body,
            headers,
            properties,
            serializer=options.get("serializer") or self._serializer,
            compression=options.get("compression"),
            routing_key=self._pending,
        )
        self._run.retry_messages.append((message, due_ms(headers.get("eta"))))
        return None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._producer, name)
