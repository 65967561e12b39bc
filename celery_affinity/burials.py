"""Tells whoever waits for the result of a buried task that there will be none.

The script that buries an entry notes it as untold; the leader stores its FAILURE, runs its
errbacks and counts it in its chord (as Celery's worker does for a task that failed), then strikes
the note off. A worker's parent that buries a task whose process is gone, or that no worker knows,
tells of it itself; its note becomes the leader's if it has not said within 30 s that it has.

Crash windows:
- between the telling and told.lua the next leader tells again: errbacks run at least once
  (test_a_burial_is_told_by_the_next_leader_if_the_first_died_over_it).
- a parent dies before it has told, or its result backend is away: the leader tells
  (test_a_burial_by_a_parent_that_dies_before_it_has_told_is_told_by_the_leader). If it dies before
  it has said that it has told, the leader tells again.
- Redis is away when it says so: the heartbeat's thread says it again
  (test_a_parent_that_cannot_say_that_it_has_told_says_so_when_redis_is_back).
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from redis.exceptions import RedisError

from celery_affinity.scripts import Scripts

__all__ = ("Burials", "Tell")

logger = logging.getLogger(__name__)

#: Told of a buried message, as far as it could be read, with the reason. May raise.
Tell = Callable[[Mapping[str, Any], str], None]


class Burials:
    """One affinity queue's burials.

    Does not: bury; the scripts do.
    """

    #: Burials told in one pass, so that a slow result backend does not hold up the leader.
    BATCH = 10
    #: Seconds to wait after a burial could not be told.
    PAUSE_SECONDS = 5.0

    def __init__(self, scripts: Scripts, state: str, tell: Tell) -> None:
        self._scripts = scripts
        self._state = state
        self._tell = tell
        self._not_before = 0.0
        self._thread: threading.Thread | None = None

    def start(self, fence: str) -> None:
        """One pass in a thread of its own, unless one is under way or it is too soon.

        A result backend that does not answer, or an errback that takes long (Celery calls one that
        takes more than the id, instead of sending it), must not cost the leader its term.
        """
        busy = self._thread is not None and self._thread.is_alive()
        if not busy and time.monotonic() >= self._not_before:
            self._thread = threading.Thread(
                target=self._try, args=(fence,), name="affinity-burials", daemon=True
            )
            self._thread.start()

    def _try(self, fence: str) -> None:
        try:
            self.run(fence)
        except RedisError as error:
            # The scheduler says so itself.
            logger.debug("Could not tell of burials: %s", error, extra={"action": "burials_untold"})

    def run(self, fence: str) -> None:
        """One pass over the untold."""
        told = []
        failed = None
        for entry, reason, raw in self._scripts.untold(self._state, self.BATCH):
            if not self._one(entry, reason, raw):
                # The others first, next time: it may be this one's errback, not the backend.
                failed = entry
                self._not_before = time.monotonic() + self.PAUSE_SECONDS
                break
            told.append(entry)
        if told or failed is not None:
            self._scripts.told(self._state, fence, told, failed)

    def _one(self, entry: int, reason: str, raw: bytes) -> bool:
        message = _readable(raw)
        headers = message.get("headers")
        headers = headers if isinstance(headers, dict) else {}
        extra = {"action": "bury", "queue": self._state, "entry": entry, "reason": reason}
        try:
            self._tell(message, reason)
        except Exception:
            logger.exception(
                "Could not store the failure of buried task %s[%s]; trying again in %g s.",
                headers.get("task"),
                headers.get("id"),
                self.PAUSE_SECONDS,
                extra=extra,
            )
            return False
        logger.warning(
            "Buried a message of queue %r, task %r, id %r: %s",
            self._state,
            headers.get("task"),
            headers.get("id"),
            reason,
            extra=extra,
        )
        return True


def _readable(raw: bytes) -> Mapping[str, Any]:
    try:
        found = json.loads(raw)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
