"""Redis as the broker, with the ledger in another Redis: kombu's lists, read and written directly.

kombu's own consumer takes a message off its list before it notes it anywhere; a crash between the
two loses it. So messages are copied here and stay in their list until the ledger has them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from hashlib import blake2b
from typing import Any

from kombu import Queue
from redis import Redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from celery_affinity.broker import Taken
from celery_affinity.doorbell import Doorbell
from celery_affinity.topology import RedisNames, worker_queue

__all__ = ("RedisBroker", "RedisOutlet", "RedisSight", "RedisSource")

#: Seconds for an answer to somebody who only looks.
LOOK_SECONDS = 2.0
#: Messages that one step of a look for a task reads at most, and about how many bytes.
STEP, STEP_BYTES = 256, 1_000_000


class RedisBroker:
    """Makes the connections.

    Arguments:
        connect: Makes a client of the broker's Redis; keyword arguments as `connection.connect`.
    """

    def __init__(self, connect: Callable[..., Redis], names: RedisNames) -> None:
        self._connect = connect
        self._names = names

    def source(self, pending: str) -> RedisSource:
        """Connect to take from a pending queue."""
        return RedisSource(self._connect(), self._names, pending)

    def outlet(self) -> RedisOutlet:
        """Connect to publish into worker queues."""
        return RedisOutlet(self._connect(), self._names)

    def sight(self) -> RedisSight:
        """Connect to look at pending queues."""
        client = self._connect(socket_timeout=LOOK_SECONDS)
        client.set_retry(Retry(NoBackoff(), 1))
        return RedisSight(client, self._names)

    def worker_queue(self, name: str, before_declare: Callable[[], None] | None) -> Queue:
        """As with broker and ledger in one Redis."""
        return worker_queue(name, before_declare)


class RedisOutlet:
    """Puts messages into the lists of worker queues."""

    def __init__(self, client: Redis, names: RedisNames) -> None:
        self._client: Any = client
        self._names = names

    def publish(self, messages: Sequence[tuple[str, bytes]]) -> list[bool]:
        """All in one step: a worker queue's list need not be there."""
        with self._client.pipeline(transaction=True) as pipe:
            for queue, raw in messages:
                pipe.lpush(self._names.main_list(queue), raw)
            pipe.execute()
        return [True] * len(messages)

    def delete(self, worker_queues: Sequence[str]) -> None:
        """Delete their lists and binding tables."""
        for queue in worker_queues:
            self._client.delete(*self._names.leftovers(queue))

    def close(self) -> None:
        """Hang up."""
        self._client.close()


class RedisSource(RedisOutlet):
    """Reads the lists of one pending queue."""

    def __init__(self, client: Redis, names: RedisNames, pending: str) -> None:
        super().__init__(client, names)
        self._pending = pending
        self._lists = names.lists(pending)
        self._doorbell = Doorbell(client, self._lists)

    def take(self, most: int, seconds: float) -> list[Taken]:
        """Copy the oldest messages, those of urgent lists first."""
        taken = self._copied(most)
        if not taken and self._doorbell.wait(seconds):
            taken = self._copied(most)
        return taken

    def _copied(self, most: int) -> list[Taken]:
        taken: list[Taken] = []
        for name in self._lists:
            left = most - len(taken)
            if not left:
                break
            found = self._client.lrange(name, -left, -1)[::-1]
            # kombu gives each published copy a delivery tag of its own.
            taken += [
                Taken(raw, blake2b(raw, digest_size=16).hexdigest(), True, name) for raw in found
            ]
        return taken

    def done(self, taken: Sequence[Taken]) -> None:
        """Take them off their lists, by value: a superseded leader may be late."""
        with self._client.pipeline(transaction=False) as pipe:
            for one in taken:
                pipe.lrem(one.handle, -1, one.raw)
            pipe.execute()

    def give_back(self, raws: Sequence[bytes], identities: Sequence[str]) -> None:
        """Publish copies that are messages of their own: with another delivery tag."""
        with self._client.pipeline(transaction=True) as pipe:
            for raw, identity in zip(raws, identities, strict=True):
                pipe.lpush(self._names.main_list(self._pending), _copy(raw, identity))
            pipe.execute()

    def close(self) -> None:
        """Hang up."""
        self._doorbell.close()
        super().close()


class RedisSight:
    """Counts and reads the lists of pending queues."""

    def __init__(self, client: Redis, names: RedisNames) -> None:
        self._client: Any = client
        self._names = names

    def waiting(self, pending: str) -> int:
        """The lengths of its lists, at one moment."""
        with self._client.pipeline(transaction=True) as pipe:
            for name in self._names.lists(pending):
                pipe.llen(name)
            return sum(pipe.execute())

    def find(self, pending: str, task_id: str) -> int | None:
        """Read its lists in steps, from the oldest message on."""
        found = (self._place(name, task_id) for name in self._names.lists(pending))
        return next((place for place in found if place is not None), None)

    def _place(self, name: str, task_id: str) -> int | None:
        # As find.lua does; but a broker's user need not be allowed scripts.
        wanted = [f'"id":{space}"{task_id}"'.encode() for space in ("", " ")]
        looked, size, step = 0, 0, 1
        while page := self._client.lrange(name, -looked - step, -looked - 1)[::-1]:
            for at, raw in enumerate(page, looked + 1):
                if any(text in raw for text in wanted):
                    return at
            looked += len(page)
            size += sum(map(len, page))
            step = max(1, min(4 * step, STEP, STEP_BYTES * looked // size))
        return None

    def close(self) -> None:
        """Hang up."""
        self._client.close()


def _copy(raw: bytes, delivery_tag: str) -> str:
    message = json.loads(raw)
    message["properties"]["delivery_tag"] = delivery_tag
    return json.dumps(message)
