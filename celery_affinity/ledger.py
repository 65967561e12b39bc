"""Reads of the ledger: what the public methods of `Affinity` return.

Does not: change anything, or scan the key space. What these return is one moment's view, each
record read in one step, the list of them in several.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any

from redis import Redis
from redis.exceptions import OutOfMemoryError

from celery_affinity.delivery import Delivery, waiting_elsewhere
from celery_affinity.keys import Keys
from celery_affinity.settings import AffinityQueue
from celery_affinity.types import (
    ChangeRecord,
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
TOTALS = ("admitted", "settled", "requeued", "buried", "leases", "purged")
#: Of the leader's notes of the pace (lua/include/tend.lua) those that rates are told from.
PACE_SAMPLES = 60
PACE_SECONDS = 60.0
#: Long backlogs that the leader remembers at most (lua/include/admit_entry.lua).
LONGEST = 1000


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
        """Counts of one affinity queue; the ledger's are of one moment, a broker's elsewhere of
        the one before.
        """
        key = self._keys.queue
        state = queue.state
        elsewhere = waiting_elsewhere(self._delivery, queue)

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

    def tags(self, queue: AffinityQueue, limit: int, skip: int = 0) -> list[TagRecord]:
        """Tags that hold slots, then those that wait, in the ring's order, then those that are
        halted; at most `limit`, from the one behind the first `skip` on.
        """
        key = self._keys.queue
        held = [tag for tag, _ in self._client.hscan_iter(key(queue.state, "held"), count=PAGE)]
        ready = self._client.zcard(key(queue.state, "ring"))
        found = held[skip : skip + limit]
        at = max(0, skip - len(held))
        if len(found) < limit:
            ring = self._client.zrange(key(queue.state, "ring"), at, at + limit - len(found) - 1)
            found += [tag for tag in ring if tag not in held]  # it may be in both
        if len(found) < limit:
            at = max(0, at - ready)
            halted = self._first(key(queue.state, "halted"), at + limit)
            found += [tag for tag in halted if tag not in held][at:]
        return self._records(queue, found[:limit])

    def longest(self, queue: AffinityQueue, limit: int) -> list[TagRecord]:
        """The tags with the most entries waiting: exact for those with 32 and more, if no more
        than 1,000 are; the rest is filled up from the others.
        """
        key = self._keys.queue(queue.state, "big")
        marked = [_text(tag) for tag in self._client.zrevrange(key, 0, LONGEST - 1)]
        waiting = self._lengths(queue, marked)
        order = sorted(marked, key=lambda tag: -waiting[tag])[:limit]
        found = [r for r in self._records(queue, [tag.encode() for tag in order]) if r.waiting]
        if len(found) < limit:
            known = {record.tag for record in found}
            others = [r for r in self.tags(queue, 2 * limit) if r.tag not in known and r.waiting]
            found += others
        return sorted(found, key=lambda record: -record.waiting)[:limit]

    def _first(self, key: str, limit: int) -> list[bytes]:
        """Fields of a hash, `limit` of them or a few more."""
        found: list[bytes] = []
        for field, _ in self._client.hscan_iter(key, count=PAGE):
            found.append(field)
            if len(found) >= limit:
                break
        return found

    def _lengths(self, queue: AffinityQueue, tags: Sequence[str]) -> dict[str, int]:
        with self._client.pipeline(transaction=False) as pipe:
            for tag in tags:
                pipe.llen(self._keys.backlog(queue.state, tag))
            return dict(zip(tags, pipe.execute(), strict=True))

    def _records(self, queue: AffinityQueue, tags: Sequence[bytes]) -> list[TagRecord]:
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
                tuple(_text(held[at] or b"").split()),
                None if rest[2 * at + 1] is None else rest[2 * at + 1] + 1,
                tuple(_text(halted[at] or b"").split()),
            )
            for at, tag in enumerate(tags)
        ]

    def due_entries(self, queue: AffinityQueue, tag: str) -> list[int]:
        """Entries of a tag that are due later."""
        pattern = "*:" + re.sub(r"([*?\[\]\\])", r"\\\1", tag)
        found = self._client.zscan_iter(self._keys.queue(queue.state, "eta"), pattern, count=1000)
        pairs = [_text(member).split(":", 1) for member, _ in found]
        return sorted({int(entry) for entry, owner in pairs if owner == tag})

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
