"""The failure of a buried task: what its caller, its errbacks and its chord learn."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from celery.app.task import Context

from celery_affinity.exceptions import BuriedError
from celery_affinity.message import decoded_body

__all__ = ("fail_buried",)


def fail_buried(app: Any, message: Mapping[str, Any], reason: str) -> None:
    """Store FAILURE for a buried message, as far as it names a task, and do what follows from it.

    Arguments:
        message: As much of it as could be read.
        reason: Why it was buried.

    Raises:
        Exception: Of the result backend, if that cannot be reached.
    """
    headers = message.get("headers")
    task_id = headers.get("id") if isinstance(headers, dict) else None
    if not isinstance(headers, dict) or not isinstance(task_id, str):
        return
    task = app.tasks.get(headers.get("task"))
    backend = app.backend if task is None else task.backend
    backend.mark_as_failure(
        task_id,
        BuriedError(reason),
        request=_context(app, message, headers),
        store_result=not headers.get("ignore_result"),
    )


def _context(app: Any, message: Mapping[str, Any], headers: Mapping[str, Any]) -> Context:
    """What Celery's backend asks of a request, from headers and body."""
    try:
        args, kwargs, embed = decoded_body(message, app.conf.accept_content)
    except Exception:
        # With a body that cannot be read there are no errbacks.
        return Context({**headers, "delivery_info": {}})
    properties = message.get("properties") or {}
    return Context(
        {
            **headers,
            **(embed if isinstance(embed, dict) else {}),
            "args": args,
            "kwargs": kwargs,
            "correlation_id": properties.get("correlation_id"),
            "reply_to": properties.get("reply_to"),
            "delivery_info": properties.get("delivery_info") or {},
        }
    )
