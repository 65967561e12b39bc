"""What the ledger is told of a task that has ended, by what its tracer said."""

from __future__ import annotations

from traceback import format_exc
from typing import Any

from celery.exceptions import Reject
from celery.states import FAILURE

__all__ = ("is_of_greenlets", "outcome_of", "outcome_of_error")

#: The end of a failed task's traceback that its dead letter keeps.
TRACEBACK_CHARACTERS = 8000


def outcome_of(answer: Any) -> tuple[str, tuple[bytes, ...]]:
    """What the ledger is told of a task, by its tracer's answer: outcome, reason and traceback."""
    if _asks_for_requeue(getattr(answer, "retval", None)):
        return "again", ()
    failure = _failure_of(answer)
    return ("failed", failure) if failure else ("done", ())


def outcome_of_error(error: Exception, *, retried: bool) -> tuple[str, tuple[bytes, ...]]:
    """The same where the tracer has raised, in the handler of what it raised."""
    if _asks_for_requeue(error):
        return "again", ()
    if retried or isinstance(error, Reject):
        return "done", ()
    # Celery could not store the result. It takes that for the task's failure.
    return "failed", _reason_and_traceback(error, format_exc())


def is_of_greenlets(error: BaseException) -> bool:
    """Whether it is a timeout of greenlets: a hard time limit, or one that the task let out."""
    modules = ("gevent.timeout", "eventlet.timeout")
    return any(kind.__module__ in modules for kind in type(error).__mro__)


def _asks_for_requeue(result: Any) -> bool:
    """Whether it is ``Reject(requeue=True)``: the tracer returns it, or raises it from a hook."""
    error = getattr(result, "exception", result)
    error = getattr(error, "exc", error)
    return isinstance(error, Reject) and bool(getattr(error, "requeue", False))


def _failure_of(answer: Any) -> tuple[bytes, ...]:
    """Reason and traceback, if the tracer says that the task has failed for good."""
    info = getattr(answer, "info", None)
    if info is None or getattr(info, "state", None) != FAILURE:
        return ()
    return _reason_and_traceback(info.retval, str(getattr(answer.retval, "traceback", "") or ""))


def _reason_and_traceback(error: Any, traceback: str) -> tuple[bytes, ...]:
    try:
        reason = f"{type(error).__name__}: {error}"
    except Exception:  # an error that cannot even be printed
        reason = type(error).__name__
    return (
        reason[:1000].encode("utf-8", "replace"),
        traceback[-TRACEBACK_CHARACTERS:].encode("utf-8", "replace"),
    )
