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
    found before the registration are suspects until one of them reports again.
    """

    def __init__(self, name: str, incarnation: str) -> None:
        self._name = name
        self._incarnation = incarnation
        #: Incarnation -> when its heartbeat was due as it was found.
        self._suspects: dict[bytes, float] = {}

    def before_registration(self, scripts: Scripts) -> None:
        """Look for workers of this name."""
        client: Any = scripts.client
        workers = client.zrange(scripts.keys.workers, 0, -1, withscores=True)
        with client.pipeline(transaction=False) as pipe:
            for incarnation, _ in workers:
                pipe.hmget(scripts.keys.worker(incarnation.decode(), "info"), "name", "state")
            records = pipe.execute()
        wanted = [self._name.encode(), ACTIVE]
        self._suspects = {
            incarnation: due
            for (incarnation, due), record in zip(workers, records, strict=True)
            if record == wanted
        }

    def look(self, scripts: Scripts) -> None:
        """Whether a suspect has reported since. Costs nothing once they have gone."""
        client: Any = scripts.client
        if self._suspects:
            names = list(self._suspects)
            for name, due in zip(names, client.zmscore(scripts.keys.workers, names), strict=True):
                if due is None:
                    del self._suspects[name]
                elif due > self._suspects[name]:
                    del self._suspects[name]
                    if client.hget(scripts.keys.worker(name.decode(), "info"), "state") == ACTIVE:
                        self._suspects.clear()
                        self._tell(name)
                        return

    def _tell(self, incarnation: bytes) -> None:
        logger.warning(
            "Another running worker is named %r too (incarnation %s; this one is %s). Both get "
            "tasks, but logs, `celery inspect` and `celery control -d` cannot tell them apart: "
            "give each a name of its own, such as -n w1@%%h.",
            self._name,
            incarnation.decode(),
            self._incarnation,
            extra={"action": "duplicate_name", "incarnation": incarnation.decode()},
        )
