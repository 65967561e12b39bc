"""Tells a node of role "worker" that nobody schedules its queues, and what to start."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

from celery_affinity.scripts import Scripts

__all__ = ("Vacancy",)

logger = logging.getLogger(__name__)


class Vacancy:
    """Says once that a queue has had no leader for long, and once that it has one again.

    Batches that are under way go on without a leader; what is new waits.

    Does not: campaign. A node that does need not be told.

    Arguments:
        queues: Names of the affinity queues by their states.
        patience_seconds: How long a queue may be without a leader: a change of leaders takes up
            to ``leader_ttl``.
    """

    def __init__(
        self,
        queues: Mapping[str, str],
        patience_seconds: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._queues = queues
        self._patience = patience_seconds
        self._clock = clock
        self._since: dict[str, float] = {}
        self._told: set[str] = set()

    def look(self, scripts: Scripts) -> None:
        """Ask the ledger, in one round trip."""
        keys = [scripts.keys.queue(state, "leader") for state in self._queues]
        leaders: Any = scripts.client.mget(keys)
        for name, leader in zip(self._queues.values(), leaders, strict=True):
            if leader is None:
                self._vacant(name)
            else:
                self._taken(name, leader)

    def _vacant(self, name: str) -> None:
        since = self._since.setdefault(name, self._clock())
        if self._clock() - since >= self._patience and name not in self._told:
            self._told.add(name)
            logger.warning(
                "Nobody schedules the affinity queue %r, so its new tasks wait, and this worker "
                "has role 'worker'. Start `celery -A <app> beat -S affinity`, or a worker with "
                "`--affinity-role both`.",
                name,
                extra={"action": "no_leader", "queue": name},
            )

    def _taken(self, name: str, leader: bytes) -> None:
        self._since.pop(name, None)
        if name in self._told:
            self._told.discard(name)
            logger.warning(
                "The affinity queue %r is scheduled again, by %s.",
                name,
                leader.decode().split(" ")[0],
                extra={"action": "leader_again", "queue": name},
            )
