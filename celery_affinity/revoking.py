"""Revoked tasks that wait in the ledger.

Celery tells living workers of a revoke, and they forget it when they stop. Here a task can wait
for longer than any worker lives, so the ledger keeps a note; a dispatched message carries it, and
its worker then does what Celery does with a revoked task.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from celery.utils.imports import symbol_by_name

__all__ = ("note_revokes",)


def note_revokes(app: Any, note: Callable[[list[str]], None]) -> None:
    """Have `app.control.revoke` (and whatever calls it: results, Flower) note the ids too."""
    stock: type[Any] = symbol_by_name(app.control_cls)

    class Control(stock):  # type: ignore[misc]
        """The app's remote control."""

        def revoke(self, task_id: Any, *args: Any, **kwargs: Any) -> Any:
            """Note the ids in the ledger, then tell the workers."""
            note([task_id] if isinstance(task_id, str) else [str(one) for one in task_id])
            return super().revoke(task_id, *args, **kwargs)

    app.control_cls = Control
    app.__dict__.pop("control", None)
