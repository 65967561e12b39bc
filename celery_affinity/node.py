"""One incarnation of a worker: what it serves, and the objects that do the work.

The bootsteps and signal receivers in `bootstep` call into this; nothing here is called by Celery.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any
from uuid import uuid4

from celery.platforms import EX_FAILURE
from redis.exceptions import RedisError

from celery_affinity import internals, slot_pool
from celery_affinity.delivery import Delivery
from celery_affinity.exceptions import ConfigurationError
from celery_affinity.gate import Gate
from celery_affinity.namesake import Namesake
from celery_affinity.node_info import slots_of
from celery_affinity.node_ledgers import NodeLedgers
from celery_affinity.pulse import Pulse
from celery_affinity.reception import Strategy, requeue_unknown_tasks
from celery_affinity.relay import Relay
from celery_affinity.scripts import Scripts
from celery_affinity.server_checks import check_failover, check_server
from celery_affinity.settings import AffinityQueue, AffinitySettings
from celery_affinity.topology import worker_queue_name
from celery_affinity.unreadable import survive_unreadable
from celery_affinity.waiting import refuse_waits_for_own_tag
from celery_affinity.watchdog import Watchdog

__all__ = ("Node",)

logger = logging.getLogger(__name__)


class Node:
    """A running worker that serves affinity queues.

    Arguments:
        worker: Celery's WorkController, at its ``worker_init`` signal.
        serves: The affinity queues named in ``-Q`` (all, without it).
    """

    def __init__(
        self,
        worker: Any,
        settings: AffinitySettings,
        url: str,
        delivery: Delivery,
        serves: Sequence[AffinityQueue],
    ) -> None:
        self.app = worker.app
        self.name = str(worker.hostname)
        self.incarnation = uuid4().hex
        #: Replaced, not changed: the heartbeat's thread reads it.
        self.serves = tuple(serves)
        self._settings = settings
        self._delivery = delivery
        self._worker = worker
        #: Affinity queue -> this node's worker queue, also of those that it served once.
        self.worker_queues = {queue.name: self._worker_queue_name(queue) for queue in serves}
        self.slots_are_processes = slot_pool.slots_are_processes(
            worker.pool_cls, settings.slot_is_process, bool(worker.use_eventloop)
        )
        if self.slots_are_processes:
            worker.pool_cls = slot_pool.SlotTaskPool
        internals.consume_worker_queues(
            self.app,
            [name for queue in settings.queues for name in {queue.name, queue.pending}],
            [delivery.worker_queue(name, self._announce) for name in self.worker_queues.values()],
        )
        # Else a worker ends when Redis refuses its BRPOP: BUSY, a full disk (MISCONF).
        self.app.conf.broker_channel_error_retry = True
        pending = {part.state: part.pending for part in settings.parts}
        internals.settle_own_retries(self.app, pending.get, self._runs_alone)
        self._namesake = Namesake(self.name, self.incarnation)
        self._pulse = Pulse(settings.namespace, self.name)
        looks = [self._namesake.look]
        if delivery.broker is not None:
            looks.append(self._note_abroad)
        connect_anew = partial(internals.connect_anew, worker)
        self._ledgers = NodeLedgers(
            self, settings, url, delivery, looks, self._pulse.beat, connect_anew
        )
        self.reporter = self._ledgers.reporter
        internals.call_before_cold_stop(worker, self.reporter.request_drain)
        self._registered = False
        self._started = False
        self._slots = 0
        self._gate: tuple[int, Gate] | None = None

    def _worker_queue_name(self, queue: AffinityQueue) -> str:
        return worker_queue_name(queue, self.name, self.incarnation)

    def _runs_alone(self, state: str, tag: str) -> bool:
        queue = self._ledgers.part(state)
        assert queue is not None
        return queue.own_concurrencies.get(tag, queue.default_concurrency) == 1

    def _note_abroad(self, scripts: Scripts) -> None:
        """Say again and again what is to be deleted on the broker when this node is gone."""
        states = {queue.name: queue.state for queue in self._settings.queues}
        queues = {states[name]: queue for name, queue in list(self.worker_queues.items())}
        scripts.note_abroad(self.incarnation, queues)

    @property
    def slots(self) -> int:
        """Slots of this node: the size of its pool now, with autoscale the size it may have."""
        pool, autoscaler = self._worker.pool, getattr(self._worker, "autoscaler", None)
        try:
            if autoscaler:
                self._slots = int(autoscaler.max_concurrency)
            else:
                self._slots = int(pool.num_processes if pool.uses_semaphore else pool.limit)
        except AttributeError:
            pass  # the pool has stopped: as many as it had
        return self._slots

    @property
    def depth(self) -> int:
        """How many messages of a lease are sent at a time: a second one waits at the slot's
        process while the first one runs.
        """
        single = self.slots == 1 and self._worker.pool_cls.__module__.endswith(".prefork")
        return 2 if self.slots_are_processes or single else 1

    # In the processes that run tasks

    def open_gates(self, slot: int | None) -> None:
        """Put this process' gate around all tasks of the app."""
        if self._gate is None or self._gate[0] != os.getpid():
            self._gate = os.getpid(), self._make_gate(slot)
            if self._settings.on_ledger_lost == "stop":
                self._watch(self._gate[1])
        gate = self._gate[1]
        internals.wrap_tracers(self.app.tasks.values(), gate)
        refuse_waits_for_own_tag()
        gate.process_up()

    def close_gates(self) -> None:
        """This process stops running tasks."""
        if self._gate is not None and self._gate[0] == os.getpid():
            self._gate[1].close()

    def wait_for_own_tasks(self) -> None:
        """Where tasks run in this process: wait until none does.

        Celery goes on with its stop where that of its pool has failed, and the threads run on.
        """
        if self._gate is not None and self._gate[0] == os.getpid():
            while not self._gate[1].is_empty:
                time.sleep(0.05)

    def _watch(self, gate: Gate) -> None:
        dog = Watchdog(self._ledgers.lifelines, gate.began, self._settings.heartbeat_timeout)
        internals.native_thread(dog.run, "affinity-watchdog")

    def _make_gate(self, slot: int | None) -> Gate:
        in_process = slot is None
        return Gate(
            connect=partial(self._ledgers.scripts, single_threaded=not in_process),
            refusal=internals.refusal,
            queue_names=self._ledgers.queue_names,
            node=self.name,
            incarnations=self._ledgers.incarnations,
            slot=slot if self.slots_are_processes else None,
            in_process=in_process,
            trust_seconds=self._settings.heartbeat_timeout / 2,
            succeeded=partial(internals.stored_success, self.app),
        )

    # In the parent, on each start of its consumer

    def consumer_started(self, consumer: Any) -> None:
        """Receive dispatched messages; after a reconnect ask for what was lost."""
        if not consumer.pool.uses_semaphore:  # any pool but prefork runs tasks in this process
            self.open_gates(None)
        to_pool = (
            consumer.controller._process_task
            if self.slots_are_processes
            else consumer.on_task_request
        )
        for name, task in self.app.tasks.items():
            consumer.strategies[name] = Strategy(
                task, self.app, consumer, consumer.strategies[name], self.reporter, to_pool
            )
        most = (lambda: self.slots) if getattr(self._worker, "autoscaler", None) else None
        slot_pool.follow_size(consumer.pool, most, self.reporter.changed)
        requeue_unknown_tasks(consumer, self.reporter)
        survive_unreadable(consumer, self.reporter)
        if self._started:
            self.reporter.reconnected()
        else:
            self._started = True
            self._pulse.begin()
            for relay in self._ledgers.relays:
                relay.start()
            for name, loop in self._ledgers.loops.items():
                internals.native_thread(loop, name)
        logger.info(
            "Serving %s with %d slots as %s.",
            ", ".join(repr(queue.name) for queue in self.serves) or "no affinity queue",
            self.slots,
            self.incarnation,
            extra={"action": "serve", "incarnation": self.incarnation},
        )

    def leave(self) -> None:
        """The pool has stopped: this incarnation is no more."""
        if self._ledgers.exchange is not None:
            self._ledgers.exchange.stop()
        for relay in self._ledgers.relays:
            relay.stop()
        self.reporter.leave()
        if self._ledgers.relays:
            self._leave_broker(self._ledgers.relays[0])
        self._pulse.end()

    def _leave_broker(self, relay: Relay) -> None:
        try:
            relay.delete(list(self.worker_queues.values()))
            scripts = self._ledgers.scripts_of(0)
            for queue in self._settings.queues:
                if queue.name in self.worker_queues:
                    scripts.forget_abroad(queue.state, [self.worker_queues[queue.name]])
        except Exception as error:
            logger.warning(
                "Could not delete this worker's queues on the broker (%s): the leader does.",
                error,
                extra={"action": "leave_failed"},
            )

    # In the parent, when what it serves changes (remote control)

    def start_serving(self, queue: AffinityQueue, consume: Callable[[str], Any]) -> None:
        """Become a worker of one more queue.

        Arguments:
            consume: Celery's own way to consume a queue by name, now and after reconnects.
        """
        if queue in self.serves:
            return
        name = self._worker_queue_name(queue)
        self.worker_queues = {**self.worker_queues, queue.name: name}
        self.serves = (*self.serves, queue)
        elsewhere = self._delivery.broker is not None
        note = partial(self._note_abroad, self._ledgers.scripts_of(0)) if elsewhere else None
        self.app.amqp.queues.add(self._delivery.worker_queue(name, note))
        consume(name)
        self.reporter.changed()

    def stop_serving(self, queue: AffinityQueue, cancel: Callable[[str], Any]) -> None:
        """Be a worker of that queue no more: what has not started goes back, what runs ends here.

        Arguments:
            cancel: Celery's own way to stop consuming a queue, now and after reconnects.
        """
        if queue not in self.serves:
            return
        self.serves = tuple(served for served in self.serves if served is not queue)
        cancel(self.worker_queues[queue.name])
        self.reporter.changed()

    def _announce(self) -> None:
        """Register before the worker queue is declared, so that the ledger knows what to delete.

        A node that died between the two in the other order left its queue's binding for ever
        (test_a_worker_that_dies_while_it_starts_leaves_nothing).
        Called for each worker queue, and again after each reconnect.
        """
        scripts, elsewhere = self._ledgers.scripts_of(0), self._delivery.broker is not None
        try:
            if not self._registered:
                for shard in range(self._settings.shards):
                    client = self._ledgers.scripts_of(shard).client
                    check_server(client, logger)
                    check_failover(client, self._settings.heartbeat_timeout)
                self._namesake.before_registration(scripts)
            self.reporter.register()
            self._registered = True
            if elsewhere:
                self._note_abroad(scripts)
        except ConfigurationError as error:
            # Celery would log it as unrecoverable, with a traceback.
            logger.error("Not serving: %s", error, extra={"action": "refused"})
            raise SystemExit(EX_FAILURE) from error
        except RedisError as error:
            if not elsewhere:
                raise  # the broker's own error, which Celery knows
            # One for which Celery connects anew, as it does when its broker is away.
            raise ConnectionError(f"the ledger's Redis does not answer: {error}") from error

    def info(self) -> dict[str, Any]:
        """For ``celery inspect affinity``, ``celery inspect stats`` and Flower."""
        return {
            "incarnation": self.incarnation,
            "queues": {queue.name: self.worker_queues[queue.name] for queue in self.serves},
            "role": self._settings.role,
            "slots": slots_of(self.reporter.held, self.slots, self._ledgers.queue_names),
            "slot_is_process": self.slots_are_processes,
            "held": self.reporter.held.names(),
        }
