"""The one module that touches Celery's internals.

Each touch, the probe that meets a Celery that differs, and what happens then:

- `task.__trace__` is replaced by the gated tracer: `wrap_tracers`; the worker does not start.
- `amqp.send_task_message` is wrapped to catch own retries: `settle_own_retries`; a warning, and
  retries are published to the pending queue, and a wait for a task of the own tag is not refused.
- `worker.wait_for_soft_shutdown` is wrapped to drain at once: `call_before_cold_stop`; without it
  (5.4) the worker drains at its signal `worker_shutting_down`.
- `consumer.on_connection_error_after_connected` is wrapped, so that a close that fails does not end
  the worker: `outlive_lost_connections`; without it such a worker has to be started again.
- `amqp.queues._consume_from` says what a worker consumes: `selected_queues`; no start.

(Celery's classes are built on, not touched: the prefork pool in slot_pool.py and resizing.py,
`Task.Request`, `create_request_cls` and the consumer's strategies in request.py. What a consumer
does with each message: unreadable.py, no_acks.py.)
Checked on celery 5.7.0 (kombu 5.7.0, billiard 4.3.2, redis-py 8.1.0) and on the floor, celery 5.4.0
(kombu 5.4.2, redis-py 5.3.1).
"""

from __future__ import annotations

import logging
import os
import socket
import threading
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from billiard.einfo import ExceptionInfo
from celery import states
from celery.app.trace import TraceInfo, report_internal_error, trace_ok_t
from celery.exceptions import Reject

from celery_affinity.batch_calls import BatchTask
from celery_affinity.context import current
from celery_affinity.exceptions import ConfigurationError
from celery_affinity.gate import Gate
from celery_affinity.message import STAMP_HEADER, TAG_HEADER
from celery_affinity.retries import RetryCatcher
from celery_affinity.running import Run, Tracer, current_run

__all__ = (
    "call_before_cold_stop",
    "connect_anew",
    "consume_worker_queues",
    "native_thread",
    "outlive_lost_connections",
    "refusal",
    "selected_queues",
    "settle_own_retries",
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
            batch = BatchTask(task) if getattr(task, "affinity_batch", False) else None
            gated = gate.around(tracer, batch)
            if gate.in_process:
                gated = _contained(task, gated)
            gated.celery_affinity_gate = gate  # type: ignore[attr-defined]
            task.__trace__ = gated


def _contained(task: Any, tracer: Tracer) -> Tracer:
    """Return what a dispatched task's tracer raises, as pool processes do.

    In a pool without processes nobody catches it, such as that the result backend is away: the
    request would never end, and its node hold it for ever.
    """

    def contained(uuid: str, args: Any, kwargs: Any, request: Any = None) -> Any:
        dispatched = bool(request) and STAMP_HEADER in request
        try:
            return tracer(uuid, args, kwargs, request)
        except Reject as error:
            if not dispatched:
                raise
            return trace_ok_t(ExceptionInfo(), TraceInfo(states.REJECTED, error), 0.0, None)
        except Exception as error:
            if not dispatched:
                raise
            failed = report_internal_error(task, error)
            return trace_ok_t(failed, TraceInfo(states.FAILURE, error), 0.0, None)

    return contained


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
        logger.debug(
            "Could not look for the stored result of task %s: %s",
            task_id,
            error,
            extra={"action": "stored_unknown", "task_id": task_id},
        )
        return None
    return repr(meta.get("result")) if meta.get("status") == states.SUCCESS else None


# Retries


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
            tag = _tag_of(message, options)
            if _is_own_retry(run, message) and _is_held(tag):
                pending = pending_of(run.stamp.state) or ""
                producer = RetryCatcher(producer, run, pending, app.conf.task_serializer)
            elif tag is not None and _is_held(tag) and exclusive(run.stamp.state, str(tag)):
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


def _tag_of(message: Any, options: dict[str, Any]) -> object:
    """The tag that intake will find, or None."""
    places = (options.get("headers") or {}, message.headers, options)
    return next((place[TAG_HEADER] for place in places if place.get(TAG_HEADER) is not None), None)


def _is_held(tag: object) -> bool:
    """Whether it is the tag whose lease this process has. A retry may have another one: that is
    published, to wait for its turn there.
    """
    lease = current()
    # As the intake reads it: 1 and "1" are one tag.
    return lease is not None and (tag is None or str(tag) == lease.tag)


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


# Stops


def call_before_cold_stop(worker: Any, call: Callable[[], None]) -> None:
    """Have something done as soon as a cold stop begins, in its signal handler.

    Celery sends `worker_shutting_down` only at the end of that handler, when it has waited for
    `worker_soft_shutdown_timeout` and for the pool. (Celery 5.4 does neither, nor has the method.)
    """
    wait = getattr(worker, "wait_for_soft_shutdown", None)
    if wait is None:
        return

    def wait_for_soft_shutdown() -> None:
        call()
        wait()

    worker.wait_for_soft_shutdown = wait_for_soft_shutdown


# Connections


def outlive_lost_connections(consumer: Any) -> None:
    """Have a lost connection that cannot even be closed not end the worker.

    Celery closes it twice, by `collect` and by `close`. Where the end of one channel has stopped
    the first half way, the second meets a channel whose transport is gone: an AttributeError, which
    ends the worker as unrecoverable. Seen when Redis was restarted on a busy machine; kombu 5.7.0.
    """
    reconnect = getattr(consumer, "on_connection_error_after_connected", None)
    if reconnect is None:
        return

    def on_connection_error_after_connected(error: Exception) -> None:
        if consumer.connection is not None:
            _close_in_any_case(consumer.connection)
        reconnect(error)

    consumer.on_connection_error_after_connected = on_connection_error_after_connected


def _close_in_any_case(connection: Any) -> None:
    close = connection.close

    def closed() -> None:
        try:
            close()
        except Exception as error:
            logger.warning(
                "The lost connection could not be closed, and is left behind: %r", error,
                extra={"action": "connection_left"},
            )

    connection.close = closed


def connect_anew(worker: Any, queues: Iterable[str]) -> None:
    """Have a worker that takes itself for a consumer of one of these queues connect anew.

    For queues that are not there: Celery 5.7 does not hear the broker cancel a consumer while its
    event loop begins (`loops._quick_drain`), and would consume nothing for ever. For any thread.
    """
    try:
        tasks, connection = worker.consumer.task_consumer, worker.consumer.connection
        if any(map(tasks.consuming_from, queues)) and connection.connected:
            # Not by the socket itself: one of TLS would then be read as if it were none.
            with socket.socket(fileno=os.dup(connection.connection.sock.fileno())) as line:
                line.shutdown(socket.SHUT_RDWR)
    except (AttributeError, OSError):
        pass  # it is connecting


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
