"""The figures of an affinity queue that a monitoring system wants, read from the ledger.

One reading costs a fixed number of commands, however many tags wait, plus a few for each worker.
Does not: know of Prometheus, or keep anything between two readings.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any

from celery_affinity.settings import AffinityQueue
from celery_affinity.shards import Shards
from celery_affinity.types import QueueStats, TagRecord, WorkerRecord
from celery_affinity.whole import WholeLedger

__all__ = ("COUNTERS", "WAIT_BOUNDS_MS", "Measures", "QueueMeasures")

#: Upper bounds of the ledger's counts of waits; those of lua/include/waits.lua.
WAIT_BOUNDS_MS = (
    5, 10, 25, 50, 100, 250, 500, 1000, 2500, 5000, 10_000, 30_000, 60_000, 300_000, 1_800_000,
)  # fmt: skip
#: The ledger's counters that are shown.
COUNTERS = (
    "admitted", "settled", "leases", "warm", "moved", "requeued", "rescued", "resent", "refused",
    "buried",
)  # fmt: skip
#: Ready tags that are looked at one by one where a tag may hold several slots.
LOOK = 200


@dataclass(frozen=True)
class QueueMeasures:
    """One affinity queue at one moment."""

    stats: QueueStats
    #: Totals since the ledger began, by COUNTERS.
    totals: Mapping[str, int]
    #: Whether nothing is dispatched: it is evacuated or paused.
    stopped: bool
    #: Number of the (first shard's) leader's term; None if nobody schedules (one of its shards).
    term: int | None
    #: Leases that are held now.
    leases: int
    #: Tasks that could start now if slots were free: the ready tags, each with its room.
    startable: int
    #: Seconds since which the first tag of the ring has waited for a slot; 0.0 if none waits.
    oldest_wait: float
    #: Workers that serve the queue and take work.
    workers: int
    #: Slots that such a worker has for it, on average; 0.0 without workers.
    slots_a_worker: float
    #: Sampled tasks by how long they waited for their start: (upper bound in seconds, how many up
    #: to it); the last bound is infinite.
    waits: tuple[tuple[float, int], ...]
    #: Seconds that the sampled tasks waited, together.
    waited: float
    #: The longest backlogs, if they were asked for.
    top: tuple[TagRecord, ...] = ()

    @property
    def slots_wanted(self) -> int:
        """Slots that would all have work now: more would idle, however long the queue is."""
        return self.leases + (0 if self.stopped else self.startable)

    @property
    def workers_needed(self) -> int:
        """Workers of the present size that have so many slots.

        Without a worker its size is not known: one, if there is anything to do.
        """
        pending = self.stats.pending or 0  # not known: a worker could not get at them either
        unscheduled = pending > 0 and self.term is None
        if self.workers and self.slots_a_worker:
            needed = ceil(self.slots_wanted / self.slots_a_worker)
            return max(needed, 1) if unscheduled and not self.stopped else needed
        return int((self.slots_wanted > 0 or pending > 0) and not self.stopped)


@dataclass(frozen=True)
class _Figures:
    """What only the figures need of one shard."""

    counted: Mapping[str, int]
    startable: int
    oldest_wait: float


class Measures:
    """Reads the figures of affinity queues, each over all its shards."""

    def __init__(self, shards: Shards) -> None:
        self._shards = shards
        self._whole = WholeLedger(shards)

    def read(self, queues: Sequence[AffinityQueue], top: int = 0) -> list[QueueMeasures]:
        """The figures of these queues, with so many of the longest backlogs.

        Raises:
            redis.exceptions.RedisError: If Redis does not answer.
        """
        if not queues:
            return []
        workers = self._whole.workers(queues)
        return [self._read(queue, workers, top) for queue in queues]

    def _read(
        self, queue: AffinityQueue, workers: Sequence[WorkerRecord], top: int
    ) -> QueueMeasures:
        stats = self._whole.stats(queue)
        leaders = self._whole.leaders(queue)
        found = [self._figures(part) for part in queue.parts]
        counted: Counter[str] = Counter()
        for one in found:
            counted.update(one.counted)
        serving = [w for w in workers if queue.name in w.queues and not w.draining]
        slots = sum(min(queue.slots or len(w.slots), len(w.slots)) for w in serving)
        waits, total = [], 0
        for bound in (*WAIT_BOUNDS_MS, None):
            total += counted[f"wait:{bound or 'inf'}"]
            waits.append((float("inf") if bound is None else bound / 1000, total))
        return QueueMeasures(
            stats=stats,
            totals={name: counted[name] for name in COUNTERS},
            stopped=stats.evacuated or stats.paused,
            term=leaders[0].term if leaders[0] and all(leaders) else None,
            leases=sum(slot.queue == queue.name for w in workers for slot in w.slots),
            startable=sum(one.startable for one in found),
            oldest_wait=max(one.oldest_wait for one in found),
            workers=len(serving),
            slots_a_worker=slots / len(serving) if serving else 0.0,
            waits=tuple(waits),
            waited=counted["wait:sum"] / 1000,
            top=tuple(self._whole.longest(queue, top)) if top else (),
        )

    def _figures(self, part: AffinityQueue) -> _Figures:
        scripts = self._shards.scripts(part.shard)
        key, state = scripts.keys.queue, part.state
        with scripts.client.pipeline(transaction=True) as pipe:
            pipe.time()
            pipe.zrange(key(state, "ring"), 0, 0, withscores=True)
            pipe.zcard(key(state, "ring"))
            pipe.hmget(key(state, "conf"), "tag_concurrency", "mapped")
            pipe.hgetall(key(state, "c"))
            (seconds, micros), first, ready, (concurrency, mapped), raw = pipe.execute()
        most = int(concurrency or 1)
        alone = most == 1 and mapped != b"1"
        return _Figures(
            counted={name.decode(): int(float(value)) for name, value in raw.items()},
            startable=ready if alone else self._room(part, most),
            oldest_wait=max(0.0, seconds + (micros - first[0][1]) / 1e6) if first else 0.0,
        )

    def _room(self, part: AffinityQueue, concurrency: int) -> int:
        """Tasks that the ready tags could start: 200 tags are counted, the rest is estimated."""
        scripts = self._shards.scripts(part.shard)
        client: Any = scripts.client
        key, state = scripts.keys.queue, part.state
        ready = client.zcard(key(state, "ring"))
        tags = client.zrange(key(state, "ring"), 0, LOOK - 1)
        if not tags:
            return 0
        with client.pipeline(transaction=False) as pipe:
            pipe.hmget(key(state, "limits"), tags)
            pipe.hmget(key(state, "held"), tags)
            for tag in tags:
                pipe.llen(scripts.keys.backlog(state, tag.decode("utf-8", "surrogateescape")))
            limits, held, *lengths = pipe.execute()
        found = sum(
            max(0, min(length, int(limit or concurrency) - len((slots or b"").split())))
            for limit, slots, length in zip(limits, held, lengths, strict=True)
        )
        total: int = ceil(found * max(ready, len(tags)) / len(tags))
        return total
