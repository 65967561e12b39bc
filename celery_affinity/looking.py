"""What may be seen of the ledger, as methods of `Affinity`. All of it is read in bounded steps."""

from __future__ import annotations

from collections.abc import Sequence

from celery_affinity import doctor
from celery_affinity.bound import Bound
from celery_affinity.explaining import Explainer
from celery_affinity.message import tag_text
from celery_affinity.pulse import pulses
from celery_affinity.settings import AffinityQueue
from celery_affinity.sharding import shard_of
from celery_affinity.types import (
    ChangeRecord,
    Finding,
    LeaderRecord,
    PulseRecord,
    QueueStats,
    QueueStatus,
    StatusRecord,
    TagExplanation,
    TagRecord,
    TaskExplanation,
    WorkerRecord,
)

__all__ = ("Looking",)


class Looking(Bound):
    """Mixed into `Affinity`."""

    def stats(self, queue: str) -> QueueStats:
        """Counts of one affinity queue."""
        return self._ledger.stats(self._declared(queue))

    def workers(self) -> list[WorkerRecord]:
        """The registered workers with their slots, by node name."""
        return self._ledger.workers(self.settings.queues)

    def tags(self, queue: str, limit: int = 100, *, skip: int = 0) -> list[TagRecord]:
        """Tags that hold slots, then those that wait in the order of their turn, then halted ones.

        Each shard gives its slots to its own tags in turn: first of those that wait are the first
        ones of all shards, and a record's `place` is the one in its shard.

        Arguments:
            skip: How many of them to pass over: the pages before this one.
        """
        return self._ledger.tags(self._declared(queue), limit, skip)

    def top_tags(self, queue: str, limit: int = 10) -> list[TagRecord]:
        """The tags with the most tasks waiting, the longest backlog first.

        Every tag with 32 tasks or more is considered (up to 1,000 of them); shorter backlogs only
        if there are not enough of those.
        """
        return self._ledger.longest(self._declared(queue), limit)

    def leader(self, queue: str) -> LeaderRecord | None:
        """Who schedules the queue now; None if nobody does.

        Of a queue with several shards, whoever schedules the first one and takes in the messages
        for all of them.
        """
        return self._ledger.leader(self._declared(queue))

    def changes(self, limit: int = 20) -> list[ChangeRecord]:
        """What operators asked for, the latest first; 200 are kept."""
        return self._ledger.changes(limit)

    def explain(self, tag: str, queue: str | None = None) -> TagExplanation:
        """Where a tag stands and what it waits for.

        Arguments:
            queue: The affinity queue; None if there is only one.
        """
        declared, text = self._reachable(self.queue_named(queue).name), tag_text(tag)
        return self._explainer(declared.parts[shard_of(text, declared.shards)]).tag(text)

    def explain_task(self, task_id: str, queue: str | None = None) -> TaskExplanation:
        """Where a task is, and its tag with it.

        The ledger's messages are looked through for it, in pages.

        Arguments:
            queue: The affinity queue; None if there is only one.
        """
        declared = self._reachable(self.queue_named(queue).name)
        explainers = [self._explainer(part) for part in declared.parts]
        for explainer in explainers:
            if (found := explainer.task(task_id)) is not None:
                return found
        return explainers[0].task_elsewhere(task_id)

    def status(self) -> StatusRecord:
        """All affinity queues, what somebody should look at, and what operators changed."""
        workers = self.workers()
        queues = tuple(self._status(queue, workers) for queue in self.settings.queues)
        warnings = tuple(text for status in queues for text in _warnings(status))
        return StatusRecord(queues, warnings, tuple(self.changes(10)))

    def alive(self, node: str | None = None) -> list[PulseRecord]:
        """Signs of life that workers of this app leave on this machine. Asks no Redis.

        Arguments:
            node: Only that node's.
        """
        return pulses(self.settings.namespace, node)

    def doctor(self) -> list[Finding]:
        """Look for what is set up wrongly, each with its fix. Asks all workers: takes a second."""
        return doctor.examine(self)

    def _status(self, queue: AffinityQueue, workers: Sequence[WorkerRecord]) -> QueueStatus:
        serving = [w for w in workers if queue.name in w.queues and not w.draining]
        busy = sum(slot.queue == queue.name for w in workers for slot in w.slots)
        return QueueStatus(
            self._ledger.stats(queue), self._ledger.leader(queue), len(serving), busy
        )

    def _explainer(self, part: AffinityQueue) -> Explainer:
        ledger, scripts = self._shards.ledger(part.shard), self._shards.scripts(part.shard)
        return Explainer(ledger, scripts, self.delivery, part, lambda: self.changes(200))


def _warnings(status: QueueStatus) -> list[str]:
    """Sentences about one queue."""
    stats, name = status.stats, status.stats.queue
    waits = (stats.pending or 0) + stats.entries
    told = []
    if stats.pending is None:
        told.append(f"{name}: the broker does not answer; what waits there is not counted")
    if stats.evacuated:
        told.append(f"{name}: evacuated; `celery affinity resume --queue {name}` starts it again")
    if stats.paused:
        told.append(f"{name}: paused; `celery affinity resume --queue {name}` starts it again")
    if status.leader is None:
        told.append(
            f"{name}: nobody schedules it; start `beat -S affinity` or a worker with role both"
        )
    if not status.workers:
        told.append(f"{name}: no worker serves it, {waits} tasks wait; start one with -Q {name}")
    if stats.halted_tags:
        some = "1 tag is" if stats.halted_tags == 1 else f"{stats.halted_tags} tags are"
        told.append(f"{name}: {some} paused or halted; see `tags`")
    if stats.dead:
        letters = "letter" if stats.dead == 1 else "letters"
        told.append(f"{name}: {stats.dead} dead {letters}; see `dead list`")
    return told
