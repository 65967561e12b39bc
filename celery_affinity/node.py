"""One incarnation of a worker: what it serves, and the objects that do the work.

The bootsteps and signal receivers in `bootstep` call into this; nothing here is called by Celery.
"""

from __future__ import annotations

import logging
import os
from functools import partial
from typing import Any
from uuid import uuid4

from celery_affinity import internals
from celery_affinity.connection import check_server, connect
from celery_affinity.delivery import Delivery
from celery_affinity.gate import Gate
from celery_affinity.keys import Keys
from celery_affinity.reporter import Reporter
from celery_affinity.request import requeue_unknown_tasks, strategy_for
from celery_affinity.scripts import Scripts
from celery_affinity.settings import AffinityQueue, AffinitySettings
from celery_affinity.topology import worker_queue, worker_queue_name
from celery_affinity.watchdog import Lifeline, Watchdog

__all__ = ("Node",)

logger = logging.getLogger(__name__)


class Node:
    """A running worker that serves affinity queues.

    Arguments:
        worker: Celery's WorkController, at its ``worker_init`` signal.
        serves: The affinity queues named in ``-Q`` (all, without it).
        ordinary: Whether it consumes ordinary queues beside them.
    """

    def __init__(
        self,
        worker: Any,
        settings: AffinitySettings,
        url: str,
        delivery: Delivery,
        serves: list[AffinityQueue],
        ordinary: bool,
    ) -> None:
        self.app = worker.app
        self.name = str(worker.hostname)
        self.incarnation = uuid4().hex
        self.serves = serves
        self._settings = settings
        self._url = url
        self._delivery = delivery
        self._ordinary = ordinary
        self._worker = worker
        self.worker_queues = {
            queue.name: worker_queue_name(queue, self.name, self.incarnation) for queue in serves
        }
        self.slots_are_processes = internals.slots_are_processes(
            worker.pool_cls, settings.slot_is_process, bool(worker.use_eventloop)
        )
        if self.slots_are_processes:
            worker.pool_cls = internals.SlotTaskPool
        internals.consume_worker_queues(
            self.app,
            [name for queue in serves for name in {queue.name, queue.pending}],
            [worker_queue(name, self._announce) for name in self.worker_queues.values()],
        )
        pending = {queue.state: queue.pending for queue in serves}
        internals.settle_own_retries(self.app, pending.get)
        self._lifeline = Lifeline()
        self.reporter = Reporter(
            self._scripts,
            self.incarnation,
            self._announcement,
            settings.heartbeat_interval,
            self._lifeline,
        )
        self._started = False
        self._gate: tuple[int, Gate] | None = None

    def _scripts(self, single_threaded: bool = False) -> Scripts:
        keys = Keys(self._settings.namespace)
        return Scripts(connect(self._url), keys, single_threaded=single_threaded)

    @property
    def slots(self) -> int:
        """Slots of this node: the size of its pool."""
        return int(self._worker.max_concurrency or self._worker.pool.num_processes)

    def _announcement(self) -> dict[str, Any]:
        single = self.slots == 1 and self._worker.pool_cls.__module__.endswith(".prefork")
        queues = [
            (
                queue.state,
                min(queue.slots or self.slots, self.slots),
                self._delivery.worker_list(self.worker_queues[queue.name]),
            )
            for queue in self.serves
        ]
        junk = [
            key for name in self.worker_queues.values() for key in self._delivery.leftovers(name)
        ]
        return {
            "name": self.name,
            # A second message waits at the slot's process while the first one runs.
            "depth": 2 if self.slots_are_processes or single else 1,
            "slots": self.slots,
            "queues": queues,
            "junk": junk,
            "role": self._settings.role,
            "timeout_ms": int(self._settings.heartbeat_timeout * 1000),
        }

    # In the processes that run tasks

    def open_gates(self, slot: int | None) -> None:
        """Put this process' gate around all tasks of the app."""
        if self._gate is None or self._gate[0] != os.getpid():
            self._gate = os.getpid(), self._make_gate(slot)
            if self._settings.on_ledger_lost == "stop":
                self._watch(self._gate[1])
        gate = self._gate[1]
        internals.wrap_tracers(self.app.tasks.values(), gate)
        gate.process_up()

    def close_gates(self) -> None:
        """This process stops running tasks."""
        if self._gate is not None and self._gate[0] == os.getpid():
            self._gate[1].close()

    def _watch(self, gate: Gate) -> None:
        dog = Watchdog(self._lifeline, gate.oldest, self._settings.heartbeat_timeout)
        internals.native_thread(dog.run, "affinity-watchdog")

    def _make_gate(self, slot: int | None) -> Gate:
        in_process = slot is None
        return Gate(
            connect=partial(self._scripts, single_threaded=not in_process),
            refusal=internals.refusal,
            queue_names={queue.state: queue.name for queue in self.serves},
            node=self.name,
            incarnation=self.incarnation,
            slot=slot if self.slots_are_processes else None,
            in_process=in_process,
            ordinary=self._ordinary,
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
            consumer.strategies[name] = strategy_for(
                task, self.app, consumer, consumer.strategies[name], self.reporter, to_pool
            )
        requeue_unknown_tasks(consumer, self.reporter)
        if self._started:
            self.reporter.reconnected()
        else:
            self._started = True
            internals.native_thread(self.reporter.run, "affinity-heartbeat")
        logger.info(
            "Serving %s with %d slots as %s.",
            ", ".join(map(repr, self.worker_queues)),
            self.slots,
            self.incarnation,
            extra={"action": "serve", "incarnation": self.incarnation},
        )

    def _announce(self) -> None:
        """Register before the worker queue is declared, so that the ledger knows what to delete.

        A node that died between the two in the other order left its queue's binding for ever
        (test_a_worker_that_dies_while_it_starts_leaves_nothing).
        """
        if not self._started:
            check_server(self._scripts().client, logger)
        self.reporter.register()

    def info(self) -> dict[str, Any]:
        """For ``celery inspect stats``."""
        return {
            "incarnation": self.incarnation,
            "queues": dict(self.worker_queues),
            "slots": self.slots,
            "slot_is_process": self.slots_are_processes,
            "held": self.reporter.held.names(),
        }
