"""Looks at pending queues on a broker that is not the ledger's Redis, for whoever asks.

Each process keeps one connection, however often and by how many threads it is asked. A broker that
does not answer costs a few seconds, then nothing for a while: who asks meanwhile is told the same.
"""

from __future__ import annotations

import atexit
import os
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from celery_affinity.broker import OutOfSight, Sight

__all__ = ("Lookout",)

T = TypeVar("T")

#: Seconds for which a broker that did not answer is not asked again.
QUIET_SECONDS = 5.0


class Lookout:
    """Any thread may look; one does at a time.

    Arguments:
        connect: Opens the broker's side, when it is first needed.
    """

    def __init__(self, connect: Callable[[], Sight]) -> None:
        self._connect = connect
        self._begin()

    def _begin(self) -> None:
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._sight: Sight | None = None
        self._quiet_until, self._reason = 0.0, ""

    def waiting(self, pending: str) -> int:
        """Messages that wait in a pending queue; what was handed to a scheduler is not among them.

        Raises:
            OutOfSight: If the broker does not answer.
        """
        return self._look(lambda sight: sight.waiting(pending))

    def find(self, pending: str, task_id: str) -> int | None:
        """The place of a task's message in its list of a pending queue, from 1; None: not there.

        Raises:
            OutOfSight: If the broker does not answer, or shows nobody what waits.
        """
        return self._look(lambda sight: sight.find(pending, task_id))

    def close(self) -> None:
        """Hang up; the next look connects again. Does not raise."""
        sight, self._sight = self._sight, None
        if sight is not None and self._pid == os.getpid():
            sight.close()

    def _look(self, ask: Callable[[Sight], T]) -> T:
        if self._pid != os.getpid():
            self._begin()  # a forked child: neither connection nor lock is its own
        with self._lock:
            if time.monotonic() < self._quiet_until:
                raise OutOfSight(self._reason)
            is_kept = self._sight is not None
            try:
                return self._asked(ask)
            except OutOfSight:
                raise
            except Exception as error:
                if not is_kept:
                    raise self._unanswered(error) from error
            try:
                return self._asked(ask)  # the kept connection was an old one
            except OutOfSight:
                raise
            except Exception as error:
                raise self._unanswered(error) from error

    def _asked(self, ask: Callable[[Sight], T]) -> T:
        if self._sight is None:
            self._sight = self._connect()
            atexit.unregister(self.close)
            atexit.register(self.close)
        try:
            return ask(self._sight)
        except OutOfSight:
            raise
        except BaseException:
            self.close()
            raise

    def _unanswered(self, error: Exception) -> OutOfSight:
        self._quiet_until = time.monotonic() + QUIET_SECONDS
        self._reason = f"the broker gives no answer ({error})"
        return OutOfSight(self._reason)
