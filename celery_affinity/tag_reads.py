"""Reads of the tags that one shard's ledger has."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from redis import Redis

from celery_affinity.keys import Keys
from celery_affinity.settings import AffinityQueue
from celery_affinity.sharding import node_of
from celery_affinity.types import TagRecord

__all__ = ("TagReads",)

PAGE = 500
#: Long backlogs that the leader remembers at most (lua/include/admit_entry.lua).
LONGEST = 1000


def _text(value: Any) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


class TagReads:
    """Mixed into `Ledger`."""

    def __init__(self, client: Redis, keys: Keys) -> None:
        self._client: Any = client
        self._keys = keys

    def held_tags(self, queue: AffinityQueue) -> list[bytes]:
        """The tags that hold slots."""
        key = self._keys.queue(queue.state, "held")
        return [tag for tag, _ in self._client.hscan_iter(key, count=PAGE)]

    def ready_count(self, queue: AffinityQueue) -> int:
        """How many tags are in the ready ring."""
        return int(self._client.zcard(self._keys.queue(queue.state, "ring")))

    def ready_tags(self, queue: AffinityQueue, first: int, count: int) -> list[bytes]:
        """Tags of the ready ring in its order, from the place `first` (0 is the ring's head) on."""
        key = self._keys.queue(queue.state, "ring")
        return list(self._client.zrange(key, first, first + count - 1))

    def halted_tags(self, queue: AffinityQueue, limit: int) -> list[bytes]:
        """Tags that wait for an operator, `limit` of them or a few more."""
        found: list[bytes] = []
        for tag, _ in self._client.hscan_iter(self._keys.queue(queue.state, "halted"), count=PAGE):
            found.append(tag)
            if len(found) >= limit:
                break
        return found

    def long_backlogs(self, queue: AffinityQueue) -> dict[bytes, int]:
        """The tags with 32 entries and more that wait, 1,000 at most, and how many each has."""
        key = self._keys.queue(queue.state, "big")
        tags = self._client.zrevrange(key, 0, LONGEST - 1)
        with self._client.pipeline(transaction=False) as pipe:
            for tag in tags:
                pipe.llen(self._keys.backlog(queue.state, _text(tag)))
            return dict(zip(tags, pipe.execute(), strict=True))

    def tag_records(self, queue: AffinityQueue, tags: Sequence[bytes]) -> list[TagRecord]:
        """What there is to say of these tags, in their order."""
        if not tags:
            return []
        key = self._keys.queue
        with self._client.pipeline(transaction=False) as pipe:
            pipe.hmget(key(queue.state, "held"), tags)
            pipe.hmget(key(queue.state, "halted"), tags)
            for tag in tags:
                pipe.llen(self._keys.backlog(queue.state, _text(tag)))
                pipe.zrank(key(queue.state, "ring"), tag)
            held, halted, *rest = pipe.execute()
        return [
            TagRecord(
                _text(tag),
                rest[2 * at],
                tuple(map(self._slot_name, _text(held[at] or b"").split())),
                None if rest[2 * at + 1] is None else rest[2 * at + 1] + 1,
                tuple(_text(halted[at] or b"").split()),
            )
            for at, tag in enumerate(tags)
        ]

    def _slot_name(self, held: str) -> str:
        incarnation, _, index = held.partition(":")
        return f"{node_of(incarnation, self._keys.shard)}:{index}"

    def due_entries(self, queue: AffinityQueue, tag: str) -> list[int]:
        """Entries of a tag that are due later."""
        pattern = "*:" + re.sub(r"([*?\[\]\\])", r"\\\1", tag)
        found = self._client.zscan_iter(self._keys.queue(queue.state, "eta"), pattern, count=1000)
        pairs = [_text(member).split(":", 1) for member, _ in found]
        return sorted({int(entry) for entry, owner in pairs if owner == tag})
