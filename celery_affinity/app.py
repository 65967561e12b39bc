"""`Affinity`: binds affinity queues to a Celery app."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from typing import Any

from celery import Celery, signals

from celery_affinity import internals, slot_pool
from celery_affinity.appconf import affinity_conf
from celery_affinity.banner import banner
from celery_affinity.bootstep import ConsumerStep, WorkerStep
from celery_affinity.checks import refuse_settings, serves_none, warnings_of
from celery_affinity.choosing import choose_delivery, ledger_url
from celery_affinity.dead_operations import DeadLetterCalls
from celery_affinity.delivery import Delivery
from celery_affinity.detour import to_pending_queue
from celery_affinity.exceptions import ConfigurationError, UndeclaredQueueError
from celery_affinity.exporting import check_metrics_port, scheduler_metrics
from celery_affinity.failing import fail_buried
from celery_affinity.foreign import ForeignConsumers, consumed_queues
from celery_affinity.intake import no_tag
from celery_affinity.looking import Looking
from celery_affinity.message import decoded_body, spread_tag
from celery_affinity.node import Node
from celery_affinity.operations import Operations
from celery_affinity.options import add_role_option
from celery_affinity.remote_control import refuse_in_replies, steer
from celery_affinity.resolving import resolve
from celery_affinity.revoking import note_revokes
from celery_affinity.routing import usual_pending_queue, usual_queue
from celery_affinity.service import SchedulerService
from celery_affinity.settings import AffinityQueue, AffinitySettings
from celery_affinity.tagging import UNTAGGED, derive_tag
from celery_affinity.task import TagFrom, declare

__all__ = ("Affinity",)

logger = logging.getLogger(__name__)


class Affinity(Looking, Operations, DeadLetterCalls):
    """Sticky affinity routing for a Celery app.

    Does no I/O and reads no setting before the app is configured and one of them is needed.

    Arguments:
        app: The Celery app.
        queues: The affinity queues.
        settings: Any field of `AffinitySettings`, such as ``role`` or ``heartbeat_timeout``.
    """

    def __init__(
        self, app: Celery, queues: Sequence[AffinityQueue] | None = None, **settings: Any
    ) -> None:
        self.app = app
        self._arguments = dict(settings)
        if queues is not None:
            self._arguments["queues"] = tuple(queues)
        #: The running worker's part, in a worker's processes.
        self.node: Node | None = None
        self._service: SchedulerService | None = None
        self._foreign: ForeignConsumers | None = None
        self._metrics: Any = None
        self._node_name = ""
        self._startup_error: Exception | None = None
        self._command_line: dict[str, str] = {}
        self._warnings: list[str] = []
        self._serves_none: tuple[str, bool] | None = None
        app.celery_affinity = self  # type: ignore[attr-defined]
        note_revokes(app, self._note_revoked)
        add_role_option(app, self._take_role)
        app.on_after_configure.connect(self._forget_settings, weak=False)
        app.steps["worker"].add(WorkerStep)
        app.steps["consumer"].add(ConsumerStep)
        self._excluded: set[str] = set()
        for signal, receiver in (
            (signals.celeryd_init, self._on_celeryd_init),
            (signals.worker_init, self._on_worker_init),
            (signals.worker_process_init, self._on_process_init),
            (signals.worker_process_shutdown, self._on_process_shutdown),
            (signals.worker_shutting_down, self._on_shutting_down),
        ):
            # Celery 5.4 takes the same method of two objects for one receiver.
            signal.connect(receiver, weak=False, dispatch_uid=f"{receiver.__name__} {id(self)}")

    # Settings

    @cached_property
    def _resolved(self) -> tuple[AffinitySettings, dict[str, str]]:
        conf, written = affinity_conf(self.app)
        return resolve(conf, self._arguments, command_line=self._command_line, written=written)

    def _take_role(self, role: str) -> None:
        self._command_line["role"] = role
        self._forget_settings()

    def _forget_settings(self, **_: Any) -> None:
        """The app is configured (anew), or the command line was read."""
        self.__dict__.pop("_resolved", None)

    @property
    def settings(self) -> AffinitySettings:
        """The settings in force.

        Raises:
            ConfigurationError: If they cannot be used; it says what to change.
        """
        return self._resolved[0]

    @property
    def origins(self) -> Mapping[str, str]:
        """For each setting that is not a default, where it came from."""
        return self._resolved[1]

    @cached_property
    def redis_url(self) -> str:
        """URL of the ledger's Redis; all of it, so with its password."""
        return ledger_url(self.app, self.settings)

    @cached_property
    def delivery(self) -> Delivery:
        """How messages get into the ledger and out of it."""
        return choose_delivery(self.app, self.settings)

    # Declaring tasks

    def task(
        self,
        fun: Callable[..., Any] | None = None,
        /,
        *,
        queue: Any = None,
        tag_from: TagFrom | None = None,
        batch: bool = False,
        **options: Any,
    ) -> Any:
        """Declare an affinity task of this app; see `affinity_task`."""
        return declare(self.app.task, fun, tag_from, queue, batch, options)

    def _note_revoked(self, ids: list[str]) -> None:
        if self.settings.queues and not self.app.conf.task_always_eager:
            for shard in range(self.settings.shards):
                states = [part.state for part in self.settings.parts if part.shard == shard]
                self._shards.scripts(shard).revoke(states, ids)

    # Scheduling, in beat and in workers of role "both"

    def check_scheduling(self) -> None:
        """What cannot work stops the start here, with its text.

        Raises:
            ConfigurationError: If the settings, or the servers that they name, cannot be used.
        """
        check_metrics_port(self.settings)
        _ = self.delivery

    def start_scheduling(self, node: str) -> None:
        """Campaign for all affinity queues, in threads of this process."""
        if self._service is None:
            check_metrics_port(self.settings)
            self._service = SchedulerService(
                self.settings,
                self.redis_url,
                self.delivery,
                node,
                self._tag_of_message,
                partial(fail_buried, self.app),
            )
            self._service.start()
            service = self._service
            self._foreign = ForeignConsumers(
                partial(consumed_queues, self.app),
                self._pending_names,
                lambda: service.leading,
            )
            self._foreign.start()
            self._metrics = scheduler_metrics(self, lambda: service.led_queues)

    def stop_scheduling(self) -> None:
        """Resign, so that another node takes over at once."""
        if self._metrics is not None:
            self._metrics.stop()
            self._metrics = None
        if self._foreign is not None:
            self._foreign.stop()
            self._foreign = None
        if self._service is not None:
            self._service.stop()
            self._service = None

    def _tag_of_message(self, message: Mapping[str, Any]) -> object:
        headers = message["headers"]
        task = self.app.tasks.get(headers["task"])
        if task is None or getattr(task, "affinity_tag_from", None) is None:
            return spread_tag(headers["id"]) if headers["task"] in UNTAGGED else no_tag(message)
        args, kwargs, _ = decoded_body(message, self.app.conf.accept_content)
        return derive_tag(task, args, kwargs)

    def banner(self) -> str:
        """Settings that are not defaults, each with its origin, a line each."""
        return banner(self.settings, self.origins)

    # The worker's hooks (wired by bootstep.py)

    def _on_celeryd_init(self, instance: Any, options: Mapping[str, Any], **_: Any) -> None:
        if instance.app is self.app:
            excluded = options.get("exclude_queues") or ()
            self._excluded = set(excluded.split(",") if isinstance(excluded, str) else excluded)

    def _on_worker_init(self, sender: Any, **_: Any) -> None:
        if sender.app is not self.app:
            return
        refuse_in_replies()
        self._node_name = str(sender.hostname)
        try:
            self.node = self._make_node(sender)
        except Exception as error:
            # Celery swallows what a receiver raises; the worker's bootstep raises it again.
            self._startup_error = error

    def _make_node(self, worker: Any) -> Node | None:
        selected = internals.selected_queues(self.app)
        known = list(self.app.amqp.queues) if selected is None else selected
        self._check_tasks()
        if self.settings.role != "worker":
            check_metrics_port(self.settings)
        serves = [
            queue
            for queue in self.settings.queues
            if (selected is None or queue.name in selected or queue.pending in selected)
            and not {queue.name, queue.pending} & self._excluded
        ]
        if self.settings.role == "scheduler":
            self._consume_no_pending_queue(selected)
            self.check_scheduling()
            return None
        if not serves:
            self._serves_none = serves_none(self.app, self.settings.queue_names, known)
            return None
        refuse_settings(worker)
        self._warnings = warnings_of(worker)
        return Node(worker, self.settings, self.redis_url, self.delivery, serves)

    @property
    def _pending_names(self) -> set[str]:
        """Queues that nobody may consume past the ledger."""
        return {name for queue in self.settings.queues for name in (queue.name, queue.pending)}

    def _consume_no_pending_queue(self, selected: list[str] | None) -> None:
        named = self._pending_names & set(selected or ())
        if named:
            raise ConfigurationError(
                f"role 'scheduler' runs no affinity tasks, but -Q names {sorted(named)[0]!r}: "
                "leave it out, or use role 'worker' or 'both'"
            )
        internals.consume_worker_queues(self.app, self._pending_names, [])

    def _check_tasks(self) -> None:
        for task in self.app.tasks.values():
            if not hasattr(task, "affinity_tag_from"):
                continue
            queue = getattr(task, "affinity_queue", None) or usual_queue(task)
            name = getattr(queue, "name", queue)
            declared = {n for q in self.settings.queues for n in (q.name, q.pending)}
            if not declared or (name is not None and name not in declared):
                raise UndeclaredQueueError(str(name), self.settings.queue_names, task.name)

    def raise_startup_error(self) -> None:
        """Raise what made this worker's start impossible."""
        if self._startup_error is not None:
            raise self._startup_error

    def worker_started(self) -> None:
        """The worker's pool is up."""
        role = self.settings.role
        if self._serves_none is not None:
            text, is_mistyped = self._serves_none
            if is_mistyped:
                logger.warning(text, extra={"action": "serve_none"})
            else:
                logger.info(text, extra={"action": "serve_none"})
        if self.node is not None or role == "scheduler":
            logger.info("celery_affinity\n%s", self.banner(), extra={"action": "banner"})
            if role != "worker":
                self.start_scheduling(self._node_name)
        for warning in self._warnings:
            logger.warning(warning, extra={"action": "ineffective_setting"})

    def consumer_started(self, consumer: Any) -> None:
        """The worker (re)connected; its strategies were built anew."""
        if self.node is not None:
            self.node.consumer_started(consumer)
        steer(consumer, self)
        for name, task in self.app.tasks.items():
            if not hasattr(task, "affinity_tag_from"):
                continue
            pending = usual_pending_queue(task, self.settings)
            if pending is None:
                continue  # no queue of its own, and several to choose from: it runs where it came
            consumer.strategies[name] = to_pending_queue(
                self.app, name, pending, consumer.strategies[name], consumer.connection_errors
            )

    def worker_stopping(self) -> None:
        """The worker stops; its pool still runs."""
        self.stop_scheduling()
        if self.node is not None:
            self.node.reporter.drain()

    def worker_stopped(self) -> None:
        """The worker's pool has stopped."""
        self.stop_scheduling()
        if self.node is not None:
            self.node.wait_for_own_tasks()
            self.node.close_gates()
            self.node.leave()
            self.node = None

    def _on_shutting_down(self, **_: Any) -> None:
        if self._service is not None:
            self._service.request_stop()
        if self.node is not None:
            self.node.reporter.request_drain()

    def _on_process_shutdown(self, **_: Any) -> None:
        if self.node is not None:
            self.node.close_gates()

    def _on_process_init(self, **_: Any) -> None:
        index = slot_pool.pool_process_index()
        if self.node is not None and index is not None:
            self.node.open_gates(index)
