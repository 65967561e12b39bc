"""Batch tasks: one call for the waiting entries of a tag, with a result for each.

    start (first entry) -> take (what may join it) -> the first entry's tracer
                                                          `-> the function, once, with all requests
                           the tracer of each other one <- its result, or its error
                           settle_batch (all of them) <---'

Every entry goes through Celery's own tracer, whose task's body only hands out what the one call
has yielded for it: so states, results, links, chords, retries and hooks are Celery's.

Crash windows:
- between start and take: as for any started task; only the first entry has started.
- from take to settle_batch: all entries of the call go back to the head of their tag in order, with
  a delivery more each, and then run one by one (take.lua joins none that was started before): what
  killed the process is buried alone (test_what_kills_its_process_is_buried_without_its_mates).
  Those whose SUCCESS is stored already do not run again.
- a lost reply: take and settle_batch answer a repeat as before.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import partial, wraps
from typing import Any

from celery import states
from celery.app.task import Context
from celery.exceptions import Retry, SoftTimeLimitExceeded

from celery_affinity import context
from celery_affinity.exceptions import BatchResultError
from celery_affinity.gate import Run, Tracer, current_run, outcome_of, outcome_of_error, running
from celery_affinity.message import decoded_body

__all__ = ("BatchRequest", "BatchTask", "batch_body")

logger = logging.getLogger(__name__)

#: Messages that one call gets have at most so many bytes in all, besides that of its first entry.
MOST_BYTES = 4 * 1024 * 1024


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


# The function


@dataclass(frozen=True)
class _Raised:
    error: Exception
    traceback: Any


def _results(
    fun: Callable[[Sequence[BatchRequest]], Any], requests: Sequence[BatchRequest]
) -> list[Any]:
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
        asked = _asked.get()
        if asked is not None and asked.is_for(self):
            _asked.set(None)
            return _hand_out(self, asked.call.result(asked.at, function), joint=True)
        alone = BatchRequest.of(self, args, kwargs, self.request.__dict__)
        return _hand_out(self, _results(function, [alone])[0], joint=False)

    # Calls are checked against this signature, not against that of the function.
    del run.__wrapped__
    return run


@dataclass(frozen=True)
class _Asked:
    """Whose result the tracer asks for."""

    call: Call
    at: int

    def is_for(self, task: Any) -> bool:
        """Not so in a direct call of another batch task, or of the same."""
        request = self.call.requests[self.at]
        return bool(request.name == task.name and request.id == task.request.id)


_asked: ContextVar[_Asked | None] = ContextVar("celery_affinity_batch", default=None)


# The call


@dataclass
class _Mate:
    """An entry that joined the first one of a call."""

    entry: str
    run: Run
    request: dict[str, Any]
    #: One that cannot be read has its outcome already.
    outcome: str = ""
    #: What the ledger is told besides: of a failure, or why it is buried.
    words: tuple[bytes | str, ...] = ()


class Call:
    """One call of a batch task's function, for a first entry and its mates."""

    def __init__(self, task: Any, first: BatchRequest, mates: Sequence[_Mate]) -> None:
        self._task = task
        self._mates = [mate for mate in mates if not mate.outcome]
        self._all = mates
        self.requests = [first]
        for request in (mate.request for mate in self._mates):
            self.requests.append(BatchRequest.of(task, request["args"], request["kwargs"], request))
        self._found: dict[int, Any] = {}

    def result(self, at: int, fun: Callable[[Sequence[BatchRequest]], Any]) -> Any:
        """Of the request at that place. Calls the function at the first question.

        That is not the first request's if its own hooks have failed before: the others then have
        the call without it.
        """
        if at not in self._found:
            self._note_started(at)
            found = _results(fun, self.requests[at:])
            self._found.update(enumerate(found, at))
            if run := current_run():
                # The function's `self.retry`: it is repeated for each request on its own.
                run.retry_messages.clear()
        return self._found[at]

    def _note_started(self, at: int) -> None:
        task = self._task
        for mate in self._mates[at:]:
            request = Context(mate.request)
            ignored = task.ignore_result if request.ignore_result is None else request.ignore_result
            if task.track_started and not ignored:
                about = {"pid": os.getpid(), "hostname": request.hostname}
                task.backend.store_result(request.id, about, states.STARTED, request=request)

    def trace(self, tracer: Tracer, uuid: str, args: Any, kwargs: Any, request: Any) -> Any:
        """Have the first entry traced, then the others; what the tracer says of the first."""
        try:
            answer = self._asking(0, tracer, uuid, args, kwargs, request)
        except Exception:
            self._trace_mates(tracer)
            raise
        self._trace_mates(tracer)
        return answer

    def _trace_mates(self, tracer: Tracer) -> None:
        for at, mate in enumerate(self._mates, 1):
            while not mate.outcome:
                try:
                    self._trace_mate(at, mate, tracer)
                except SoftTimeLimitExceeded:
                    continue  # meant for the function

    def _trace_mate(self, at: int, mate: _Mate, tracer: Tracer) -> None:
        request = mate.request
        first = context.current()
        assert first is not None
        stamp = mate.run.stamp
        here = context.enter(replace(first, place=stamp.place, entry=int(stamp.entry)))
        try:
            with running(mate.run):
                answer = self._asking(
                    at, tracer, request["id"], request["args"], request["kwargs"], request
                )
            mate.outcome, mate.words = outcome_of(answer)
        except SoftTimeLimitExceeded:
            raise
        except Exception as error:
            mate.outcome = outcome_of_error(error)
            logger.exception("Task %s ended with an error outside of it.", request["id"])
        finally:
            context.leave(here)

    def _asking(self, at: int, tracer: Tracer, *arguments: Any) -> Any:
        asked = _asked.set(_Asked(self, at))
        try:
            return tracer(*arguments)
        finally:
            _asked.reset(asked)

    def ends(
        self, run: Run, outcome: str, words: Sequence[object]
    ) -> list[tuple[str, str, Sequence[object]]]:
        """Of each entry what the ledger is told: its outcome, more words."""
        return [
            (run.stamp.entry, outcome, [*words, *run.retry_words()]),
            *(
                (mate.entry, mate.outcome, [*mate.words, *mate.run.retry_words()])
                for mate in self._all
            ),
        ]


class BatchTask:
    """A batch task in a process that runs it."""

    def __init__(self, task: Any) -> None:
        self._task = task
        self.name: str = task.name
        self.most_bytes = MOST_BYTES

    def call(
        self, run: Run, request: Mapping[str, Any], found: Sequence[tuple[str, bytes]]
    ) -> Call:
        """The call for a first entry and those that joined it (entry, message)."""
        first = BatchRequest.of(self._task, request["args"], request["kwargs"], request)
        mates = [
            self._read(run, place, entry, raw, request.get("hostname"))
            for place, (entry, raw) in enumerate(found, run.stamp.place + 1)
        ]
        return Call(self._task, first, mates)

    def _read(self, run: Run, place: int, entry: str, raw: bytes, hostname: Any) -> _Mate:
        stamp = replace(run.stamp, entry=entry, place=place)
        try:
            request = self._request(json.loads(raw), hostname)
            own = Run(stamp, request["id"], request.get("retries") or 0, run.token)
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"[:1000]
            logger.warning(
                "Buried an entry of a batch that is not a usable task: %s",
                reason,
                extra={"action": "bury", "entry": entry, "reason": reason},
            )
            unread = Run(stamp, "", 0, run.token)
            return _Mate(entry, unread, {}, "bury", (reason.encode("utf-8", "replace"),))
        return _Mate(entry, own, request)

    def _request(self, message: Mapping[str, Any], hostname: Any) -> dict[str, Any]:
        """What Celery's worker makes of a message for the tracer.

        Raises:
            Exception: If the message is not that of a usable task.
        """
        args, kwargs, embed = decoded_body(message, self._task.app.conf.accept_content)
        if not isinstance(args, (list, tuple)) or not isinstance(kwargs, dict):
            raise ValueError(f"found args {args!r:.80}, kwargs {kwargs!r:.80}; expected list, dict")
        if not isinstance(embed, (dict, type(None))):
            raise ValueError(f"embed is {embed!r:.80}, expected an object")
        properties = message["properties"]
        delivery = properties.get("delivery_info") or {}
        return {
            **message["headers"],
            "properties": properties,
            "reply_to": properties.get("reply_to"),
            "correlation_id": properties.get("correlation_id"),
            "hostname": hostname,
            "delivery_info": {
                "exchange": delivery.get("exchange"),
                "routing_key": delivery.get("routing_key"),
                "priority": properties.get("priority"),
                "redelivered": False,
            },
            "args": args,
            "kwargs": kwargs,
            "is_eager": False,
            **(embed or {}),
        }
