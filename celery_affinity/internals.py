"""The one module that touches Celery's internals.

Each touch, the probe that meets a Celery that differs, and what happens then:

- `task.__trace__` is replaced by the gated tracer: `wrap_tracers`; the worker does not start.
- `amqp.send_task_message` is wrapped to catch own retries: `settle_own_retries`; a warning, and
  retries are published to the pending queue, and a wait for a task of the own tag is not refused.
- `amqp.queues._consume_from` says what a worker consumes: `selected_queues`; no start.
- `AsynPool._create_write_handlers`, `outbound_buffer`, `on_job_ready`, `_busy_workers`,
  `_recv_message` and their like: `slots_are_processes`; a warning, and the stock pool.

(request.py builds on `Task.Request`, `create_request_cls` and the consumer's strategies.)
Checked on celery 5.7.0 (kombu 5.7.0, billiard 4.3.2, redis-py 8.1.0) and on the floor, celery 5.4.0
(kombu 5.4.2, redis-py 5.3.1).
"""

from __future__ import annotations

import logging
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from billiard.process import current_process
from celery import states
from celery.app.trace import trace_ok_t
from celery.concurrency import get_implementation
from celery.concurrency.asynpool import AsynPool
from celery.concurrency.prefork import TaskPool as PreforkPool
from celery.worker import state as worker_state

from celery_affinity.context import current
from celery_affinity.exceptions import ConfigurationError
from celery_affinity.gate import REFUSED, Gate, Run, current_run
from celery_affinity.message import STAMP_HEADER, TAG_HEADER, Stamp, due_ms, envelope
from celery_affinity.resizing import ResizablePool, call_after_resizing

__all__ = (
    "SlotTaskPool",
    "consume_worker_queues",
    "follow_size",
    "native_thread",
    "pool_process_index",
    "refusal",
    "selected_queues",
    "settle_own_retries",
    "slots_are_processes",
    "stored_success",
    "wrap_tracers",
)

logger = logging.getLogger(__name__)


# Tracers


def wrap_tracers(tasks: Iterable[Any], gate: Gate) -> None:
    """Put the gate around the tracer of every task of the app."""
    for task in tasks:
        tracer = getattr(task, "__trace__", None)
        if tracer is None:
            raise ConfigurationError(
                f"task {task.name!r} has no tracer to put the gate around: this version of Celery "
                "is not known to celery_affinity; install celery>=5.4,<6"
            )
        if not getattr(tracer, "celery_affinity_gate", None):
            gated = gate.around(tracer)
            gated.celery_affinity_gate = gate  # type: ignore[attr-defined]
            task.__trace__ = gated


def refusal(marker: str) -> Any:
    """What a tracer returns for a task that ended well with this text as its result's repr."""
    return trace_ok_t(None, None, 0.0, marker)


def stored_success(app: Any, task_id: str, request: Mapping[str, Any]) -> str | None:
    """The repr of the result if the task's SUCCESS is stored; None if not, or nobody can tell."""
    task = app.tasks.get(request.get("task"))
    if task is None or task.ignore_result or request.get("ignore_result"):
        return None
    try:
        meta = task.backend.get_task_meta(task_id, cache=False)
    except Exception as error:
        logger.debug("Could not look for the stored result of task %s: %s", task_id, error)
        return None
    return repr(meta.get("result")) if meta.get("status") == states.SUCCESS else None


# Retries


class _RetryCatcher:
    """Stands in for the producer while a task publishes its own retry."""

    def __init__(self, producer: Any, run: Run, pending: str, serializer: str) -> None:
        self._producer = producer
        self._run = run
        self._pending = pending
        self._serializer = serializer
        self.connection = producer.connection

    def publish(self, body: Any, **options: Any) -> Any:
        """Keep the retry; pass on whatever else is published on the way (events)."""
        headers = options.get("headers") or {}
        if headers.get("id") != self._run.task_id or "task" not in headers:
            return self._producer.publish(body, **options)
        properties = {
            name: value
            for name, value in options.items()
            if name in ("correlation_id", "reply_to", "priority", "delivery_mode", "expiration")
        }
        message = envelope(
            body,
            headers,
            properties,
            serializer=options.get("serializer") or self._serializer,
            compression=options.get("compression"),
            routing_key=self._pending,
        )
        self._run.retry_messages.append((message, due_ms(headers.get("eta"))))
        return None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._producer, name)


def settle_own_retries(
    app: Any, pending_of: Callable[[str], str | None], exclusive: Callable[[str, str], bool]
) -> None:
    """Make a retry inside a dispatched task part of its settle instead of a publish.

    Notes too which tasks it sends that cannot start before it has ended.

    Arguments:
        pending_of: The pending queue of the affinity queue with that state name.
        exclusive: Whether tasks of a tag (state name, tag) run one at a time.
    """
    amqp = app.amqp
    publish = getattr(amqp, "send_task_message", None)
    if publish is None:
        logger.warning(
            "This Celery has no amqp.send_task_message: a task's own retry is published to the "
            "pending queue before its first attempt has settled. Install celery>=5.4,<6.",
            extra={"action": "fallback", "missing": ["send_task_message"]},
        )
        return
    if getattr(publish, "celery_affinity", False):
        return

    def send_task_message(
        producer: Any, name: str, message: Any, *args: Any, **options: Any
    ) -> Any:
        run = current_run()
        if run is not None and _is_for_own_queue(run, options, pending_of):
            if _is_own_retry(run, message):
                pending = pending_of(run.stamp.state) or ""
                producer = _RetryCatcher(producer, run, pending, app.conf.task_serializer)
            elif _has_own_tag(message, options, lambda tag: exclusive(run.stamp.state, tag)):
                run.own_tag_ids.add(message.headers["id"])
        return publish(producer, name, message, *args, **options)

    send_task_message.celery_affinity = True  # type: ignore[attr-defined]
    amqp.send_task_message = send_task_message


def _is_for_own_queue(
    run: Run, options: dict[str, Any], pending_of: Callable[[str], str | None]
) -> bool:
    queue = options.get("queue")
    target = getattr(queue, "name", queue) or options.get("routing_key")
    return bool(target == pending_of(run.stamp.state))


def _is_own_retry(run: Run, message: Any) -> bool:
    headers = message.headers
    return bool(headers.get("id") == run.task_id and headers.get("retries") == run.retries + 1)


def _has_own_tag(message: Any, options: dict[str, Any], exclusive: Callable[[str], bool]) -> bool:
    places = (options.get("headers") or {}, message.headers, options)
    tag = next((place[TAG_HEADER] for place in places if place.get(TAG_HEADER) is not None), None)
    lease = current()
    # As the intake reads it: 1 and "1" are one tag.
    return lease is not None and str(tag) == lease.tag and exclusive(lease.tag)


# Queues


def selected_queues(app: Any) -> list[str] | None:
    """Names of the queues that ``-Q`` selects; None without it.

    Raises:
        ConfigurationError: If this Celery keeps them elsewhere.
    """
    if not hasattr(app.amqp.queues, "_consume_from"):
        raise ConfigurationError(
            "this Celery does not tell which queues a worker consumes; install celery>=5.4,<6"
        )
    selected = app.amqp.queues._consume_from
    return None if selected is None else list(selected)


def consume_worker_queues(app: Any, instead_of: Iterable[str], queues: Iterable[Any]) -> None:
    """Consume these queues in place of the pending ones."""
    known = app.amqp.queues
    pending = set(instead_of)
    if known._consume_from is None:
        known.select([name for name in known.consume_from if name not in pending])
    else:
        for name in pending & set(known._consume_from):
            known.deselect(name)
    for queue in queues:
        known.select_add(queue)


# The pool: a slot is a process


class SlotPool(ResizablePool):
    """A prefork pool in which a dispatched job runs in the process of its slot.

    A job whose process is busy (or being replaced) waits in a buffer of its slot, outside of
    `outbound_buffer`: with jobs in there that no ready process may take, the event loop would
    spin. Ordinary jobs go the stock way, and have their turn after some dispatched ones.

    Celery's cold stop joins the pool inside its signal handler, so in the middle of whatever step
    the signal struck. A job half written then, or a result half read, would leave a process
    waiting for ever, or the parent for its own lock; `in_step` tells of such a step.
    """

    #: Dispatched jobs that a process runs in a row while ordinary ones wait.
    ROW = 10

    _quick_put: Any
    _put_back: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.slot_buffers: dict[int, deque[Any]] = {}
        self._rows: Counter[int] = Counter()
        #: Writes and reads under way (they can nest): not the moment to join the pool.
        self.in_step = 0
        super().__init__(*args, **kwargs)

    def create_result_handler(self) -> Any:
        """The stock one, its reading marked."""
        handler = super().create_result_handler()
        receive = handler._recv_message

        def marked(*args: Any, **kwargs: Any) -> Iterator[None]:
            # A message that has not come whole is read on by the event loop itself, turn by turn.
            turn = self._step(receive(*args, **kwargs).__next__)
            while True:
                try:
                    turn()
                except StopIteration:
                    return
                yield

        handler._recv_message = marked
        return handler

    def _step(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def step(*args: Any, **kwargs: Any) -> Any:
            self.in_step += 1
            try:
                return function(*args, **kwargs)
            finally:
                self.in_step -= 1

        return step

    def _create_write_handlers(self, hub: Any, **kwargs: Any) -> None:
        super()._create_write_handlers(hub, **kwargs)
        stock_put, stock_put_back = self._quick_put, self._put_back
        hub.consolidate_callback = self._step(hub.consolidate_callback)
        self._schedule_writes = hub.consolidate_callback

        def put(tup: Any) -> None:
            stamp = _stamp_of(tup)
            stock_put(tup)
            if stamp is not None:
                job = self.outbound_buffer.pop()
                job.affinity_stamp = stamp
                self.slot_buffers.setdefault(stamp.slot, deque()).append(job)
                self._feed(stamp.slot)

        def put_back(job: Any) -> None:
            stock_put_back(job)
            stamp = getattr(job, "affinity_stamp", None)
            if stamp is not None and self.outbound_buffer and self.outbound_buffer[0] is job:
                self.slot_buffers.setdefault(stamp.slot, deque()).appendleft(
                    self.outbound_buffer.popleft()
                )

        self._quick_put = put
        self._put_back = put_back

    def _feed(self, slot: int) -> None:
        """Write the slot's next job to its process, if that is up and idle."""
        if worker_state.should_stop is not None or worker_state.should_terminate is not None:
            # The drain gives it back. Written now, it would be forgotten by the pool before its
            # process answers, which then waits 30 s for that answer to be counted.
            return
        waiting = self.slot_buffers.get(slot)
        if waiting and slot >= self.target:
            if self.most is None or slot >= self.most():
                self._refuse(slot, lambda job: True)
                return
            self.grow(slot + 1 - self.target)
        while waiting and (waiting[0]._accepted or _is_revoked(waiting[0])):
            waiting.popleft().discard()
        if not waiting:
            return
        proc = next((p for p in self._pool if p.index == slot), None)
        fd = proc and proc.inqW_fd
        if proc is None or fd not in self._all_inqueues or self._fileno_to_inq.get(fd) is not proc:
            return
        if fd in self._busy_workers or fd in self._active_writes:
            return
        if self.outbound_buffer and self._rows[slot] >= self.ROW:
            self._rows[slot] = 0
        else:
            self._rows[slot] += 1
            self.outbound_buffer.appendleft(waiting.popleft())
        self._schedule_writes([fd])

    def on_job_ready(self, job: Any, i: Any, obj: Any, inqW_fd: int) -> None:
        """A process has finished a job: its slot's next one follows."""
        super().on_job_ready(job, i, obj, inqW_fd)
        self.retire(done=job)
        proc = self._fileno_to_inq.get(inqW_fd)
        if proc is not None and self.slot_buffers.get(proc.index):
            self._feed(proc.index)

    def _event_process_exit(self, hub: Any, proc: Any) -> None:
        """A process' sentinel is readable: it is ending, or has ended.

        The stock pool looks once, and where the process cannot be reaped yet, again by its timer,
        up to 5 s later: so long the tag of its task would wait.
        """
        super()._event_process_exit(hub, proc)
        self._reap_soon(hub, proc, 100)

    def _reap_soon(self, hub: Any, proc: Any, tries: int) -> None:
        if proc in self._pool and tries:
            hub.call_later(0.02, self._reap, hub, proc, tries - 1)

    def _reap(self, hub: Any, proc: Any, tries: int) -> None:
        self.maintain_pool()
        self._reap_soon(hub, proc, tries)

    def on_process_alive(self, pid: int) -> None:
        """A new process is up and takes over the jobs that wait for its slot."""
        super().on_process_alive(pid)
        self.retire()
        proc = next((p for p in self._pool if p.pid == pid), None)
        if proc is not None:
            self._feed(proc.index)

    def on_job_process_lost(self, job: Any, pid: int, exitcode: int) -> None:
        """The process of a running job is gone, and the lease with it: so is what waits under it.

        (Had it settled just before, what waits is missed by the heartbeat and sent again.)
        """
        super().on_job_process_lost(job, pid, exitcode)
        stamp = getattr(job, "affinity_stamp", None)
        if stamp is not None:
            self._refuse(stamp.slot, lambda other: other.affinity_stamp.epoch == stamp.epoch)

    def _refuse(self, slot: int, which: Callable[[Any], bool]) -> None:
        """Answer to waiting jobs what their gate would."""
        for job in list(self.slot_buffers.get(slot, ())):
            if which(job) and not job._accepted:
                self.slot_buffers[slot].remove(job)
                job.discard()
                job._set(0, (True, (0, REFUSED, 0.0)))

    def flush(self) -> None:
        """The broker connection is gone: forget what no process has taken."""
        self._forget_waiting()
        super().flush()

    def close(self) -> None:
        """The worker stops: joining the pool must not wait for jobs that no process will take."""
        self._forget_waiting()
        super().close()

    def _forget_waiting(self) -> None:
        for waiting in self.slot_buffers.values():
            while waiting:
                waiting.popleft().discard()


def _is_revoked(job: Any) -> bool:
    """Whether a waiting job's task was revoked or has expired; its end is told then."""
    request = job._callback.__self__
    return bool(
        (request.expires or job.correlation_id in worker_state.revoked) and request.revoked()
    )


def _stamp_of(tup: Any) -> Stamp | None:
    try:
        return Stamp.parse(tup[1][3][2].get(STAMP_HEADER))
    except (LookupError, TypeError, AttributeError):
        return None


class SlotTaskPool(PreforkPool):  # type: ignore[misc]
    """The prefork pool over `SlotPool`."""

    # The worker's banner names the pool by its module.
    __module__ = PreforkPool.__module__
    Pool = SlotPool

    _put_off = False

    @property
    def num_processes(self) -> int:
        """The number of slots."""
        return int(self._pool.target)

    def on_stop(self) -> None:
        """Join the pool; a signal handler that struck one of its steps puts that off."""
        if self._pool is not None and self._pool.in_step:
            self._put_off = True  # `should_terminate` is set: the loop ends after this step
            return
        super().on_stop()

    def on_terminate(self) -> None:
        """The loop has ended: now join what was put off, then end it."""
        if self._put_off:
            super().on_stop()
        super().on_terminate()


def slots_are_processes(pool_cls: Any, wanted: bool, use_eventloop: bool) -> bool:
    """Whether this worker can run each slot's tasks in one process.

    A Celery whose pool differs from what `SlotPool` builds on falls back with a warning.
    """
    if not wanted or not use_eventloop or get_implementation(pool_cls) is not PreforkPool:
        return False
    needed = (
        "_create_write_handlers",
        "_event_process_exit",
        "create_result_handler",
        "on_job_ready",
        "on_job_process_lost",
        "on_process_alive",
        "flush",
        "maintain_pool",
        "_repopulate_pool",
    )
    missing = [name for name in needed if not hasattr(AsynPool, name)]
    if not hasattr(AsynPool.ResultHandler, "_recv_message"):
        missing.append("ResultHandler._recv_message")
    if missing:
        logger.warning(
            "This Celery's prefork pool lacks %s: tasks of a tag will run in any process of the "
            "worker. Order and exclusion are kept; process caches are not. Install "
            "celery>=5.4,<6, or set slot_is_process=False.",
            ", ".join(missing),
            extra={"action": "fallback", "missing": missing},
        )
    return not missing


def follow_size(pool: Any, most: Callable[[], int] | None, resized: Callable[[], None]) -> None:
    """Tell when the pool was made to grow or shrink.

    Arguments:
        most: With autoscale how many slots there may be: the pool then grows for a slot's job.
    """
    call_after_resizing(pool, resized)
    if isinstance(pool, SlotTaskPool):
        pool._pool.most = most


def pool_process_index() -> int | None:
    """The index of this pool process, or None outside of one."""
    index = getattr(current_process(), "index", None)
    return index if isinstance(index, int) else None


# Threads


def native_thread(run: Callable[[], None], name: str) -> threading.Thread | None:
    """Start an OS thread, also where gevent has replaced threads by greenlets.

    A greenlet's heartbeat would stop as soon as a task keeps the CPU.
    """
    try:
        from gevent import monkey

        patched = bool(monkey.is_module_patched("threading"))
    except ImportError:
        patched = False
    if patched:
        monkey.get_original("_thread", "start_new_thread")(run, ())
        return None
    thread = threading.Thread(target=run, name=name, daemon=True)
    thread.start()
    return thread
