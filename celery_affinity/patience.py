"""How a process that runs tasks asks the ledger: until it answers, or once for what only tunes.

A soft time limit that strikes meanwhile is meant for the task, which does not run yet or any more.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

from celery.exceptions import SoftTimeLimitExceeded
from redis.exceptions import RedisError

from celery_affinity.connection import Reachability

__all__ = ("Patience",)

_Answer = TypeVar("_Answer")


class Patience:
    """One process' way to ask. Nothing that goes wrong here reaches user code."""

    def __init__(self, logger: logging.Logger) -> None:
        self._reachability = Reachability(logger, f"tasks of process {os.getpid()}")

    def patiently(self, call: Callable[[], _Answer]) -> _Answer:
        """The answer, asked for as long as Redis is away."""
        pause = 0.05
        while True:
            with suppress(SoftTimeLimitExceeded):
                try:
                    answer = call()
                except RedisError as error:
                    self._reachability.unanswered(error)
                    time.sleep(pause)
                    pause = min(pause * 2, 1.0)
                else:
                    self._reachability.answered()
                    return answer

    def briefly(self, call: Callable[[], object]) -> bool:
        """Ask once, for what only tunes. Whether it was answered."""
        with suppress(SoftTimeLimitExceeded):
            try:
                call()
            except RedisError as error:
                self._reachability.unanswered(error)
            else:
                self._reachability.answered()
                return True
        return False
