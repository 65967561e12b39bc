"""The schedulers of an app's affinity queues, each in a thread of its own."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial

from celery_affinity.burials import Burials, Tell
from celery_affinity.carrying import Carrier
from celery_affinity.connection import connect
from celery_affinity.delivery import Delivery
from celery_affinity.doorbell import Doorbell
from celery_affinity.intake import Intake, TagOf
from celery_affinity.keys import Keys
from celery_affinity.leadership import Elector, candidate_name
from celery_affinity.rescuer import Rescuer
from celery_affinity.scheduler import Scheduler
from celery_affinity.scripts import Scripts
from celery_affinity.settings import AffinityQueue, AffinitySettings

__all__ = ("SchedulerService",)


class SchedulerService:
    """Campaigns for every affinity queue from `start` to `stop`."""

    def __init__(
        self,
        settings: AffinitySettings,
        url: str,
        delivery: Delivery,
        node: str,
        tag_of: TagOf,
        tell_buried: Tell,
    ) -> None:
        self._settings = settings
        self._url = url
        self._delivery = delivery
        self._node = node
        self._tag_of = tag_of
        self._tell_buried = tell_buried
        self._running: list[tuple[Scheduler, threading.Thread]] = []

    @property
    def leading(self) -> bool:
        """Whether a term of any queue is held."""
        return any(scheduler.leading for scheduler, _ in self._running)

    @property
    def led_queues(self) -> list[str]:
        """Names of the queues whose term is held."""
        running = zip(self._settings.queues, list(self._running), strict=False)
        return [queue.name for queue, (scheduler, _) in running if scheduler.leading]

    def start(self) -> None:
        """Start a scheduler for each queue. Does not wait for Redis."""
        for queue in self._settings.queues:
            scheduler = self._scheduler(queue)
            thread = threading.Thread(
                target=scheduler.run, name=f"affinity-scheduler-{queue.name}", daemon=True
            )
            self._running.append((scheduler, thread))
            thread.start()

    def request_stop(self) -> None:
        """Stop campaigning soon, without waiting. Safe in a signal handler."""
        for scheduler, _ in self._running:
            scheduler.stop()

    def stop(self, seconds: float = 5.0) -> None:
        """Resign from all terms, so that another node takes over at once."""
        for scheduler, _ in self._running:
            scheduler.stop()
        for _, thread in self._running:
            thread.join(seconds)
        self._running.clear()

    def _scheduler(self, queue: AffinityQueue) -> Scheduler:
        keys = Keys(self._settings.namespace)
        client = connect(self._url, keys.prefix)
        scripts = Scripts(client, keys)
        pending = self._delivery.pending_lists(queue)
        doorbells: Callable[[list[str]], Doorbell] = lambda lists: Doorbell(client, lists)  # noqa: E731
        return Scheduler(
            scripts,
            queue,
            Elector(scripts, queue.state, candidate_name(self._node), self._settings.leader_ttl),
            Intake(scripts, queue.state, pending, self._tag_of, queue.untagged == "spread"),
            Rescuer(scripts, queue.state, self._settings.heartbeat_timeout),
            Burials(scripts, queue.state, self._tell_buried),
            doorbells,
            pending,
            self._carrier(queue),
        )

    def _carrier(self, queue: AffinityQueue) -> Carrier | None:
        broker = self._delivery.broker
        if broker is None:
            return None
        keys = Keys(self._settings.namespace)
        scripts = Scripts(connect(self._url, keys.prefix), keys)
        return Carrier(scripts, queue.state, queue.name, partial(broker.source, queue.pending))
