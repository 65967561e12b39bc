"""The errors of celery_affinity.

AffinityError
    ConfigurationError      settings, Redis or queues that the system cannot run with
        UndeclaredQueueError    a task names a queue that no AffinityQueue declares
        AmbiguousQueueError     several queues are declared, and none was named
        SchemaVersionError      the ledger was written by an incompatible version
        ShardsError             a queue's shards were changed while tasks wait
    OperationError          an operator asked for what cannot be done now
        NoSuchWorkerError       a name fits no registered worker, or several
    TagError                a task without a usable tag (also a ValueError)
        MissingTagError         a task without any
    BatchResultError        a batch task did not return a result for each request (a TypeError)
    BuriedError             the result of a task that went to the dead letters
    OwnTagWaitError         a task waits for one that cannot start before its own end
"""

from __future__ import annotations

from celery.exceptions import ImproperlyConfigured
from click import ClickException

__all__ = (
    "AffinityError",
    "AmbiguousQueueError",
    "BatchResultError",
    "BuriedError",
    "ConfigurationError",
    "MissingTagError",
    "NoSuchWorkerError",
    "OperationError",
    "OwnTagWaitError",
    "SchemaVersionError",
    "ShardsError",
    "TagError",
    "UndeclaredQueueError",
)


class AffinityError(Exception):
    """Base of all errors of this package.

    Each has for `args` what it was made of, so that it comes unharmed out of a pool's process and
    through a result backend.
    """


class ConfigurationError(AffinityError, ImproperlyConfigured, ClickException):
    """Settings, Redis or queues that the system cannot run with.

    A click error too: ``celery worker`` and ``celery beat`` then show the text, not a traceback.
    """


class UndeclaredQueueError(ConfigurationError):
    """A task names a queue that no AffinityQueue declares."""

    def __init__(self, queue: str, declared: list[str], task: str | None = None) -> None:
        names = ", ".join(repr(name) for name in declared) or "none"
        if task is None:
            text = f"{queue!r} is not an affinity queue (declared: {names})"
        else:
            text = (
                f"affinity task {task!r} is sent to queue {queue!r}, which is not an affinity "
                f"queue (declared: {names}). Declare it with Affinity(app, queues=["
                f"AffinityQueue({queue!r}), ...]) or give the task one of the declared queues."
            )
        super().__init__(text)
        self.args = (queue, declared, task)


class AmbiguousQueueError(ConfigurationError):
    """Several queues are declared (or none), and none was named."""

    def __init__(self, declared: list[str]) -> None:
        names = ", ".join(repr(name) for name in declared) or "none"
        super().__init__(f"which affinity queue is not said (declared: {names}): name it (--queue)")
        self.args = (declared,)


class OperationError(AffinityError, ClickException):
    """An operator asked for what cannot be done now."""


class NoSuchWorkerError(OperationError):
    """A worker's name fits none that is registered, or several."""

    def __init__(self, name: str, workers: list[tuple[str, str]]) -> None:
        known = ", ".join(f"{node!r} ({incarnation})" for node, incarnation in workers) or "none"
        super().__init__(
            f"{name!r} names no single worker (candidates: {known}): give a node's whole name, or "
            "the id in brackets"
        )
        self.args = (name, workers)


class SchemaVersionError(ConfigurationError):
    """The ledger was written by an incompatible version."""

    def __init__(self, found: str, expected: str) -> None:
        super().__init__(
            f"the ledger in Redis has schema version {found}, this celery_affinity works with "
            f"{expected} and must not touch it. Run the version that wrote it until the queue is "
            f"empty, then upgrade all nodes, or give this app a `namespace` of its own."
        )
        self.args = (found, expected)


class ShardsError(ConfigurationError):
    """The ledger has what waits spread over another number of shards than the queue is set to."""

    def __init__(self, queue: str, found: int, expected: int) -> None:
        super().__init__(
            f"queue {queue!r} is set to shards={expected}, but the ledger has it over {found}, and "
            f"is not empty: its tags would be looked for elsewhere. Set shards={found} again, "
            f"requeue or purge its dead letters, `celery affinity evacuate {queue}`, then change "
            "it and `resume`"
        )
        self.args = (queue, found, expected)


class TagError(AffinityError, ValueError):
    """A task without a usable tag."""


class MissingTagError(TagError):
    """A task without a tag, in a queue whose tasks need one."""


class BuriedError(AffinityError):
    """The result of a task that went to the dead letters, with the reason."""


class BatchResultError(AffinityError, TypeError):
    """A batch task's function returned something else than a result for each of its requests."""

    def __init__(self, task: str, found: str, expected: int) -> None:
        super().__init__(task, found, expected)

    def __str__(self) -> str:
        """What was found and what to do."""
        task, found, expected = self.args
        return (
            f"batch task {task!r} returned {found}, expected a list of {expected}, a result for "
            "each request in their order (an exception fails its entry, request.retry(...) "
            "retries it), or None if none has one"
        )


class OwnTagWaitError(AffinityError, RuntimeError):
    """A task waits for one of its own tag, which can start only when it has ended.

    Like Celery's own refusal of ``get()`` in a task, a RuntimeError.
    """

    def __init__(self, task_id: str, tag: str, queue: str) -> None:
        super().__init__(task_id, tag, queue)

    def __str__(self) -> str:
        """What was found and what to do."""
        task_id, tag, queue = self.args
        return (
            f"this task waits for task {task_id}, which it has sent with its own tag {tag!r} to "
            f"its own queue {queue!r}: that one cannot start before this one has ended, so both "
            "would wait for ever. Let it follow instead (link, a chain, a chord, self.replace), "
            "call its function directly, or give it another tag."
        )
