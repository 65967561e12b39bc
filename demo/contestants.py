"""The contestants: this library, and Celery as it is."""

from __future__ import annotations

from collections.abc import Mapping

from demo import affinity_app, plain_app
from demo.contestant import QUEUE
from demo.progress import SlotState
from demo.store import Link

__all__ = ("AffinityContestant", "PlainContestant")


class AffinityContestant:
    """Celery with celery_affinity, and the scheduling beat service."""

    title = "celery_affinity"
    module = "demo.affinity_app"
    app = affinity_app.app
    task = affinity_app.index_file
    beat = True

    def ready(self, workers: int) -> bool:
        """Whether the workers are registered and somebody schedules."""
        affinity = affinity_app.affinity
        return len(affinity.workers()) == workers and affinity.leader(QUEUE) is not None

    def slots(self, links: Mapping[str, Link]) -> tuple[SlotState, ...]:
        """What the ledger says of each slot."""
        return tuple(
            SlotState(
                worker.name.split("@")[0],
                str(slot.index),
                slot.current_identify_tag or "",
                str(slot.current_batch_size or ""),
                holds=True,
            )
            for worker in affinity_app.affinity.workers()
            for slot in worker.slots
        )

    def notes(self) -> tuple[str, ...]:
        """Who leads, and what the ledger counts."""
        stats = affinity_app.affinity.stats(QUEUE)
        leader = affinity_app.affinity.leader(QUEUE)
        return (
            f"leader {leader.leader}, term {leader.term}" if leader else "no leader",
            f"{stats.pending} pending, {stats.entries} admitted, {stats.ready_tags} tags ready, "
            f"{stats.leases} leases so far",
        )


class PlainContestant:
    """Celery without celery_affinity."""

    title = "plain Celery"
    module = "demo.plain_app"
    app = plain_app.app
    task = plain_app.index_file
    beat = False

    def ready(self, workers: int) -> bool:
        """Whether the workers answer."""
        return len(self.app.control.ping(timeout=0.5, limit=workers) or ()) == workers

    def slots(self, links: Mapping[str, Link]) -> tuple[SlotState, ...]:
        """The tag that each process worked on last, so far as no other process did after it."""
        latest: dict[str, tuple[float, str]] = {}
        for tag, link in links.items():
            latest[link.owner] = max(latest.get(link.owner, (0.0, "")), (link.finished_at, tag))
        found = ([*owner.split(":"), tag] for owner, (_, tag) in latest.items())
        return tuple(SlotState(worker, f"pid {pid}", tag, "") for worker, pid, tag in sorted(found))

    def notes(self) -> tuple[str, ...]:
        """Nobody knows more."""
        return ()
