"""What a dispatched request tells Celery of itself."""

from __future__ import annotations

from typing import Any

from celery_affinity.request import DispatchedRequest


class Stock:
    """Celery's request, of a task whose process has not said yet that it runs it."""

    time_start = None
    _already_cancelled = False

    def cancel(self, pool: Any, signal: Any = None) -> None:
        """Celery notes nothing then."""


def test_a_cancelled_task_is_not_taken_for_a_revoked_one() -> None:
    """Its process may run it already; it ends as terminated, and the node's leave gives it back."""
    request = type("Request", (DispatchedRequest, Stock), {})
    one = request.__new__(request)
    one.cancel(None)
    assert one._already_cancelled
