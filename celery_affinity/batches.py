"""Batch tasks: a function that is given several requests, as the body of a Celery task.

Celery's tracer runs the body once for each task. The body calls the function when it is asked for
the first result of a call, and hands out one result at a time: as a value, or raised.

Does not: know where the requests come from (batch_calls.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import partial, wraps
from typing import Any

from celery.exceptions import Retry

from celery_affinity.exceptions import BatchResultError

__all__ = ("Asked", "BatchFunction", "BatchRequest", "asked", "batch_body", "results_of")


@dataclass(frozen=True)
class RetryLater:
    """What a batch function returns for an entry that is to be tried again."""

    options: Mapping[str, Any]


@dataclass(frozen=True)
class BatchRequest:
    """One of the tasks that a batch task's function is called with."""

    #: Its task id; None in a direct call of the task.
    id: str | None
    #: The task's name.
    name: str
    args: Sequence[Any]
    kwargs: Mapping[str, Any]
    #: How often it was retried.
    retries: int = 0
    #: All that ``self.request`` of a task of its own would have: headers, links, delivery info.
    request_dict: Mapping[str, Any] = field(default_factory=dict, repr=False)

    def retry(
        self,
        exc: Exception | None = None,
        *,
        countdown: float | None = None,
        eta: Any = None,
        max_retries: int | None = None,
        **options: Any,
    ) -> RetryLater:
        """To be returned as this entry's result: try it again. Takes what `Task.retry` takes.

        Past its retries it fails with `exc`, or with `MaxRetriesExceededError`.
        """
        given = {"exc": exc, "countdown": countdown, "eta": eta, "max_retries": max_retries}
        return RetryLater({**{k: v for k, v in given.items() if v is not None}, **options})

    @classmethod
    def of(cls, task: Any, args: Any, kwargs: Any, request: Mapping[str, Any]) -> BatchRequest:
        """That of one task's request."""
        return cls(request.get("id"), task.name, args, kwargs, request.get("retries") or 0, request)


BatchFunction = Callable[[Sequence[BatchRequest]], Any]


@dataclass(frozen=True)
class _Raised:
    error: Exception
    traceback: Any


def results_of(fun: BatchFunction, requests: Sequence[BatchRequest]) -> list[Any]:
    """Call the function; the result of each request, or the error that ended the call before it."""
    found: list[Any] = []
    try:
        returned = fun(list(requests))
        if returned is None:
            return [None] * len(requests)
        if not isinstance(returned, Iterable) or isinstance(returned, (str, bytes, Mapping, set)):
            raise BatchResultError(requests[0].name, type(returned).__name__, len(requests))
        for result in returned:
            found.append(result)
            if len(found) > len(requests):
                break
        if len(found) != len(requests):
            # Whose they are is not known: none of them counts.
            count = f"more than {len(requests)}" if len(found) > len(requests) else len(found)
            found = []
            raise BatchResultError(requests[0].name, f"{count} results", len(requests))
    except Exception as error:
        rest = len(requests) - len(found)
        found.extend([_Raised(error, error.__traceback__)] * rest)
    return found


def _hand_out(task: Any, result: Any, joint: bool) -> Any:
    """Return one entry's result, or raise it, where Celery's tracer waits for it.

    Arguments:
        joint: Whether others had the same call. What `self.retry` raised in it is then the wish to
            retry each of them, and has published nothing.
    """
    error = result.error if isinstance(result, _Raised) else result
    if isinstance(result, RetryLater):
        raise task.retry(**result.options)
    if joint and isinstance(error, Retry):
        when = "countdown" if isinstance(error.when, (int, float)) else "eta"
        raise task.retry(exc=error.exc, **{when: error.when})
    if isinstance(result, _Raised):
        raise result.error.with_traceback(result.traceback)
    if isinstance(result, Exception):
        raise result
    return result


def batch_body(fun: Callable[..., Any], bind: bool) -> Callable[..., Any]:
    """The body, bound to its task, of a batch task with this function."""

    @wraps(fun)
    def run(self: Any, *args: Any, **kwargs: Any) -> Any:
        function = partial(fun, self) if bind else fun
        wanted = asked.get()
        if wanted is not None and wanted.is_for(self):
            asked.set(None)
            return _hand_out(self, wanted.result(function), joint=True)
        alone = BatchRequest.of(self, args, kwargs, self.request.__dict__)
        return _hand_out(self, results_of(function, [alone])[0], joint=False)

    # Calls are checked against this signature, not against that of the function.
    del run.__wrapped__
    return run


@dataclass(frozen=True)
class Asked:
    """Whose result the tracer asks for, in a call that several share."""

    request: BatchRequest
    #: Its result; calls the function given if nobody has yet.
    result: Callable[[BatchFunction], Any]

    def is_for(self, task: Any) -> bool:
        """Not so in a direct call of another batch task, or of the same."""
        return (self.request.name, self.request.id) == (task.name, task.request.id)


asked: ContextVar[Asked | None] = ContextVar("celery_affinity_batch", default=None)
