"""Vacates slots whose process is gone in the middle of an ordinary task.

Its successor says that it is new (process_up), which vacates the slot; but only at its start and
before its first task, and none comes to a slot that counts as occupied. So where Redis was away
the parent does it
(test_a_slot_whose_process_died_in_an_ordinary_task_is_vacated_though_redis_was_away).
"""

from __future__ import annotations

from collections.abc import Callable

from celery_affinity import processes
from celery_affinity.scripts import Scripts

__all__ = ("Leftovers",)


class Leftovers:
    """Looks, after each beat, whether those that the ledger takes for occupied are alive."""

    def __init__(
        self, incarnation: str, is_gone: Callable[[str], bool] = processes.is_gone
    ) -> None:
        self._incarnation = incarnation
        self._is_gone = is_gone

    def look(self, scripts: Scripts) -> None:
        """One look. A repeat does no harm: the name of a stay is never used again."""
        for stay in scripts.stays(self._incarnation):
            # Of others (a slot at a registration, or that is lent) somebody else takes care.
            process, _, _ = stay.rpartition(":")
            identity, _, unique = process.rpartition(":")
            if unique and ":" in identity and self._is_gone(identity):
                scripts.vacate(self._incarnation, stay)
