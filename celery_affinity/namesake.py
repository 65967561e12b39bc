"""Tells a new node that another living one has its name.

Both work: the ledger tells incarnations apart. Logs, ``inspect`` and ``control -d`` do not.
"""

from __future__ import annotations

import logging
from typing import Any

from celery_affinity.scripts import Scripts

__all__ = ("Namesake",)

logger = logging.getLogger(__name__)

#: State of a worker that does not drain; one that does was told to stop, perhaps for this node.
ACTIVE = b"active"


class Namesake:
    """Says it once, and only at the later of the two.

    A record alone proves nothing: a predecessor that was killed is still registered. So those
    found before the registration are suspects until one of them beats again. (When its heartbeat
    is overdue does not tell: a new leader counts that anew for all.)
    """

    def __init__(self, name: str, incarnation: str) -> None:
        self._name = name
        self._incarnation = incarnation
        #: Incarnation -> its last beat.
        self._suspects: dict[str, bytes | None] = {}

    def before_registration(self, scripts: Scripts) -> None:
        """Look for workers of this name.

        It may be there itself already: a registration whose answer was lost is made again.
        """
        client: Any = scripts.client
        workers = [inc.decode() for inc in client.zrange(scripts.keys.workers, 0, -1)]
        others = [incarnation for incarnation in workers if incarnation != self._incarnation]
        self._suspects = self._active(scripts, others)

    def look(self, scripts: Scripts) -> None:
        """Whether a suspect has beaten since. Costs nothing once they have gone."""
        if not self._suspects:
            return
        now = self._active(scripts, list(self._suspects))
        alive = [one for one, beat in now.items() if beat != self._suspects[one]]
        self._suspects = {} if alive else now
        if alive:
            self._tell(alive[0])

    def _active(self, scripts: Scripts, workers: list[str]) -> dict[str, bytes | None]:
        """Those of this name that do not drain, with their last beats."""
        client: Any = scripts.client
        with client.pipeline(transaction=False) as pipe:
            for incarnation in workers:
                pipe.hmget(scripts.keys.worker(incarnation, "info"), "name", "state", "beat")
            records = pipe.execute()
        wanted = [self._name.encode(), ACTIVE]
        return {
            incarnation: record[2]
            for incarnation, record in zip(workers, records, strict=True)
            if record[:2] == wanted
        }

    def _tell(self, incarnation: str) -> None:
        logger.warning(
            "Another running worker is named %r too (incarnation %s; this one is %s). Both get "
            "tasks, but logs, `celery inspect` and `celery control -d` cannot tell them apart: "
            "give each a name of its own, such as -n w1@%%h.",
            self._name,
            incarnation,
            self._incarnation,
            extra={"action": "duplicate_name", "incarnation": incarnation},
        )
