"""Reads of whole affinity queues: what the ledgers of their shards have, put together.

A queue with one shard costs what a read of that one's ledger costs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import fields, replace

from celery_affinity import tag_lists
from celery_affinity.delivery import waiting_elsewhere
from celery_affinity.settings import AffinityQueue
from celery_affinity.shards import Shards
from celery_affinity.tag_lists import Part
from celery_affinity.types import (
    ChangeRecord,
    DeadLetter,
    LeaderRecord,
    QueueStats,
    SlotRecord,
    TagRecord,
    WorkerRecord,
)

__all__ = ("WholeLedger",)


class WholeLedger:
    """Reads a namespace's queues, each over all its shards."""

    def __init__(self, shards: Shards) -> None:
        self._shards = shards

    def _parts(self, queue: AffinityQueue) -> list[Part]:
        return [(self._shards.ledger(part.shard), part) for part in queue.parts]

    def stats(self, queue: AffinityQueue) -> QueueStats:
        """Counts of one affinity queue. Each shard's are of one moment, a broker's elsewhere of the
        one before.
        """
        elsewhere = waiting_elsewhere(self._shards.delivery, queue)
        parts = self._parts(queue)
        return _sum([ledger.stats(part, 0 if part.shard else elsewhere) for ledger, part in parts])

    def workers(self, queues: Sequence[AffinityQueue]) -> list[WorkerRecord]:
        """The registered workers, by name: one record for each, of all shards of these queues."""
        parts = [part for queue in queues for part in queue.parts]
        by_node: dict[str, list[WorkerRecord]] = {}
        for shard in range(max((queue.shards for queue in queues), default=1)):
            mine = [part for part in parts if part.shard == shard]
            for record in self._shards.ledger(shard).workers(mine):
                by_node.setdefault(record.worker_id, []).append(record)
        return sorted(map(_one_worker, by_node.values()), key=lambda record: record.name)

    def leader(self, queue: AffinityQueue) -> LeaderRecord | None:
        """Who schedules the queue's first shard, or None."""
        return self._shards.ledger().leader(queue)

    def leaders(self, queue: AffinityQueue) -> list[LeaderRecord | None]:
        """Who schedules each shard."""
        return [ledger.leader(part) for ledger, part in self._parts(queue)]

    def tags(self, queue: AffinityQueue, limit: int, skip: int = 0) -> list[TagRecord]:
        """Tags that hold slots, then those that wait, then those that are halted."""
        return tag_lists.tags(self._parts(queue), limit, skip)

    def longest(self, queue: AffinityQueue, limit: int) -> list[TagRecord]:
        """The tags with the most entries waiting."""
        return tag_lists.longest(self._parts(queue), limit)

    def changes(self, limit: int) -> list[ChangeRecord]:
        """What operators asked for, the latest first; the first shard has the record of it."""
        return self._shards.ledger().changes(limit)

    def dead_entries(self, queue: AffinityQueue, tag: str | None) -> Iterator[int]:
        """The entries that are buried now, by number, of one tag or of all."""
        for ledger, part in self._parts(queue):
            yield from ledger.dead_entries(part, tag)

    def dead_letters(
        self, queue: AffinityQueue, limit: int, after: int, tag: str | None
    ) -> list[DeadLetter]:
        """What was buried, by entry, from the one behind `after` on; at most `limit`."""
        found: list[DeadLetter] = []
        # The numbers of a shard are all above those of the one before.
        for ledger, part in self._parts(queue):
            if (left := limit - len(found)) <= 0:
                break
            found += ledger.dead_letters(part, left, after, tag)
        return found


def _sum(found: Sequence[QueueStats]) -> QueueStats:
    if len(found) == 1:
        return found[0]
    known = [stats.pending for stats in found if stats.pending is not None]
    counted = [
        field.name for field in fields(QueueStats) if field.name not in ("queue", "pending", *FLAGS)
    ]
    return QueueStats(
        queue=found[0].queue,
        pending=sum(known) if len(known) == len(found) else None,
        **{name: any(getattr(stats, name) for stats in found) for name in FLAGS},
        **{name: sum(getattr(stats, name) for stats in found) for name in counted},
    )


#: Of a shard's counts those that are no numbers.
FLAGS = ("evacuated", "paused")


def _one_worker(found: Sequence[WorkerRecord]) -> WorkerRecord:
    """A node's records of all its shards as one."""
    if len(found) == 1:
        return found[0]
    slots = tuple(
        _one_slot([record.slots[at] for record in found if at < len(record.slots)])
        for at in range(max(len(record.slots) for record in found))
    )
    return replace(
        found[0],
        status="running" if any(slot.status == "running" for slot in slots) else "idle",
        draining=any(record.draining for record in found),
        queues=tuple(dict.fromkeys(name for record in found for name in record.queues)),
        slots=slots,
        heartbeat_left_seconds=min(record.heartbeat_left_seconds for record in found),
    )


def _one_slot(found: Sequence[SlotRecord]) -> SlotRecord:
    """A slot works for one shard. One that went to another between two looks may be seen in both:
    its later lease has the greater epoch.
    """
    return max(found, key=lambda slot: (slot.epoch or 0, slot.status == "running"))
