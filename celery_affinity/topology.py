"""Celery queues of the system, and their names on a Redis broker."""

from __future__ import annotations

from bisect import bisect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kombu import Exchange, Queue

from celery_affinity.settings import AffinityQueue

__all__ = ("RedisNames", "worker_queue", "worker_queue_name", "worker_queue_prefix")


def worker_queue_name(queue: AffinityQueue, node: str, incarnation: str) -> str:
    """Name of the Celery queue that one incarnation consumes for one affinity queue."""
    return f"{worker_queue_prefix(queue)}.{node}.{incarnation[:12]}"


def worker_queue_prefix(queue: AffinityQueue) -> str:
    """What the names of all worker queues of an affinity queue begin with, before a dot."""
    return queue.worker_queue_prefix or queue.name + ".worker"


def worker_queue(name: str) -> Queue:
    """The worker queue: consumed without acks, since the ledger recovers what is lost.

    It has an exchange of its own: bound to the default one it would leave a dead member in
    that exchange's binding table with every start of a worker.
    """
    return Queue(
        name,
        exchange=Exchange(name, type="direct", durable=False, delivery_mode=1),
        routing_key=name,
        durable=False,
        no_ack=True,
    )


@dataclass(frozen=True)
class RedisNames:
    """How kombu's Redis transport names the keys of a queue (kombu 5.3 to 5.7)."""

    global_keyprefix: str = ""
    sep: str = "\x06\x16"
    priority_steps: Sequence[int] = (0, 3, 6, 9)

    @classmethod
    def from_transport_options(cls, options: Mapping[str, Any]) -> RedisNames:
        """Read the broker's transport options."""
        default = cls()
        return cls(
            options.get("global_keyprefix") or "",
            options.get("sep") or default.sep,
            tuple(options.get("priority_steps") or default.priority_steps),
        )

    def lists(self, queue: str) -> list[str]:
        """The lists of a queue, in the order in which they are consumed."""
        return [self._list(queue, step) for step in self.priority_steps]

    def main_list(self, queue: str) -> str:
        """The list that a message without a priority goes into."""
        return self._list(queue, self.priority_steps[max(0, bisect(self.priority_steps, 0) - 1)])

    def leftovers(self, queue: str) -> list[str]:
        """Keys that a queue with an exchange of its own name leaves behind."""
        tables = ("_kombu.binding.", "_kombu.binding_permanent.")
        return [*self.lists(queue), *(self.global_keyprefix + table + queue for table in tables)]

    def _list(self, queue: str, step: int) -> str:
        return self.global_keyprefix + (f"{queue}{self.sep}{step}" if step else queue)
