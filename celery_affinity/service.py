"""The schedulers of an app's affinity queues, one for each shard, each in a thread of its own."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from functools import partial

from celery_affinity.burials import Burials, Tell
from celery_affinity.carrying import Carrier, Spread
from celery_affinity.connection import connect
from celery_affinity.delivery import Delivery
from celery_affinity.doorbell import Doorbell
from celery_affinity.intake import Intake, TagOf, shard_in
from celery_affinity.keys import Keys
from celery_affinity.leadership import Elector, candidate_name
from celery_affinity.rescuer import Rescuer
from celery_affinity.resharding import begin_with_shards
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
        """Names of the queues whose term is held: of their first shard, where they have several."""
        running = zip(self._settings.parts, list(self._running), strict=False)
        return [
            part.name for part, (scheduler, _) in running if scheduler.leading and not part.shard
        ]

    def start(self) -> None:
        """Start a scheduler for each shard of each queue. Does not wait for Redis."""
        for part in self._settings.parts:
            scheduler = self._scheduler(part)
            thread = threading.Thread(
                target=scheduler.run, name=f"affinity-scheduler-{part.state}", daemon=True
            )
            self._running.append((scheduler, thread))
            thread.start()

    def request_stop(self) -> None:
        """Stop campaigning soon, without waiting. Safe in a signal handler."""
        for scheduler, _ in self._running:
            scheduler.stop()

    def stop(self, seconds: float = 5.0) -> None:
        """Resign from all terms, so that another node takes over at once.

        Arguments:
            seconds: To wait for all of them together.
        """
        until = time.monotonic() + seconds
        for scheduler, _ in self._running:
            scheduler.stop()
        for _, thread in self._running:
            thread.join(max(0.0, until - time.monotonic()))
        self._running.clear()

    def _scripts(self, shard: int) -> Scripts:
        keys = Keys(self._settings.namespace, shard)
        return Scripts(connect(self._url, keys.prefix), keys)

    def _scheduler(self, queue: AffinityQueue) -> Scheduler:
        scripts = self._scripts(queue.shard)
        client = scripts.client
        pending = self._delivery.pending_lists(queue)
        doorbells: Callable[[list[str]], Doorbell] = lambda lists: Doorbell(client, lists)  # noqa: E731
        return Scheduler(
            scripts,
            queue,
            Elector(scripts, queue.state, candidate_name(self._node), self._settings.leader_ttl),
            self._intake(scripts, queue, pending),
            Rescuer(scripts, queue.state, self._settings.heartbeat_timeout),
            Burials(scripts, queue.state, self._tell_buried),
            doorbells,
            pending,
            None if queue.shard else self._carrier(queue),
            (lambda: None) if queue.shard else partial(begin_with_shards, queue, self._scripts),
        )

    def _intake(self, scripts: Scripts, queue: AffinityQueue, pending: list[str]) -> Intake:
        spread, place = queue.untagged == "spread", (queue.shard, queue.shards)
        return Intake(scripts, queue.state, pending, self._tag_of, spread, *place)

    def _carrier(self, queue: AffinityQueue) -> Carrier | None:
        broker = self._delivery.broker
        if broker is None:
            return None
        source = partial(broker.source, queue.pending)
        return Carrier(self._scripts(0), queue.state, queue.name, source, self._spread(queue))

    def _spread(self, queue: AffinityQueue) -> Spread | None:
        if queue.shards == 1:
            return None
        others = [(self._scripts(part.shard), part.state) for part in queue.parts[1:]]
        spread, shards = queue.untagged == "spread", queue.shards
        return Spread(others, lambda raw: shard_in(raw, self._tag_of, spread, shards))
