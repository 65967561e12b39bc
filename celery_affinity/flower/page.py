"""What the Affinity page shows and what its buttons do, as plain calls of `Affinity`: no web here.

Everything that is read is bounded, however many tags and letters there are.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from celery_affinity.types import (
    DeadLetter,
    QueueStatus,
    SlotRecord,
    StatusRecord,
    TagRecord,
    WorkerRecord,
)

if TYPE_CHECKING:
    from celery_affinity.app import Affinity

__all__ = ("Backlog", "Page", "Slot", "Worker", "gather", "operate")

#: How many are shown: tags and halted tags of a queue, its dead letters, workers.
MOST_TAGS, MOST_LETTERS, MOST_WORKERS = 20, 20, 100


@dataclass(frozen=True)
class Slot:
    """One slot of a worker."""

    record: SlotRecord
    #: Size of the batch that it may work off while other tags wait; 0 without a lease.
    max_batch_size: int

    @property
    def hue(self) -> int:
        """Colour of its tag, the same wherever the tag is, in degrees."""
        return zlib.crc32((self.record.current_identify_tag or "").encode()) % 360


@dataclass(frozen=True)
class Worker:
    """One worker with its slots."""

    record: WorkerRecord
    slots: tuple[Slot, ...]


@dataclass(frozen=True)
class Backlog:
    """A tag that has tasks waiting, or waits for an operator."""

    queue: str
    record: TagRecord
    #: The slots that it holds, as "w1@host slot 0".
    holders: tuple[str, ...]
    #: Its share of the longest backlog that is shown, in percent.
    share: int

    @property
    def paused(self) -> bool:
        """Whether an operator has paused it."""
        return "pause" in self.record.halted

    @property
    def stopped_by(self) -> tuple[str, ...]:
        """Entries after whose failure it is halted (on_failure)."""
        return tuple(h.partition(":")[2] for h in self.record.halted if h != "pause")


@dataclass(frozen=True)
class Page:
    """The whole page at one moment."""

    status: StatusRecord
    workers: tuple[Worker, ...]
    backlogs: tuple[Backlog, ...]
    dead: tuple[tuple[str, DeadLetter], ...]

    @property
    def waiting(self) -> int:
        """Tasks that have not settled, those in the pending queues with them."""
        return sum((q.stats.pending or 0) + q.stats.entries for q in self.status.queues)

    @property
    def shown_workers(self) -> tuple[Worker, ...]:
        """Those for which there is room."""
        return self.workers[:MOST_WORKERS]

    @property
    def ready_tags(self) -> int:
        """Tags that wait for a slot."""
        return sum(q.stats.ready_tags for q in self.status.queues)

    @property
    def dead_letters(self) -> int:
        """Dead letters of all queues."""
        return sum(q.stats.dead for q in self.status.queues)

    @property
    def slots(self) -> tuple[int, int]:
        """How many slots are busy, of how many."""
        slots = [slot for worker in self.workers for slot in worker.slots]
        return sum(slot.record.status == "running" for slot in slots), len(slots)


def gather(affinity: Affinity) -> Page:
    """Read the page. Blocks on Redis: not for an event loop's thread."""
    workers = affinity.workers()
    names = {worker.worker_id: worker.name for worker in workers}
    status = affinity.status()
    letters = [
        (queue.stats.queue, letter)
        for queue in status.queues
        if queue.stats.dead
        for letter in affinity.dead_letters(queue.stats.queue, MOST_LETTERS)
    ]
    return Page(
        status,
        tuple(_worker(affinity, worker) for worker in workers),
        tuple(b for queue in status.queues for b in _backlogs(affinity, queue, names)),
        tuple(letters),
    )


def _worker(affinity: Affinity, worker: WorkerRecord) -> Worker:
    sizes = {queue.name: queue.max_batch_size for queue in affinity.settings.queues}
    return Worker(
        worker, tuple(Slot(slot, sizes.get(slot.queue or "", 0)) for slot in worker.slots)
    )


def _backlogs(affinity: Affinity, queue: QueueStatus, names: Mapping[str, str]) -> list[Backlog]:
    """The longest backlogs, then what is halted besides."""
    stats = queue.stats
    found = affinity.top_tags(stats.queue, MOST_TAGS)
    if stats.halted_tags:
        known = {record.tag for record in found}
        before = stats.held_tags + stats.ready_tags
        halted = affinity.tags(stats.queue, MOST_TAGS, skip=before)
        found = [*found, *(record for record in halted if record.tag not in known)]
    longest = max((record.waiting for record in found), default=0)
    return [
        Backlog(
            stats.queue,
            record,
            tuple(_holder(slot, names) for slot in record.slots),
            100 * record.waiting // longest if longest else 0,
        )
        for record in found
        if record.waiting or record.halted
    ]


def _holder(slot: str, names: Mapping[str, str]) -> str:
    incarnation, _, index = slot.rpartition(":")
    return f"{names.get(incarnation, incarnation)} slot {index}"


def operate(affinity: Affinity, action: str, order: bytes, by: str) -> str:
    """Do what a button orders; what was done, in words.

    Arguments:
        action: "pause" or "resume".
        order: A JSON object: ``queue``, and ``tag`` unless it is about the whole queue. JSON keeps
            each character of a tag, which form fields do not.
        by: Who asks, for the record.

    Raises:
        ValueError: If the order is not understood.
        AffinityError: If it cannot be carried out; the text says why.
    """
    try:
        fields = json.loads(order)
    except ValueError as error:
        raise ValueError(f"found no JSON in the request: {error}") from None
    if not isinstance(fields, dict) or not isinstance(fields.get("queue"), str):
        raise ValueError("expected a JSON object with 'queue', and with 'tag' for one tag")
    queue, tag = fields["queue"], fields.get("tag")
    what = f"Queue {queue!r}" if tag is None else f"Tag {tag!r} of {queue!r}"
    if action == "pause":
        affinity.pause(queue, tag, by=by)
        return f"{what} is paused. What runs ends."
    if action == "resume":
        affinity.resume(queue, tag, by=by)
        return f"{what} goes on."
    raise ValueError(f"found action {action!r}, expected 'pause' or 'resume'")
