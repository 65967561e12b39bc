"""Celery queues of the system, and their names on a Redis broker."""

from __future__ import annotations

from bisect import bisect
from collections.abc import Callable, Mapping, Sequence
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


class WorkerQueue(Queue):
    """A queue that calls `before_declare` first, each time that it is declared."""

    # Not one of kombu's `attrs`: those are shown by `celery inspect active_queues`.
    before_declare: Callable[[], None] | None = None

    def bind(self, channel: Any) -> WorkerQueue:
        """A copy that is bound to a channel."""
        bound: WorkerQueue = super().bind(channel)
        bound.before_declare = self.before_declare
        return bound

    def declare(self, *args: Any, **kwargs: Any) -> Any:
        """Declare it on the broker."""
        if self.before_declare is not None:
            self.before_declare()
        return super().declare(*args, **kwargs)


def worker_queue(name: str, before_declare: Callable[[], None] | None = None) -> Queue:
    """The worker queue: consumed without acks, since the ledger recovers what is lost.

    It has an exchange of its own: bound to the default one it would leave a dead member in
    that exchange's binding table with every start of a worker.

    Arguments:
        before_declare: Tells the ledger what will be on the broker, and so has to be deleted.
    """
    queue = WorkerQueue(
        name,
        exchange=Exchange(name, type="direct", durable=False, delivery_mode=1),
        routing_key=name,
        durable=False,
        no_ack=True,
    )
    queue.before_declare = before_declare
    return queue


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
