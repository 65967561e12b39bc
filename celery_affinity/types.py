"""The records that celery_affinity returns and the values it passes on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = (
    "ChangeRecord",
    "DeadLetter",
    "EvacuationRecord",
    "Finding",
    "HoldRecord",
    "LeaderRecord",
    "PulseRecord",
    "QueueStats",
    "QueueStatus",
    "SlotRecord",
    "StatusRecord",
    "TagExplanation",
    "TagRecord",
    "TaskExplanation",
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
    #: Messages that producers have sent and the scheduler has not admitted; None: they wait on a
    #: broker elsewhere that does not answer. (What RabbitMQ has handed to a scheduler, 200 messages
    #: at most, is not among them before the scheduler has it in the ledger: milliseconds.)
    pending: int | None
    #: Admitted entries that have not settled: waiting, scheduled, dispatched or running.
    entries: int
    #: Entries with a due time in the future.
    scheduled: int
    #: Tags that wait for a slot.
    ready_tags: int
    #: Tags that hold at least one slot.
    held_tags: int
    #: Tags that wait for an operator: paused, or halted after a failure (on_failure).
    halted_tags: int
    #: Free slots of workers that serve this queue.
    idle_slots: int
    #: Dead letters.
    dead: int
    #: Whether it is stopped by `evacuate`.
    evacuated: bool
    #: Whether an operator has paused it.
    paused: bool
    #: Totals since the ledger began.
    admitted: int
    settled: int
    requeued: int
    buried: int
    leases: int
    #: Entries that an operator deleted.
    purged: int
    #: Tasks settled and leases opened a second, over the last minute.
    settled_per_second: float
    leases_per_second: float


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
    #: Why the tag waits for an operator: what failed (on_failure), as "block:<entry>" or
    #: "park:<entry>", or "pause"; empty for a tag that does not.
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


@dataclass(frozen=True)
class ChangeRecord:
    """What an operator asked for. It is written down before it is done."""

    #: When, in seconds since the epoch by Redis' clock.
    at: float
    #: Who: user and host, or what the caller gave.
    who: str
    #: The command, such as "pause".
    what: str
    #: The affinity queue, or "" if it is about a worker.
    queue: str
    #: The tag, worker or letters that it was about; "" for the whole queue.
    target: str
    #: What else was asked, such as "concurrency 3".
    detail: str


@dataclass(frozen=True)
class HoldRecord:
    """A slot that holds a tag."""

    worker: str
    slot: int
    epoch: int
    #: Tasks dispatched under this lease so far, and how many it may have while other tags wait.
    current_batch_size: int
    max_batch_size: int
    #: The task that runs, or that is on its way.
    entry: int | None
    task: str
    task_id: str
    #: Since its start; None while it is on its way.
    running_seconds: float | None
    #: Entries that share its call (of a batch task).
    mates: tuple[int, ...] = ()


@dataclass(frozen=True)
class TagExplanation:
    """Where a tag stands, and what it waits for."""

    queue: str
    tag: str
    holds: tuple[HoldRecord, ...]
    #: How many of its tasks may run at once.
    concurrency: int
    #: Entries in its backlog.
    waiting: int
    #: For how long the first of them has waited at least, to the second; None if none waits.
    oldest_seconds: float | None
    #: Place in the ready ring from 1, or None, and how many tags are in it.
    place: int | None
    ready_tags: int
    #: Estimate until it gets a slot, from the rate of leases; None without a place or a rate.
    wait_seconds: float | None
    #: Worker and slot that had it last, as "worker slot"; "" if that is not remembered.
    last_slot: str
    #: What keeps it from running, a sentence each, with what to do.
    obstacles: tuple[str, ...]
    #: Messages in the pending queue, whatever their tags: the ledger does not know them yet; None:
    #: they wait on a broker elsewhere that does not answer.
    pending: int | None

    @property
    def known(self) -> bool:
        """Whether the ledger has anything of this tag."""
        return bool(self.holds or self.waiting or self.obstacles or self.place)


TaskState = Literal[
    "running", "dispatched", "waiting", "scheduled", "buried", "pending", "unseen", "unknown"
]


@dataclass(frozen=True)
class TaskExplanation:
    """Where a task is."""

    queue: str
    task_id: str
    #: "pending": sent, and not yet admitted; "unseen": not admitted, and it may wait on the broker,
    #: where nobody can look for it; "unknown": it has ended, or was never sent.
    state: TaskState
    #: Its number in the ledger; of a pending one its place in the pending queue.
    entry: int | None = None
    #: Its name.
    task: str = ""
    #: Tasks of its tag that come before it, those that run not counted.
    ahead: int | None = None
    #: Of a scheduled one: until it is due.
    due_seconds: float | None = None
    #: Of a buried one: why. Of an unseen one: why it cannot be seen.
    reason: str = ""
    #: Its tag.
    tag: TagExplanation | None = None
    #: Of an unseen one: messages that wait on the broker, any of which it may be; None if that is
    #: not known either.
    unseen: int | None = None


@dataclass(frozen=True)
class QueueStatus:
    """One affinity queue for whoever looks at the whole."""

    stats: QueueStats
    leader: LeaderRecord | None
    #: Workers that serve it, and what of their slots holds one of its tags.
    workers: int
    busy_slots: int


@dataclass(frozen=True)
class StatusRecord:
    """All affinity queues of an app."""

    queues: tuple[QueueStatus, ...]
    #: What somebody should look at, a sentence each.
    warnings: tuple[str, ...]
    #: What operators asked for, the latest first.
    changes: tuple[ChangeRecord, ...]


@dataclass(frozen=True)
class Finding:
    """What `Affinity.doctor` found in one place."""

    about: str
    verdict: Literal["ok", "warning", "error"]
    found: str
    #: What to do; "" if nothing is to be done.
    fix: str = ""


@dataclass(frozen=True)
class PulseRecord:
    """A worker's own sign of life on its machine."""

    node: str
    pid: int
    #: Whether its process is there and its heartbeat's thread went round lately.
    alive: bool
    #: Since that thread went round last.
    age_seconds: float
