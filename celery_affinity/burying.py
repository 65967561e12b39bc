"""Whoever waits for the result of a buried message learns that there will be none.

As with a task that failed: state FAILURE, errbacks, the chord or chain that it is part of. In a
thread of its own: a backend that does not answer, or an errback that takes long (Celery calls one
that takes more than the id, instead of sending it), must not cost the scheduler its term.

Crash window: a process that ends between the burial and the failure leaves the result PENDING; the
dead letter is there.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping
from queue import SimpleQueue
from typing import Any

from celery.app.task import Context

from celery_affinity.exceptions import TagError
from celery_affinity.message import decoded_body

__all__ = ("BuriedResults",)

logger = logging.getLogger(__name__)


class BuriedResults:
    """Stores the failures of messages that the intake buried."""

    def __init__(self, app: Any) -> None:
        self._app = app
        self._waiting: SimpleQueue[tuple[Mapping[str, Any], str]] = SimpleQueue()
        self._thread: threading.Thread | None = None

    def fail(self, message: Mapping[str, Any], reason: str) -> None:
        """Store the failure soon.

        Arguments:
            message: The message, as far as it could be read.
        """
        self._waiting.put((message, reason))
        if self._thread is None:
            self._thread = threading.Thread(
                target=self._run, name="affinity-buried", daemon=True
            )
            self._thread.start()

    def _run(self) -> None:
        while True:
            message, reason = self._waiting.get()
            headers = message.get("headers")
            if not isinstance(headers, dict) or not isinstance(headers.get("id"), str):
                continue
            try:
                self._store(message, headers, reason)
            except Exception:
                logger.exception(
                    "Could not store the failure of buried task %s.",
                    headers["id"],
                    extra={"action": "bury_failed", "task_id": headers["id"]},
                )

    def _store(self, message: Mapping[str, Any], headers: dict[str, Any], reason: str) -> None:
        task = self._app.tasks.get(headers.get("task"))
        backend = self._app.backend if task is None else task.backend
        backend.mark_as_failure(
            headers["id"],
            TagError(reason),
            request=self._request(message, headers),
            store_result=not headers.get("ignore_result"),
        )

    def _request(self, message: Mapping[str, Any], headers: dict[str, Any]) -> Context:
        """What a worker would have made of it."""
        properties = message.get("properties")
        request = {**headers, "delivery_info": {}, "hostname": None}
        if isinstance(properties, dict):
            request["correlation_id"] = properties.get("correlation_id")
            request["reply_to"] = properties.get("reply_to")
        try:
            args, kwargs, embed = decoded_body(message, self._app.conf.accept_content)
            request |= {"args": args, "kwargs": kwargs, **(embed or {})}
        except Exception as error:
            logger.debug("No errbacks for buried task %s: %s", headers["id"], error)
        return Context(request)
