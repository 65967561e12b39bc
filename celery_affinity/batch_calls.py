"""Calls of batch tasks: one for the waiting entries of a tag, with a result for each.

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

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from celery import states
from celery.app.task import Context
from celery.exceptions import SoftTimeLimitExceeded
from celery.utils.saferepr import saferepr
from kombu.utils import json as kombu_json

from celery_affinity import context
from celery_affinity.batches import Asked, BatchFunction, BatchRequest, asked, results_of
from celery_affinity.message import decoded_body
from celery_affinity.outcomes import outcome_of, outcome_of_error
from celery_affinity.running import Run, Tracer, current_run, running

__all__ = ("EVENTS_HEADER", "BatchTask", "Mates", "mates_of")

logger = logging.getLogger(__name__)

#: Header by which a worker's parent says that somebody listens to its events.
EVENTS_HEADER = "affinity_events"
#: Messages that one call gets have at most so many bytes in all, besides that of its first entry.
MOST_BYTES = 4 * 1024 * 1024


@dataclass(frozen=True)
class Mates:
    """What a worker's parent is told of the entries of a call but the first, with its answer."""

    count: int
    #: (type, fields), if somebody listens.
    events: Sequence[tuple[str, Mapping[str, Any]]]


class _Told(str):
    """A first entry's result as text, with what is told of its mates."""

    affinity_mates: Mates | None = None


def mates_of(result: Any) -> Mates | None:
    """Of what came back from a pool process, or None."""
    return getattr(result, "affinity_mates", None)


def _with_mates(answer: Any, mates: Mates) -> Any:
    if answer.info is None:
        told = _Told(answer.retstr)
        told.affinity_mates = mates
        return answer._replace(retstr=told)
    if answer.retval is not None:
        answer.retval.affinity_mates = mates
    return answer


def _events(request: Mapping[str, Any], name: str, answer: Any) -> Iterator[tuple[str, Any]]:
    """The events that Celery's worker would have sent of an entry."""
    own = {"uuid": request["id"]}
    about = {key: request.get(key) for key in ("root_id", "parent_id", "expires")}
    received = {"name": name, "retries": request.get("retries") or 0, "eta": None, **about}
    received |= {"args": request.get("argsrepr", ""), "kwargs": request.get("kwargsrepr", "")}
    yield "task-received", {**own, **received}
    yield "task-started", own
    if answer.info is None:
        yield "task-succeeded", {**own, "result": answer.retstr, "runtime": answer.runtime}
        return
    error = answer.info.retval
    if answer.info.state in (states.FAILURE, states.RETRY):
        kind = "task-failed" if answer.info.state == states.FAILURE else "task-retried"
        cause = error.exc if kind == "task-retried" else error
        traceback = str(getattr(answer.retval, "traceback", "") or "")
        yield kind, {**own, "exception": saferepr(cause), "traceback": traceback}
    elif answer.info.state == states.REJECTED:
        yield "task-rejected", {**own, "requeue": bool(getattr(error, "requeue", False))}


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
        self._tells = EVENTS_HEADER in first.request_dict
        self._events: list[tuple[str, Any]] = []

    def result(self, at: int, fun: BatchFunction) -> Any:
        """Of the request at that place. Calls the function at the first question.

        That is not the first request's if its own hooks have failed before: the others then have
        the call without it.
        """
        if at not in self._found:
            self._note_started(at)
            found = results_of(fun, self.requests[at:])
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
        return _with_mates(answer, Mates(len(self._mates), self._events))

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
            if self._tells:
                self._events += _events(request, self._task.name, answer)
            mate.outcome, mate.words = outcome_of(answer)
        except SoftTimeLimitExceeded:
            raise
        except Exception as error:
            retried = bool(mate.run.retry_messages)
            mate.outcome, mate.words = outcome_of_error(error, retried=retried)
            logger.exception(
                "Task %s ended with an error outside of it.",
                request["id"],
                extra={"action": "task_error", "task_id": request["id"]},
            )
        finally:
            context.leave(here)

    def _asking(self, at: int, tracer: Tracer, *arguments: Any) -> Any:
        before = asked.set(Asked(self.requests[at], partial(self.result, at)))
        try:
            return tracer(*arguments)
        finally:
            asked.reset(before)

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
            request = self._request(kombu_json.loads(raw), hostname)
            own = Run(stamp, request["id"], request.get("retries") or 0, run.token)
        except SoftTimeLimitExceeded:  # meant for the call, which has not begun
            return self._read(run, place, entry, raw, hostname)
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
