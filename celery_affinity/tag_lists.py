"""Lists of an affinity queue's tags, over all its shards, a page at a time.

Each shard has a ready ring of its own, and its slots go round it. So of those that wait the first
of each ring come first, then the second ones, and so on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from celery_affinity.ledger import Ledger
from celery_affinity.settings import AffinityQueue
from celery_affinity.types import TagRecord

__all__ = ("Part", "longest", "tags")

#: A shard's ledger and the queue's part in it.
Part = tuple[Ledger, AffinityQueue]
#: Place of its part in the list of parts, and the tag.
Found = tuple[int, bytes]


def tags(parts: Sequence[Part], limit: int, skip: int = 0) -> list[TagRecord]:
    """Tags that hold slots, then those that wait, in the order of their turn, then those that are
    halted; at most `limit`, from the one behind the first `skip` on.
    """
    held = [(at, tag) for at, (ledger, part) in enumerate(parts) for tag in ledger.held_tags(part)]
    sizes = [ledger.ready_count(part) for ledger, part in parts]
    found, known = held[skip : skip + limit], set(held)
    passed = max(0, skip - len(held))
    if len(found) < limit:
        ready = _ready(parts, sizes, passed, limit - len(found))
        found += [one for one in ready if one not in known]  # it may be in both
    if len(found) < limit:
        passed = max(0, passed - sum(sizes))
        found += _halted(parts, known, passed, limit)
    return _records(parts, found[:limit])


def longest(parts: Sequence[Part], limit: int) -> list[TagRecord]:
    """The tags with the most entries waiting: exact for those with 32 and more, if no more than
    1,000 of a shard are; the rest is filled up from the others.
    """
    marked = {
        (at, tag): waiting
        for at, (ledger, part) in enumerate(parts)
        for tag, waiting in ledger.long_backlogs(part).items()
    }
    order = sorted(marked, key=lambda one: -marked[one])[:limit]
    found = [record for record in _records(parts, order) if record.waiting]
    if len(found) < limit:
        known = {record.tag for record in found}
        found += [r for r in tags(parts, 2 * limit) if r.tag not in known and r.waiting]
    return sorted(found, key=lambda record: -record.waiting)[:limit]


def _ready(parts: Sequence[Part], sizes: Sequence[int], skip: int, limit: int) -> list[Found]:
    first, left = _row(sizes, skip)
    rings = [
        ledger.ready_tags(part, first, left + limit) if size > first else []
        for (ledger, part), size in zip(parts, sizes, strict=True)
    ]
    return list(_across(rings))[left : left + limit]


def _row(sizes: Sequence[int], skip: int) -> tuple[int, int]:
    """How many places of every ring are passed over, and how many tags of the next place."""
    if len(sizes) == 1:
        return skip, 0
    low, high = 0, max(sizes, default=0)
    passed: Callable[[int], int] = lambda row: sum(min(size, row) for size in sizes)  # noqa: E731
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if passed(middle) <= skip else (low, middle - 1)
    return low, skip - passed(low)


def _across(rings: Sequence[Sequence[bytes]]) -> Iterator[Found]:
    for place in range(max(map(len, rings), default=0)):
        for at, ring in enumerate(rings):
            if place < len(ring):
                yield at, ring[place]


def _halted(parts: Sequence[Part], known: set[Found], skip: int, limit: int) -> list[Found]:
    found: list[Found] = []
    for at, (ledger, part) in enumerate(parts):
        if len(found) >= skip + limit:
            break
        halted = ledger.halted_tags(part, skip + limit)
        found += [(at, tag) for tag in halted if (at, tag) not in known]
    return found[skip:]


def _records(parts: Sequence[Part], found: Sequence[Found]) -> list[TagRecord]:
    by_tag: dict[Found, TagRecord] = {}
    for at, (ledger, part) in enumerate(parts):
        if mine := [tag for where, tag in found if where == at]:
            records = ledger.tag_records(part, mine)
            by_tag.update(zip([(at, tag) for tag in mine], records, strict=True))
    return [by_tag[one] for one in found]
