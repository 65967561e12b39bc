"""The gate around every task: asks the ledger before a dispatched message runs, tells it after.

It stands around the tracer, so before STARTED is stored, a signal is sent or user code runs, and
after the result is stored and the last hook has returned.

    message -> start? --refused--> nothing at all happens
                  `--accepted--> tag_acquired (first of a lease) -> tracer -> settle
                  (or granted by the settle before: starts.py)                   |
                                                    tag_released (last of a lease) <-'

Crash windows:
- before start: the entry is dispatched; a lost message is sent again by the next heartbeat.
- between start and settle: the parent reports the lost process, or the worker's heartbeat stops;
  the entry goes back to the head of its tag with one delivery more
  (test_a_killed_child_gives_its_task_back, test_a_killed_workers_tags_run_elsewhere...).
  The result may be stored already: a SUCCESS is then settled and not run again
  (test_a_task_whose_success_is_stored_does_not_run_again); else delivery is at least once.
- a lost reply: start and settle carry a token and answer a repeat as before.
- a process that is frozen while it asks: the answer may be older than the lease, so it asks again
  (test_a_process_that_was_frozen_while_it_asked_asks_again); a worker that wakes shortly before its
  lease is over starts nothing before its next heartbeat
  (test_nothing_starts_while_the_heartbeat_is_late). Frozen after that it is the limit that
  docs/how_it_works.md declares: fence with the epoch.

Nothing that goes wrong in here reaches user code: while Redis is away the gate waits.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from itertools import count
from typing import Any
from uuid import uuid4

from celery_affinity import context, processes
from celery_affinity.context import AffinityContext
from celery_affinity.events import tag_acquired, tag_released
from celery_affinity.message import STAMP_HEADER, TAG_HEADER, Stamp, tag_text
from celery_affinity.occupancy import Occupancy
from celery_affinity.outcomes import is_of_greenlets, outcome_of, outcome_of_error
from celery_affinity.patience import Patience
from celery_affinity.running import BatchCall, BatchTask, Run, Tracer, running
from celery_affinity.scripts import Scripts
from celery_affinity.starts import Starts
from celery_affinity.tracing import spans_around
from celery_affinity.watchdog import seconds

__all__ = ("REFUSED", "Gate")

logger = logging.getLogger(__name__)

#: What the tracer "returns" for a refused copy; the parent then drops the request without a word.
REFUSED = "celery_affinity: refused copy"


class Gate:
    """One process' gate.

    Arguments:
        connect: Makes the scripts' client; called once in each process that runs tasks.
        refusal: Makes the tracer's answer of a text: for a refused copy, and for a stored success.
        incarnations: The node's name in each shard.
        slot: The slot that this process is, for ordinary tasks; None if slots are not processes.
        in_process: Whether tasks run in the worker's own process (threads, solo, gevent).
        trust_seconds: How old the permission to start may be when it arrives, and for how long a
            task must have its lease at least when it starts.
        succeeded: Asks the result backend for the stored result's repr of a task that has
            succeeded already; None if it has not, or nothing can be said.
    """

    def __init__(
        self,
        *,
        connect: Callable[[], Scripts],
        refusal: Callable[[str], Any],
        queue_names: Mapping[str, str],
        node: str,
        incarnations: Sequence[str],
        slot: int | None,
        in_process: bool,
        trust_seconds: float,
        succeeded: Callable[[str, Mapping[str, Any]], str | None] = lambda task_id, request: None,
    ) -> None:
        self._succeeded = succeeded
        self._began: dict[str, tuple[str, float]] = {}
        self._inside: set[object] = set()
        self._scripts = connect()
        self._refusal = refusal
        self._queue_names = dict(queue_names)
        self._node = node
        #: Whether tasks run in the worker's own process.
        self.in_process = in_process
        self._held: dict[int, tuple[str, str, str]] = {}
        self._numbers = count(1)
        self._process = f"{processes.identity(os.getpid())}:{uuid4().hex[:8]}"
        self._starts = Starts(self._scripts, self._token, trust_seconds, granted=slot is not None)
        patience = Patience(logger)
        self._patiently, self._briefly = patience.patiently, patience.briefly
        self._occupancy = Occupancy(self._scripts, patience, incarnations, slot, self._token)

    def began(self) -> list[tuple[str, float]]:
        """The node's name in its shard of each dispatched task here, and when that began."""
        return list(self._began.values())

    @property
    def is_empty(self) -> bool:
        """Whether no dispatched message is between its question to start and its settle here."""
        return not self._inside

    def process_up(self) -> None:
        """Tell the ledger that this slot has a new process."""
        self._occupancy.process_up()

    def close(self) -> None:
        """This process stops: its tags are released for its receivers."""
        self._starts.decline(self._briefly)
        for slot in list(self._held):
            self._release(slot, "drained")

    def around(self, tracer: Tracer, batch: BatchTask | None = None) -> Tracer:
        """The tracer behind this gate. Of a batch task, one start may be followed by several."""
        tracer = spans_around(tracer)

        def gated(uuid: str, args: Any, kwargs: Any, request: Any = None) -> Any:
            stamp = Stamp.parse(request.pop(STAMP_HEADER, None)) if request else None
            if stamp is None:
                return self._ordinary_task(tracer, uuid, args, kwargs, request)
            inside = object()
            self._inside.add(inside)
            try:
                return self._dispatched_task(stamp, batch, tracer, uuid, args, kwargs, request)
            finally:
                self._inside.discard(inside)

        return gated

    def _ordinary_task(
        self, tracer: Tracer, uuid: str, args: Any, kwargs: Any, request: Any
    ) -> Any:
        if not request or request.get("is_eager"):
            return tracer(uuid, args, kwargs, request)
        self._starts.decline(self._briefly)
        return self._occupancy.around(lambda: tracer(uuid, args, kwargs, request))

    def _dispatched_task(
        self,
        stamp: Stamp,
        batch: BatchTask | None,
        tracer: Tracer,
        uuid: str,
        args: Any,
        kwargs: Any,
        request: Any,
    ) -> Any:
        self._occupancy.announce(stamp.incarnation)
        answer, token = self._starts.begin(stamp, self._patiently)
        run = Run(stamp, uuid, request.get("retries") or 0, token)
        call = None
        if answer == 1 and batch is not None and stamp.attempt == 1:
            answer, found = self._starts.join(
                stamp, token, batch.name, batch.most_bytes, self._patiently
            )
            call = batch.call(run, request, found) if found else None
        if answer != 1:
            self._briefly(lambda: self._scripts.refused(stamp.state))
            logger.debug(
                "Refused a copy of task %s (%s).",
                uuid,
                answer,
                extra={"action": "refuse", "task_id": uuid, "code": answer},
            )
            return self._refusal(REFUSED)
        tag = tag_text(request.get(TAG_HEADER))
        queue = self._queue_names.get(stamp.state, stamp.state)
        self._acquire(stamp, queue, tag)
        here = context.enter(
            AffinityContext(
                tag,
                int(stamp.epoch),
                stamp.place,
                stamp.attempt,
                queue,
                self._node,
                stamp.slot,
                int(stamp.entry),
            )
        )
        outcome = "done"
        failure: tuple[bytes, ...] = ()
        self._began[run.token] = stamp.incarnation, seconds()
        try:
            stored = self._succeeded(uuid, request) if stamp.attempt > 1 else None
            if stored is not None:
                logger.info(
                    "Task %s has succeeded before its process was lost; it does not run again.",
                    uuid,
                    extra={"action": "settle_stored", "task_id": uuid},
                )
                return self._refusal(stored)
            with running(run):
                answer = (call.trace if call else _traced)(tracer, uuid, args, kwargs, request)
            outcome, failure = outcome_of(answer)
            return answer
        except BaseException as error:
            if isinstance(error, Exception):
                outcome, failure = outcome_of_error(error, retried=bool(run.retry_messages))
            else:
                outcome = ""
                self._process_stops(stamp, told=is_of_greenlets(error))
            raise
        finally:
            del self._began[run.token]
            if outcome:
                self._settle(run, queue, tag, outcome, failure, call)
            context.leave(here)

    def _process_stops(self, stamp: Stamp, told: bool) -> None:
        """The task did not end, it was stopped: its request reports what becomes of it. Without
        processes it learns of a timeout only (told), and there is nobody else to do so.
        """
        if self.in_process and not told:
            fence = stamp.incarnation, stamp.slot, stamp.entry, stamp.epoch
            self._patiently(lambda: self._scripts.lost(*fence, stamp.state))
        if self.in_process:
            self._release(stamp.slot, "lost")

    def _settle(
        self,
        run: Run,
        queue: str,
        tag: str,
        outcome: str,
        failure: tuple[bytes, ...],
        call: BatchCall | None,
    ) -> None:
        stamp = run.stamp
        mine = (stamp.incarnation, stamp.slot, stamp.entry, stamp.epoch, run.token)
        if call:
            ends = call.ends(run, outcome, failure)
            answer = self._patiently(lambda: self._scripts.settle_batch(*mine, ends))
        else:
            words = (*failure, *run.retry_words())
            proposal = "" if words else self._starts.proposal()
            asked = seconds()
            answer = self._patiently(
                lambda: self._scripts.settle(
                    *mine, outcome, *words, grant=proposal, least_ms=self._starts.least_ms
                )
            )
            answer = self._starts.settled(stamp, answer, proposal, asked)
        if answer == "stale":
            logger.warning(
                "Task %s ended after its lease on tag %r was taken away: it runs again elsewhere, "
                "unless its message is gone (the ledger was emptied).",
                run.task_id,
                tag,
                extra={"action": "settle_refused", "task_id": run.task_id, "epoch": stamp.epoch},
            )
            answer = "lost"
        if answer != "held":
            self._release(stamp.slot, answer)

    def _acquire(self, stamp: Stamp, queue: str, tag: str) -> None:
        if self._held.get(stamp.slot) == (queue, tag, stamp.epoch):
            return
        self._release(stamp.slot, "lost")
        self._held[stamp.slot] = (queue, tag, stamp.epoch)
        tag_acquired.send(sender=queue, tag=tag, epoch=int(stamp.epoch), queue=queue)

    def _release(self, slot: int, reason: str) -> None:
        held = self._held.pop(slot, None)
        if held:
            queue, tag, epoch = held
            tag_released.send(sender=queue, tag=tag, epoch=int(epoch), queue=queue, reason=reason)

    def _token(self) -> str:
        return f"{self._process}:{next(self._numbers):x}"


def _traced(tracer: Tracer, *arguments: Any) -> Any:
    return tracer(*arguments)
