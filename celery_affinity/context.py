"""What a running task can ask about the lease it runs under."""

from __future__ import annotations

from contextvars import ContextVar, Token
from dataclasses import dataclass

__all__ = ("AffinityContext", "current")


@dataclass(frozen=True)
class AffinityContext:
    """The lease under which the current task runs."""

    tag: str
    #: The lease's number. Grows with each lease of the queue: fence your own writes with it.
    epoch: int
    #: Place of this task in the lease's batch, from 1.
    place: int
    #: Which start of this entry this is, from 1; above 1 after a crash.
    attempt: int
    queue: str
    #: Node name of the worker.
    worker: str
    slot: int
    entry: int
    #: True when the task was called eagerly: nothing is held, epoch is 0.
    eager: bool = False


_current: ContextVar[AffinityContext | None] = ContextVar("celery_affinity", default=None)


def current() -> AffinityContext | None:
    """The lease the calling task runs under; None outside of an affinity task."""
    return _current.get()


def enter(context: AffinityContext) -> Token[AffinityContext | None]:
    """Make a context the current one (used by the gate)."""
    return _current.set(context)


def leave(token: Token[AffinityContext | None]) -> None:
    """Undo `enter`."""
    _current.reset(token)
