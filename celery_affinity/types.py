"""The records that celery_affinity returns and the values it passes on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = (
    "DeadLetter",
    "EvacuationRecord",
    "LeaderRecord",
    "QueueStats",
    "SlotRecord",
    "TagRecord",
    "WorkerRecord",
)

Role = Literal["scheduler", "worker", "both"]
Status = Literal["idle", "running"]


@dataclass(frozen=True)
class SlotRecord:
    """One slot of a worker."""

    #: Place of the slot in its pool, from 0; on prefork the index of the process.
    index: int
    #: "running" while the slot holds a lease or runs an ordinary task.
    status: Status
    #: The affinity queue of the lease, or None.
    queue: str | None = None
    #: The tag that the slot holds, or None.
    current_identify_tag: str | None = None
    #: Tasks of the tag dispatched under this lease so far.
    current_batch_size: int = 0
    #: Number of the lease: the tag's fencing token.
    epoch: int | None = None
    #: Entry that runs, or None while it is on its way.
    running_entry: int | None = None


@dataclass(frozen=True)
class WorkerRecord:
    """One registered worker incarnation."""

    #: The incarnation: new at each start of a worker, never used again.
    worker_id: str
    #: The node name, such as "w1@host".
    name: str
    #: "running" if any slot is.
    status: Status
    #: True once the worker takes no more work.
    draining: bool
    #: The affinity queues it serves.
    queues: tuple[str, ...]
    slots: tuple[SlotRecord, ...]
    #: Seconds until its heartbeat is overdue.
    heartbeat_left_seconds: float


@dataclass(frozen=True)
class QueueStats:
    """Counts of one affinity queue, at one moment."""

    queue: str
    #: Messages that producers have sent and the scheduler has not admitted.
    pending: int
    #: Admitted entries that have not settled: waiting, scheduled, dispatched or running.
    entries: int
    #: Entries with a due time in the future.
    scheduled: int
    #: Tags that wait for a slot.
    ready_tags: int
    #: Tags that hold at least one slot.
    held_tags: int
    #: Tags that wait for an operator after a failure (on_failure).
    halted_tags: int
    #: Free slots of workers that serve this queue.
    idle_slots: int
    #: Dead letters.
    dead: int
    #: Whether it is stopped by `evacuate`.
    evacuated: bool
    #: Totals since the ledger began.
    admitted: int
    settled: int
    requeued: int
    buried: int
    leases: int


@dataclass(frozen=True)
class EvacuationRecord:
    """What an evacuation has done."""

    #: Messages written back, those with a due time among them.
    moved: int
    #: Slots that still hold a tag: with any, nothing was moved yet.
    running: int
    #: Entries that still wait in the ledger.
    waiting: int
    #: Whether all is in the pending queue.
    done: bool


@dataclass(frozen=True)
class TagRecord:
    """One tag that has waiting or dispatched work."""

    tag: str
    #: Entries in its backlog.
    waiting: int
    #: Slots that it holds, as "incarnation:slot".
    slots: tuple[str, ...]
    #: Place in the ready ring from 1, or None.
    place: int | None
    #: What failed so that the tag waits for an operator (on_failure), as "block:<entry>" or
    #: "park:<entry>"; empty for a tag that does not.
    halted: tuple[str, ...] = ()


@dataclass(frozen=True)
class LeaderRecord:
    """Who schedules an affinity queue."""

    queue: str
    #: The candidate: node name or beat host, pid and a random part.
    leader: str
    #: Number of its term; it only grows.
    term: int
    #: Seconds until the term ends unless renewed.
    left_seconds: float


@dataclass(frozen=True)
class DeadLetter:
    """One buried message."""

    entry: int
    #: Its tag, or "" if it had none.
    tag: str
    #: Why it was buried.
    reason: str
    #: Starts that came to no good end.
    attempts: int
    #: When it was buried, in seconds since the epoch by Redis' clock.
    buried_at: float
    #: The message as the producer sent it.
    message: bytes
    #: Traceback of the task's error, or "" if it was not an error of the task.
    traceback: str = ""
