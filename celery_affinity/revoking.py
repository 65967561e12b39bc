"""Revoked tasks that wait in the ledger.

Celery tells living workers of a revoke, and they forget it when they stop. Here a task can wait
for longer than any worker lives, so the ledger keeps a note; a dispatched message carries it, and
its worker then does what Celery does with a revoked task.

Crash window: between the note and the broadcast only the note is there: what waits does not run,
what runs is not terminated, and the caller has had no answer (test_a_revoke_fails_as_celerys_does).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from celery.utils.imports import symbol_by_name
from kombu.exceptions import OperationalError
from redis.exceptions import RedisError

__all__ = ("note_revokes",)

#: Ids that one script notes at most.
BATCH = 1000


def note_revokes(app: Any, note: Callable[[list[str]], None]) -> None:
    """Have the app's revokes noted too, whoever makes them: results, Flower, `celery control`."""
    stock: type[Any] = symbol_by_name(app.control_cls)

    class Control(stock):  # type: ignore[misc]
        """The app's remote control."""

        def broadcast(
            self,
            command: str,
            arguments: Mapping[str, Any] | None = None,
            *args: Any,
            **options: Any,
        ) -> Any:
            """Note the ids of a revoke in the ledger, then tell the workers."""
            if command not in ("revoke", "terminate"):
                return super().broadcast(command, arguments, *args, **options)
            failed = None
            try:
                ids = _ids({**(arguments or {}), **options}.get("task_id"))
                for first in range(0, len(ids), BATCH):
                    note(ids[first : first + BATCH])
            except RedisError as error:
                # The broker is the same server: let it fail in Celery's own way.
                failed = error
            answer = super().broadcast(command, arguments, *args, **options)
            if failed is not None:
                raise OperationalError(
                    f"workers were told of the revoke, but the ledger could not note it ({failed})"
                    ": revoke again, or a worker that starts later may run the task"
                ) from failed
            return answer

    app.control_cls = Control
    app.__dict__.pop("control", None)


def _ids(task_id: Any) -> list[str]:
    if task_id is None:
        return []
    return [task_id] if isinstance(task_id, str) else [str(one) for one in task_id]
