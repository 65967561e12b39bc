"""Reads of one shard's ledger, into the records that the public methods of `Affinity` return.

A queue here is the queue's part in that shard (`AffinityQueue.parts`); whole.py puts the parts
together. Nodes are told by their names in the first shard.

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
from celery_affinity.sharding import node_of
from celery_affinity.tag_reads import TagReads
from celery_affinity.types import (
    ChangeRecord,
    DeadLetter,
    LeaderRecord,
    QueueStats,
    SlotRecord,
    WorkerRecord,
)

__all__ = ("Ledger",)

PAGE = 500
#: Counters of `QueueStats`, in its order.
TOTALS = ("admitted", "settled", "requeued", "buried", "leases", "purged")
#: Of the leader's notes of the pace (lua/include/tend.lua) those that rates are told from.
PACE_SAMPLES = 60
PACE_SECONDS = 60.0
#: So a token begins that stands for a slot which works for another shard (lua/include/base.lua).
AWAY = b"away:"


def _text(value: Any) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def _headers(raw: bytes) -> dict[str, Any]:
    try:
        found = json.loads(raw)["headers"]
    except (ValueError, KeyError, TypeError):
        return {}
    return found if isinstance(found, dict) else {}


def _ms(time: tuple[int, int]) -> int:
    seconds, micros = time
    return seconds * 1000 + micros // 1000


def _number(value: Any) -> int:
    return int(float(value or 0))


def pace_of(samples: Sequence[str], now: int) -> tuple[float, float]:
    """Leases and settled tasks a second over the last minute; 0.0 if nothing is noted in it.

    Arguments:
        now: Redis' time in ms.
    """
    found = [[int(float(part)) for part in sample.split(" ")] for sample in samples]
    recent = [one for one in found if now - one[0] <= PACE_SECONDS * 1000]
    if len(recent) < 2:
        return 0.0, 0.0
    (since, _, leases0, settled0), (_, _, leases1, settled1) = recent[0], recent[-1]
    seconds = max(1, now - since) / 1000
    return max(0, leases1 - leases0) / seconds, max(0, settled1 - settled0) / seconds


class Ledger(TagReads):
    """Reads the ledger of one namespace, or of one shard of it."""

    def __init__(self, client: Redis, keys: Keys, delivery: Delivery) -> None:
        super().__init__(client, keys)
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

    def stats(self, queue: AffinityQueue, elsewhere: int | None = 0) -> QueueStats:
        """Counts of one affinity queue, at one moment.

        Arguments:
            elsewhere: What waits on a broker that is not the ledger's Redis; None: not known.
        """
        key = self._keys.queue
        state = queue.state

        def ask(pipe: Any) -> None:
            for pending in self._delivery.pending_lists(queue):
                pipe.llen(pending)
            pipe.hlen(key(state, "m"))
            pipe.zcard(key(state, "eta"))
            pipe.zcard(key(state, "ring"))
            pipe.hlen(key(state, "held"))
            pipe.hlen(key(state, "halted"))
            pipe.zcard(key(state, "idle"))
            pipe.hlen(key(state, "dead"))
            pipe.hmget(key(state, "conf"), "evac", "paused")
            pipe.hgetall(key(state, "c"))
            pipe.lrange(key(state, "pace"), -PACE_SAMPLES, -1)
            pipe.time()

        *lengths, entries, eta, ring, held, halted, idle, dead, flags, totals, pace, now = (
            self._together(ask)
        )
        total = {_text(name): _number(value) for name, value in totals.items()}
        leases, settled = pace_of([_text(sample) for sample in pace], _ms(now))
        return QueueStats(
            queue=queue.name,
            pending=None if elsewhere is None else elsewhere + sum(lengths),
            entries=entries,
            scheduled=eta,
            ready_tags=ring,
            held_tags=held,
            halted_tags=halted,
            idle_slots=idle,
            dead=dead,
            evacuated=flags[0] is not None,
            paused=flags[1] is not None,
            settled_per_second=settled,
            leases_per_second=leases,
            **{name: total.get(name, 0) for name in TOTALS},
        )

    def entries(self, queue: AffinityQueue) -> list[int]:
        """The entries that are in the ledger, in no particular order."""
        key = self._keys.queue(queue.state, "m")
        # HSCAN would send their messages too; this is for an operator, not for a hot path.
        return [int(entry) for entry in self._client.hkeys(key)]

    def workers(self, queues: Sequence[AffinityQueue]) -> list[WorkerRecord]:
        """The registered workers, by name."""
        names = {queue.state: queue.name for queue in queues}

        def ask(pipe: Any) -> None:
            pipe.zrange(self._keys.workers, 0, -1, withscores=True)
            pipe.time()

        found, now = self._answers(ask, transaction=False)
        records = [
            record
            for incarnation, due in found
            if (record := self._worker(_text(incarnation), (due - _ms(now)) / 1000, names))
        ]
        return sorted(records, key=lambda record: record.name)

    def _worker(self, incarnation: str, left: float, names: dict[str, str]) -> WorkerRecord | None:
        def ask(pipe: Any) -> None:
            pipe.hgetall(self._keys.worker(incarnation, "info"))
            pipe.smembers(self._keys.worker(incarnation, "leased"))
            pipe.hgetall(self._keys.worker(incarnation, "busy"))

        raw, leased, busy = self._together(ask)
        info = {_text(k): _text(v) for k, v in raw.items()}
        if not info:
            return None
        # What works for another shard is told by that one's ledger.
        working = {_text(i) for token, i in busy.items() if not token.startswith(AWAY)}
        leases = {_text(i) for i in leased}
        slots = tuple(
            self._slot(incarnation, i, names)
            if str(i) in leases
            else SlotRecord(i, "running" if str(i) in working else "idle")
            for i in range(int(info.get("slots") or info["cap"]))
        )
        states = [line.split("\t")[0] for line in info["queues"].split("\n") if line]
        return WorkerRecord(
            node_of(incarnation, self._keys.shard),
            info["name"],
            "running" if any(slot.status == "running" for slot in slots) else "idle",
            info["state"] != "active",
            tuple(names.get(s) or self._undeclared(s) for s in states),
            slots,
            left,
        )

    def _undeclared(self, state: str) -> str:
        """The name, as far as it is known, of a queue that another app declares."""
        return state.removesuffix(f"#{self._keys.shard}") if self._keys.shard else state

    def _slot(self, incarnation: str, index: int, names: dict[str, str]) -> SlotRecord:
        q, tag, epoch, n, e1, k1 = self._client.hmget(
            self._keys.slot(incarnation, index), ["q", "tag", "epoch", "n", "e1", "k1"]
        )
        if q is None:
            return SlotRecord(index, "idle")
        return SlotRecord(
            index,
            "running",
            names.get(_text(q)) or self._undeclared(_text(q)),
            _text(tag),
            _number(n),
            int(epoch),
            int(e1) if k1 is not None and e1 is not None else None,
        )

    def message_headers(
        self, queue: AffinityQueue, entries: Sequence[int]
    ) -> dict[int, dict[str, Any]]:
        """The headers of entries that are in the ledger or buried."""
        found = {}
        for name in ("m", "deadm"):
            left = [entry for entry in entries if entry not in found]
            key = self._keys.queue(queue.state, name)
            for raw, entry in zip(self._client.hmget(key, left) if left else [], left, strict=True):
                if raw:
                    found[entry] = _headers(raw)
        return found

    def changes(self, limit: int) -> list[ChangeRecord]:
        """What operators asked for, the latest first."""
        found = self._client.lrange(self._keys.prefix + "changes", 0, limit - 1)
        return [
            ChangeRecord(
                one["at"] / 1000,
                one["who"],
                one["what"],
                one["queue"],
                one["target"],
                one["detail"],
            )
            for one in map(json.loads, found)
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
