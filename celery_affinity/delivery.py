"""How messages come from the pending queue into the ledger and from there to a worker.

Two strategies share the interface `Delivery`; the scripts are the same for both. With the broker on
the ledger's own Redis they move messages between the broker's lists, in the step that changes
the state. With any other broker lists in the ledger stand for the broker's: an inbox that a carrier
fills (carrying.py), and for each node an outbox that it empties itself (relay.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from celery_affinity.broker import Broker, OutOfSight
from celery_affinity.keys import Keys
from celery_affinity.lookout import Lookout
from celery_affinity.settings import AffinityQueue
from celery_affinity.topology import RedisNames, worker_queue

__all__ = ("CarriedDelivery", "Delivery", "SameRedisDelivery", "waiting_elsewhere")


class Delivery(Protocol):
    """What the scheduler and the nodes need to know of the broker."""

    #: The broker, if it is not the ledger's Redis, and what looks at its pending queues.
    broker: Broker | None
    lookout: Lookout | None

    def pending_lists(self, queue: AffinityQueue) -> list[str]:
        """Lists of the ledger's Redis to take messages from, most urgent first."""
        ...

    def main_list(self, queue: AffinityQueue) -> str:
        """Where an evacuation puts messages: the pending list for those without a priority."""
        ...

    def worker_list(self, worker_queue: str, incarnation: str, shard: int = 0) -> str:
        """Where the ledger puts a dispatched message."""
        ...

    def leftovers(self, worker_queue: str, incarnation: str, shard: int = 0) -> list[str]:
        """Keys of the ledger's Redis to delete when its worker is gone."""
        ...

    def worker_queue(self, name: str, before_declare: Callable[[], None] | None = None) -> Any:
        """The kombu queue that an incarnation consumes."""
        ...


class SameRedisDelivery:
    """Broker and ledger are one Redis database."""

    broker: Broker | None = None
    lookout: Lookout | None = None

    def __init__(self, names: RedisNames) -> None:
        self._names = names

    def pending_lists(self, queue: AffinityQueue) -> list[str]:
        """The pending queue's lists, one for each priority step."""
        return self._names.lists(queue.pending)

    def main_list(self, queue: AffinityQueue) -> str:
        """The pending queue's list for messages without a priority."""
        return self._names.main_list(queue.pending)

    def worker_list(self, worker_queue: str, incarnation: str, shard: int = 0) -> str:
        """The worker queue's main list."""
        return self._names.main_list(worker_queue)

    def leftovers(self, worker_queue: str, incarnation: str, shard: int = 0) -> list[str]:
        """The worker queue's lists and binding tables."""
        return self._names.leftovers(worker_queue)

    def worker_queue(self, name: str, before_declare: Callable[[], None] | None = None) -> Any:
        """A queue with an exchange of its own."""
        return worker_queue(name, before_declare)


class CarriedDelivery:
    """The broker is elsewhere; lists of the ledger stand for its queues."""

    def __init__(self, broker: Broker, keys: Keys) -> None:
        self.broker: Broker | None = broker
        self.lookout: Lookout | None = Lookout(broker.sight)
        self._there = broker
        self._keys = keys

    def _of(self, queue: AffinityQueue) -> Keys:
        return self._keys_of(queue.shard)

    def _keys_of(self, shard: int) -> Keys:
        return Keys(self._keys.namespace, shard)

    def pending_lists(self, queue: AffinityQueue) -> list[str]:
        """The inbox. What is urgent was taken from the broker first."""
        return [self._of(queue).inbox(queue.state)]

    def main_list(self, queue: AffinityQueue) -> str:
        """What an evacuation puts there is then given back to the broker (carrying.py)."""
        return self._of(queue).back(queue.state)

    def worker_list(self, worker_queue: str, incarnation: str, shard: int = 0) -> str:
        """The node's outbox, one for all its queues."""
        return self._keys_of(shard).outbox(incarnation)

    def leftovers(self, worker_queue: str, incarnation: str, shard: int = 0) -> list[str]:
        """The node's outbox; the worker queue itself is deleted by the carrier."""
        return [self._keys_of(shard).outbox(incarnation)]

    def worker_queue(self, name: str, before_declare: Callable[[], None] | None = None) -> Any:
        """A queue of the broker's own kind."""
        return self._there.worker_queue(name, before_declare)


def waiting_elsewhere(delivery: Delivery, queue: AffinityQueue) -> int | None:
    """Messages that wait on a broker which is not the ledger's Redis; None: it does not answer."""
    if delivery.lookout is None:
        return 0
    try:
        return delivery.lookout.waiting(queue.pending)
    except OutOfSight:
        return None
