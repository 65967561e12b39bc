"""Reads of the ledger: what the public methods of `Affinity` return.

Does not: change anything, or scan the key space. What these return is one moment's view, each
record read in one step, the list of them in several.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any

from redis import Redis
from redis.exceptions import OutOfMemoryError

from celery_affinity.delivery import Delivery
from celery_affinity.keys import Keys
from celery_affinity.settings import AffinityQueue
from celery_affinity.types import (
    DeadLetter,
    LeaderRecord,
    QueueStats,
    SlotRecord,
    TagRecord,
    WorkerRecord,
)

__all__ = ("Ledger",)

PAGE = 500
#: Counters of `QueueStats`, in its order.
TOTALS = ("admitted", "settled", "requeued", "buried", "leases")


def _text(value: Any) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def _number(value: Any) -> int:
    return int(float(value or 0))


class Ledger:
    """Reads one namespace's ledger."""

    def __init__(self, client: Redis, keys: Keys, delivery: Delivery) -> None:
        self._client: Any = client
        self._keys = keys
        self._delivery = delivery

    def _together(self, ask: Callable[[Any], None]) -> list[Any]:
        """Answers of one moment; of several while memory is full: Redis takes no MULTI then."""
        try:
            return self._answers(ask, transaction=True)
        except OutOfMemoryError:
            return self._answers(ask, transaction=False)

    def _answers(self, ask: Callable[[Any], None], transaction: bool) -> list[Any]:
        with self._client.pipeline(transaction=transaction) as pipe:
            ask(pipe)
            return list(pipe.execute())

    def stats(self, queue: AffinityQueue) -> QueueStats:
        """Counts of one affinity queue."""
        key = self._keys.queue
        state = queue.state

        def ask(pipe: Any) -> None:
            for pending in self._delivery.pending_lists(queue.pending):
                pipe.llen(pending)
            pipe.hlen(key(state, "m"))
            pipe.zcard(key(state, "eta"))
            pipe.zcard(key(state, "ring"))
            pipe.hlen(key(state, "held"))
            pipe.hlen(key(state, "halted"))
            pipe.zcard(key(state, "idle"))
            pipe.hexists(key(state, "conf"), "evac")
            pipe.hlen(key(state, "dead"))
            pipe.hgetall(key(state, "c"))

        *lengths, entries, eta, ring, held, halted, idle, evac, dead, totals = self._together(ask)
        total = {_text(name): _number(value) for name, value in totals.items()}
        return QueueStats(
            queue.name,
            sum(lengths),
            entries,
            eta,
            ring,
            held,
            halted,
            idle,
            dead,
            bool(evac),
            *(total.get(n, 0) for n in TOTALS),
        )

    def entries(self, queue: AffinityQueue) -> list[int]:
        """The entries that are in the ledger, in no particular order."""
        key = self._keys.queue(queue.state, "m")
        # HSCAN would send their messages too; this is for an operator, not for a hot path.
        return [int(entry) for entry in self._client.hkeys(key)]

    def workers(self, queues: Sequence[AffinityQueue]) -> list[WorkerRecord]:
        """The registered workers, by name."""
        names = {queue.state: queue.name for queue in queues}
        found = self._client.zrange(self._keys.workers, 0, -1, withscores=True)
        seconds, micros = self._client.time()
        now = seconds * 1000 + micros // 1000
        records = [
            record
            for incarnation, due in found
            if (record := self._worker(_text(incarnation), (due - now) / 1000, names))
        ]
        return sorted(records, key=lambda record: record.name)

    def _worker(self, incarnation: str, left: float, names: dict[str, str]) -> WorkerRecord | None:
        def ask(pipe: Any) -> None:
            pipe.hgetall(self._keys.worker(incarnation, "info"))
            pipe.smembers(self._keys.worker(incarnation, "leased"))
            pipe.hvals(self._keys.worker(incarnation, "busy"))

        raw, leased, busy = self._together(ask)
        info = {_text(k): _text(v) for k, v in raw.items()}
        if not info:
            return None
        working = {_text(i) for i in busy}
        leases = {_text(i) for i in leased}
        slots = tuple(
            self._slot(incarnation, i, names)
            if str(i) in leases
            else SlotRecord(i, "running" if str(i) in working else "idle")
            for i in range(int(info.get("slots") or info["cap"]))
        )
        states = [line.split("\t")[0] for line in info["queues"].split("\n") if line]
        return WorkerRecord(
            incarnation,
            info["name"],
            "running" if any(slot.status == "running" for slot in slots) else "idle",
            info["state"] != "active",
            tuple(names.get(s, s) for s in states),
            slots,
            left,
        )

    def _slot(self, incarnation: str, index: int, names: dict[str, str]) -> SlotRecord:
        q, tag, epoch, n, e1, k1 = self._client.hmget(
            self._keys.slot(incarnation, index), ["q", "tag", "epoch", "n", "e1", "k1"]
        )
        if q is None:
            return SlotRecord(index, "idle")
        return SlotRecord(
            index,
            "running",
            names.get(_text(q), _text(q)),
            _text(tag),
            _number(n),
            int(epoch),
            int(e1) if k1 is not None and e1 is not None else None,
        )

    def tags(self, queue: AffinityQueue, limit: int) -> list[TagRecord]:
        """Tags that hold slots, then those that wait, in the ring's order, then those that are
        halted; at most `limit`.
        """
        held_key, ring_key = (
            self._keys.queue(queue.state, "held"),
            self._keys.queue(queue.state, "ring"),
        )
        slots: dict[bytes, tuple[str, ...]] = {}
        for tag, text in self._client.hscan_iter(held_key, count=PAGE):
            slots[tag] = tuple(_text(text).split())
            if len(slots) >= limit:
                break
        ring = self._client.zrange(ring_key, 0, max(0, limit - 1))
        places = {tag: place for place, tag in enumerate(ring, 1)}
        halted: dict[bytes, tuple[str, ...]] = {}
        halted_key = self._keys.queue(queue.state, "halted")
        for tag, text in self._client.hscan_iter(halted_key, count=PAGE):
            halted[tag] = tuple(_text(text).split())
            if len(halted) >= limit:
                break
        order = list(dict.fromkeys([*slots, *ring, *halted]))[:limit]
        with self._client.pipeline(transaction=False) as pipe:
            for tag in order:
                pipe.llen(self._keys.backlog(queue.state, _text(tag)))
            waiting = pipe.execute()
        return [
            TagRecord(_text(tag), n, slots.get(tag, ()), places.get(tag), halted.get(tag, ()))
            for tag, n in zip(order, waiting, strict=True)
        ]

    def leader(self, queue: AffinityQueue) -> LeaderRecord | None:
        """Who schedules the queue, or None."""
        key = self._keys.queue(queue.state, "leader")
        value, left = self._together(lambda pipe: pipe.get(key).pttl(key))
        if value is None:
            return None
        candidate, term = _text(value).rsplit(" ", 1)
        return LeaderRecord(queue.name, candidate, int(term), max(0, left) / 1000)

    def dead_entries(self, queue: AffinityQueue, tag: str | None) -> Iterator[int]:
        """The entries that are buried now, oldest first, of one tag or of all."""
        for entry, _ in self._buried(queue, 0, tag):
            yield entry

    def dead_letters(
        self, queue: AffinityQueue, limit: int, after: int, tag: str | None
    ) -> list[DeadLetter]:
        """What was buried, by entry, from the one behind `after` on; at most `limit`."""
        found = list(islice(self._buried(queue, after, tag), max(0, limit)))
        if not found:
            return []
        messages = self._client.hmget(
            self._keys.queue(queue.state, "deadm"), [entry for entry, _ in found]
        )
        return [
            DeadLetter(
                entry,
                str(about["tag"]),
                str(about["reason"]),
                int(about["attempts"]),
                float(about["at"]) / 1000,
                message or b"",
                str(about.get("traceback") or ""),
            )
            for (entry, about), message in zip(found, messages, strict=True)
        ]

    def _buried(
        self, queue: AffinityQueue, after: int, tag: str | None
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        """Entries with what is noted of them, a page at a time."""
        index = self._keys.queue(queue.state, "deadz")
        while page := self._client.zrangebyscore(index, f"({after}", "+inf", start=0, num=PAGE):
            about = self._client.hmget(self._keys.queue(queue.state, "dead"), page)
            for entry, meta in zip(page, about, strict=True):
                if meta is None:
                    continue  # taken out meanwhile
                note = json.loads(_text(meta))
                if tag is None or note["tag"] == tag:
                    yield int(entry), note
            after = int(page[-1])
