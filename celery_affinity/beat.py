"""The scheduling beat service: ``celery -A app beat -S affinity``.

It campaigns for the affinity queues, in threads, so a slow publish does not hold up scheduling; and
among all beats of the app one sends its periodic tasks (periodic.py). Start as many as you like.
"""

from __future__ import annotations

from celery.beat import Scheduler

from celery_affinity.periodic import AffinityBeat

__all__ = ("AffinityBeat", "AffinityScheduler")


class _Entries(Scheduler):  # type: ignore[misc]
    """The entries of ``app.conf.beat_schedule`` and Celery's own, in memory."""

    def setup_schedule(self) -> None:
        """In the order of Celery's persistent scheduler: its base would drop Celery's own."""
        self.merge_inplace(self.app.conf.beat_schedule)
        self.install_default_entries(self.schedule)


class AffinityScheduler(AffinityBeat, _Entries):
    """Sends the entries of ``app.conf.beat_schedule``; their last runs are in Redis, not a file."""
