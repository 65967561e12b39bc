"""What the gate runs: messages that passed it, alone or in one call; and which one is current."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol

from celery_affinity.message import Stamp

__all__ = ("BatchCall", "BatchTask", "Run", "Tracer", "current_run", "running")

Tracer = Callable[..., Any]


class Run:
    """A dispatched message that passed the gate and runs now."""

    def __init__(self, stamp: Stamp, task_id: str, retries: int, token: str) -> None:
        self.stamp = stamp
        self.task_id = task_id
        self.retries = retries
        self.token = token
        #: Messages of its own retries with their due time in ms: settled with it, not published.
        self.retry_messages: list[tuple[str, int | None]] = []
        #: Tasks that it sent and that can start only when it has ended; see waiting.py.
        self.own_tag_ids: set[str] = set()

    def retry_words(self) -> list[object]:
        """Its retries as the ledger is told of them: message, due time in ms or ""."""
        return [
            part
            for message, eta in self.retry_messages
            for part in (message, "" if eta is None else eta)
        ]


_run: ContextVar[Run | None] = ContextVar("celery_affinity_run", default=None)


def current_run() -> Run | None:
    """The run that the calling code is part of, or None."""
    return _run.get()


@contextmanager
def running(run: Run) -> Iterator[None]:
    """The block is part of that run."""
    token = _run.set(run)
    try:
        yield
    finally:
        _run.reset(token)


class BatchCall(Protocol):
    """The call of a batch task's function for several entries; see batch_calls.py."""

    def trace(self, tracer: Tracer, uuid: str, args: Any, kwargs: Any, request: Any) -> Any:
        """Have all entries traced; what the tracer says of the first."""

    def ends(
        self, run: Run, outcome: str, words: Sequence[object]
    ) -> list[tuple[str, str, Sequence[object]]]:
        """What `settle_batch` is told of each entry."""


class BatchTask(Protocol):
    """A task that takes what waits behind it."""

    name: str
    most_bytes: int

    def call(
        self, run: Run, request: Mapping[str, Any], found: Sequence[tuple[str, bytes]]
    ) -> BatchCall:
        """The call for a first entry and those that joined it (entry, message)."""
