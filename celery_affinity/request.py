"""A dispatched message's request in the worker's parent: what is seen of it, how it ends there.

It is neither acked nor rejected, its due time is over, and of a copy that the gate refuses nothing
is seen.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

from billiard.exceptions import Terminated, TimeLimitExceeded, WorkerLostError
from celery.concurrency.base import BasePool
from celery.exceptions import InvalidTaskError
from celery.worker import state as worker_state

from celery_affinity import processes
from celery_affinity.batch_calls import EVENTS_HEADER, Mates, mates_of
from celery_affinity.gate import REFUSED
from celery_affinity.held import Held
from celery_affinity.limits import HardLimit
from celery_affinity.message import STAMP_HEADER, TAG_HEADER, Stamp

__all__ = ("DispatchedRequest", "LedgerEnds")

logger = logging.getLogger(__name__)


class LedgerEnds(Protocol):
    """What the parent tells the ledger; never raises."""

    held: Held

    def discard(self, stamp: Stamp, verdict: str, reason: str = "") -> bool:
        """It ended without being started. False if it was requeued, for another worker
        ("unknown"), or had been started before ("bury").
        """

    def finish(self, stamp: Stamp) -> None:
        """It was ended while it ran; its process is being stopped."""

    def past_limit(self, stamp: Stamp, answered: Callable[[int], None]) -> None:
        """Its hard time limit is over; its process is being stopped. Answers at once, or from the
        heartbeat's thread, what finish.lua does.
        """

    def process_lost(self, stamp: Stamp) -> str:
        """Its process is gone: settled, requeued or buried."""

    def told(self, stamp: Stamp) -> None:
        """Whoever waits for the result of what was buried on this node's word has been told."""


def _noop(*args: object, **kwargs: object) -> None:
    return None


class _TooLate(Exception):
    """A revoked task may have started."""


class DispatchedRequest:
    """Mixed over the class that Celery makes of the task's Request, for dispatched messages."""

    affinity_ends: LedgerEnds
    #: Whether tasks run in this process: one over its limit has ended when that is reported.
    affinity_in_process: bool
    affinity_pool: Any = None
    id: str
    name: str
    task: Any
    _eventer: Any
    _payload: Any
    argsrepr: str
    kwargsrepr: str
    root_id: str | None
    parent_id: str | None
    request_dict: dict[str, Any]
    expires: Any
    _already_cancelled: bool
    _already_revoked: bool
    worker_pid: int
    _limit: HardLimit | None = None

    def __init__(self, message: Any, **options: Any) -> None:
        stamp = Stamp.parse(message.headers.get(STAMP_HEADER))
        assert stamp is not None
        self.affinity_stamp = stamp
        quiet = {**options, "on_ack": _noop, "on_reject": _noop}
        super().__init__(message, **quiet)  # type: ignore[call-arg]
        self._check_payload()
        self._eta = None  # it was due when it was dispatched
        if self._tells():
            self.request_dict[EVENTS_HEADER] = True
        held = self.affinity_ends.held
        self.announced = held.was_refused(stamp)
        held.arrived(stamp, self)

    def _check_payload(self) -> None:
        """Refuse what would raise in the pool process before its gate, where nobody catches it."""
        args, kwargs, embed = self._payload
        if not isinstance(args, (list, tuple)):
            raise InvalidTaskError(f"args are {args!r:.80}, expected a list")
        if not isinstance(kwargs, dict):
            raise InvalidTaskError(f"kwargs are {kwargs!r:.80}, expected an object: not a mapping")
        if not isinstance(embed, (dict, type(None))):
            raise InvalidTaskError(f"embed is {embed!r:.80}, expected an object")

    def _tells(self) -> bool:
        """Whether somebody listens to this worker's events."""
        return bool(self._eventer and self._eventer.enabled and self.task.send_events)

    @property
    def first_copy(self) -> bool:
        """Whether events are sent as they happen; a later copy's wait until it was accepted."""
        return not self.affinity_stamp.resent

    def announce_received(self) -> None:
        """Send the event that a task was received, once for all copies that this node gets."""
        if self.announced or not (self._eventer and self._eventer.enabled):
            return
        self.announced = True
        if self.task.send_events:
            self._eventer.send(
                "task-received",
                uuid=self.id,
                name=self.name,
                args=self.argsrepr,
                kwargs=self.kwargsrepr,
                root_id=self.root_id,
                parent_id=self.parent_id,
                retries=self.request_dict.get("retries", 0),
                eta=None,
                expires=self.expires and self.expires.isoformat(),
                **self._tag_field(),
            )

    def taken(self) -> None:
        """It is in the pipe of a process, which has not said yet that it runs it."""
        self.affinity_ends.held.accepted(self.affinity_stamp, self)

    def on_accepted(self, pid: int, time_accepted: float) -> None:
        """The pool has taken it."""
        self.affinity_ends.held.accepted(self.affinity_stamp, self)
        super().on_accepted(pid, time_accepted)  # type: ignore[misc]

    def send_event(self, type: str, **fields: Any) -> None:
        """Send an event, except of a later copy before its gate has opened."""
        if type == "task-started" and not self.first_copy:
            return
        super().send_event(type, **fields, **self._tag_field())  # type: ignore[misc]

    def _tag_field(self) -> dict[str, Any]:
        """The tag as a field of events. All have it: a monitor may have missed the first ones."""
        return {TAG_HEADER: self.request_dict.get(TAG_HEADER)}

    def on_success(self, result: tuple[Any, Any, Any], **kwargs: Any) -> None:
        """The tracer has returned: the task ended, or the gate refused this copy."""
        if not isinstance(result, tuple):
            # What a pool without processes makes of a SystemExit in a task.
            self.on_failure(result)
            return
        failed, retval, _ = result
        if not failed and retval == REFUSED:
            if self.announced:
                self.affinity_ends.held.refused(self.affinity_stamp)
            self._vanish()
            return
        if not self.first_copy:
            self.announce_received()
            super().send_event("task-started", **self._tag_field())  # type: ignore[misc]
        try:
            super().on_success(result, **kwargs)  # type: ignore[misc]
            self._tell_of_mates(mates_of(retval))
        finally:
            self._ended()

    def _tell_of_mates(self, mates: Mates | None) -> None:
        """Count those that shared the call of a batch task, and send their events."""
        if mates is None:
            return
        worker_state.total_count.update({self.name: mates.count})
        worker_state.all_total_count[0] += mates.count
        for kind, fields in mates.events:
            if self._eventer and self._eventer.enabled:
                self._eventer.send(kind, **fields)

    def on_failure(
        self, exc_info: Any, send_failed_event: bool = True, return_ok: bool = False
    ) -> None:
        """It failed, or its process is gone: then the ledger says whether it runs again."""
        error = exc_info.exception
        error = getattr(error, "exc", error)
        if isinstance(error, TimeLimitExceeded) and not return_ok:
            stock = super().on_failure  # type: ignore[misc]
            self._past_limit(partial(stock, exc_info, send_failed_event, return_ok))
            return
        lost = isinstance(error, (WorkerLostError, SystemExit)) or self._died_for_another(error)
        buried = lost and not return_ok
        if buried:
            verdict = self.affinity_ends.process_lost(self.affinity_stamp)
            if verdict != "buried":
                logger.warning(
                    "The process of task %s[%s] is gone (%s); the task is %s.",
                    self.name,
                    self.id,
                    error,
                    verdict,
                    extra={"action": "process_lost", "verdict": verdict},
                )
                self._vanish()
                return
            logger.warning(
                "Buried task %s[%s]: its process is gone (%s), and it is not to run again.",
                self.name,
                self.id,
                error,
                extra={"action": "bury", "task_id": self.id, "reason": str(error)},
            )
            fail = never_requeued(self.task, super().on_failure)  # type: ignore[misc]
        elif not return_ok and self._never_started(error):
            # The pool process could not read it; the leader tells whoever waits for its result.
            self._vanish()
            return
        else:
            fail = super().on_failure  # type: ignore[misc]
        try:
            fail(exc_info, send_failed_event, return_ok)
            # Of one that a cold stop has cancelled Celery tells nothing: the leader does.
            if buried and not self._already_cancelled:
                self.affinity_ends.told(self.affinity_stamp)
        finally:
            self._ended()

    def _died_for_another(self, error: Exception) -> bool:
        """Whether its process was terminated for the sake of the task before it.

        A cold stop and a revoke kill the process of a task that has just ended, where the parent
        has not read so yet; that one runs the next task already. Celery takes it for revoked.
        """
        meant = self._already_cancelled or self._already_revoked
        return isinstance(error, Terminated) and not meant

    def _never_started(self, error: Exception) -> bool:
        if isinstance(error, Terminated):
            return False
        reason = f"{type(error).__name__}: {error}"[:1000]
        return self.affinity_ends.discard(self.affinity_stamp, "bury", reason)

    def on_timeout(self, soft: bool, timeout: float) -> None:
        """A time limit is over; past the hard one the process is killed."""
        tell = partial(super().on_timeout, soft, timeout)  # type: ignore[misc]
        if soft:
            tell()
        else:
            self._past_limit(tell)

    def _past_limit(self, tell: Callable[[], object]) -> None:
        """Past its hard limit Celery tells twice: of a failure, then of the limit."""
        if self._limit is None:
            self._limit = HardLimit(self)
        self._limit.tell(tell)

    def revoked(self) -> bool:
        """Whether it is revoked or expired, and was not too late for that.

        Where the ledger says that it may have started, a reconnect has left a copy in the pipe of
        its process, or this copy is an old one. Its gate knows which: it goes on to the pool.
        """
        try:
            return bool(super().revoked())  # type: ignore[misc]
        except _TooLate:
            return False

    def _announce_revoked(self, reason: str, terminated: bool, signum: Any, expired: bool) -> None:
        if getattr(self, "time_start", None):
            self.affinity_ends.finish(self.affinity_stamp)
            self._stops()
        elif not self.affinity_ends.discard(self.affinity_stamp, "settle", reason):
            raise _TooLate
        super()._announce_revoked(reason, terminated, signum, expired)  # type: ignore[misc]
        self._ended()

    def cancel(self, pool: Any, signal: Any = None, emit_retry: bool = True) -> None:
        """A cold stop. What runs in a thread of this process cannot be ended: it finishes.

        Celery's own raises an error there: on solo inside the task, which then has failed, and on
        threads in the middle of the pool's stop.
        """
        if getattr(pool.terminate_job, "__func__", None) is not BasePool.terminate_job:
            super().cancel(pool, signal, emit_retry)  # type: ignore[misc]

    def _announce_cancelled(self, emit_retry: bool = True) -> None:
        # A cold stop: the process is killed and the node's leave gives the task back.
        worker_state.task_ready(self)
        self._already_cancelled = True

    def _stops(self) -> None:
        """Its process is being stopped. Where slots are no processes only this keeps its tag from
        going on meanwhile (test_a_tag_waits_for_a_terminated_process_that_takes_its_time).
        """
        pid = self.worker_pid
        # gevent's pool has its greenlets by number as long as they run (Celery 5.4 to 5.7).
        greenlets = getattr(self.affinity_pool, "_pool_map", None)
        if not self.affinity_in_process:
            gone = partial(processes.is_gone, processes.identity(pid))
            self.affinity_ends.held.stopping(self.affinity_stamp, gone)
        elif greenlets is not None:
            self.affinity_ends.held.stopping(self.affinity_stamp, lambda: pid not in greenlets)

    def _vanish(self) -> None:
        worker_state.task_ready(self)
        self._ended()

    def _ended(self) -> None:
        """It has ended here. Celery has forgotten its id then, which another one may have, too: a
        copy, a retry, a repeat. That one must be found when it is to be terminated.
        """
        self.affinity_ends.held.ended(self.affinity_stamp, self)
        task_id = self.id
        original = self.affinity_ends.held.other_request(task_id, self)
        if original is not None:
            worker_state.requests[task_id] = original


def never_requeued(task: Any, fail: Callable[..., Any]) -> Callable[..., Any]:
    """Have Celery take the loss of a process as final: the ledger has seen to the repeats.

    With `acks_late` and `reject_on_worker_lost` it would store no failure, as the broker would send
    the message again; with `retry_on_worker_lost` it would send it again itself.
    """

    def failing(*args: Any, **options: Any) -> Any:
        names = ("acks_late", "retry_on_worker_lost")
        kept = {name: getattr(task, name, None) for name in names}
        try:
            for name in names:
                setattr(task, name, False)
            return fail(*args, **options)
        finally:
            for name, value in kept.items():
                setattr(task, name, value)

    return failing
