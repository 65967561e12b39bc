"""What a worker's parent has to tell the ledger, also if Redis does not answer just then."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from redis.exceptions import RedisError

from celery_affinity.connection import Reachability
from celery_affinity.scripts import Scripts

__all__ = ("Unanswered",)


class Unanswered:
    """It is told at once, and else by the heartbeat's thread as soon as Redis is back: the parent's
    event loop must not wait.

    Arguments:
        wake: Wakes the heartbeat's thread, which then calls `again`.
    """

    def __init__(
        self, scripts: Scripts, reachability: Reachability, wake: Callable[[], None]
    ) -> None:
        self._scripts = scripts
        self._reachability = reachability
        self._wake = wake
        self._waiting: deque[Callable[[Scripts], object]] = deque()

    def tell(self, say: Callable[[Scripts], object]) -> None:
        """Never raises what Redis does."""
        try:
            say(self._scripts)
        except RedisError as error:
            self._reachability.unanswered(error)
            self.tell_soon(say)

    def tell_soon(self, say: Callable[[Scripts], object]) -> None:
        """By the heartbeat's thread. Safe in any thread, also in the middle of a call."""
        self._waiting.append(say)
        self._wake()

    def again(self, scripts: Scripts) -> None:
        """Tell what could not be told, in order.

        Raises:
            RedisError: If Redis does not answer (yet).
        """
        while True:
            try:
                say = self._waiting.popleft()
            except IndexError:  # none, or another thread (at a stop) has told it
                return
            try:
                say(scripts)
            except RedisError:
                self._waiting.appendleft(say)
                raise
