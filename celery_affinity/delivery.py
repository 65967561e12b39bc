"""How messages come from the pending queue into the ledger and from there to a worker.

Two strategies share the interface `Delivery`. This one, for a broker on the ledger's own Redis,
lets the scripts move messages between the lists themselves, in the step that changes the state.
A kombu-publishing one, for every other broker, is to come.
"""

from __future__ import annotations

from typing import Protocol

from celery_affinity.topology import RedisNames

__all__ = ("Delivery", "SameRedisDelivery")


class Delivery(Protocol):
    """What the scheduler and the nodes need to know of the broker."""

    def pending_lists(self, queue: str) -> list[str]:
        """Lists to take messages from, most urgent first."""
        ...

    def main_list(self, queue: str) -> str:
        """The list of a queue for messages without a priority."""
        ...

    def worker_list(self, worker_queue: str) -> str:
        """Where the ledger puts a dispatched message."""
        ...

    def leftovers(self, worker_queue: str) -> list[str]:
        """What to delete when its worker is gone."""
        ...


class SameRedisDelivery:
    """Broker and ledger are one Redis database."""

    def __init__(self, names: RedisNames) -> None:
        self._names = names

    def pending_lists(self, queue: str) -> list[str]:
        """The pending queue's lists, one for each priority step."""
        return self._names.lists(queue)

    def main_list(self, queue: str) -> str:
        """The list of a queue for messages without a priority."""
        return self._names.main_list(queue)

    def worker_list(self, worker_queue: str) -> str:
        """The worker queue's main list."""
        return self._names.main_list(worker_queue)

    def leftovers(self, worker_queue: str) -> list[str]:
        """The worker queue's lists and binding tables."""
        return self._names.leftovers(worker_queue)
