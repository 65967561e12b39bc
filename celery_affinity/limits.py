"""What becomes of a dispatched task whose hard time limit is over.

Celery's parent stores FAILURE and kills the process. Here the ledger is asked before anything is
told: if it notes the end, the entry settles; if not, it runs again, and nobody hears of this end.

Crash windows:
- the limit struck before the gate had opened (Redis was away, or the heartbeat late), or the lease
  was taken away: the ledger says so, nothing is told, and the entry is sent again
  (test_a_hard_limit_that_strikes_before_the_start_is_not_told_and_the_task_runs,
  test_a_hard_limit_of_a_task_whose_lease_was_taken_away_is_not_told).
- Redis is away at the limit: the heartbeat's thread asks until it is answered, and a thread of the
  parent's waits for that to tell what Celery has to. If the slot's next process is quicker, the
  entry runs again and the answer is no
  (test_a_hard_limit_while_redis_is_away_is_told_once_the_ledger_has_answered,
  test_a_task_over_its_limit_that_was_given_back_meanwhile_is_not_told_as_failed).
- a lost reply: the ledger keeps its answer for an hour, also if the slot's next process has settled
  the entry meanwhile (test_a_hard_limit_whose_answer_was_lost_is_told_all_the_same).
- the parent is killed between answer and telling: nobody tells. Celery has the same window.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from typing import Any

__all__ = ("HardLimit",)

logger = logging.getLogger(__name__)

#: How often a thread looks whether the ledger has answered the heartbeat's.
POLL_SECONDS = 0.05


class HardLimit:
    """One request's.

    Arguments:
        request: The one whose limit is over (`DispatchedRequest`).
    """

    def __init__(self, request: Any) -> None:
        self._request = request
        #: What finish.lua has answered.
        self._answer: int | None = None
        self._asked = False
        self._to_tell: deque[Callable[[], object]] = deque()

    def tell(self, telling: Callable[[], object]) -> None:
        """Tell of it as soon as the ledger has noted it; never, if the task runs again."""
        request = self._request
        self._to_tell.append(telling)
        if self._asked:
            if self._answer is not None:
                self._go_on()
            return
        self._asked = True
        request._stops()
        request.affinity_ends.past_limit(request.affinity_stamp, self._answered)
        if self._answer is None:
            # With gevent a greenlet of this thread's hub, whose connections it may use.
            threading.Thread(target=self._wait, name="affinity-limit").start()
        else:
            self._go_on()

    def _answered(self, answer: int) -> None:
        """Only noted: the heartbeat's thread must not wait for Celery's result backend."""
        self._answer = answer
        if answer != 1:
            self._log(answer)

    def _wait(self) -> None:
        # The interpreter waits for this thread at its end: not for a ledger that stays away.
        while self._answer is None and threading.main_thread().is_alive():
            time.sleep(POLL_SECONDS)
        self._go_on()

    def _go_on(self) -> None:
        request = self._request
        try:
            while self._answer == 1:
                try:
                    telling = self._to_tell.popleft()
                except IndexError:
                    break
                telling()
        except Exception:
            # As where Celery's own request is told of it: it has failed, and nobody knows.
            logger.exception(
                "Could not tell that task %s[%s] is over its time limit.",
                request.name,
                request.id,
                extra={"action": "limit_untold", "task_id": request.id},
            )
        finally:
            # Behind the hooks that Celery calls here: its tag must not go on beside them.
            if request.affinity_in_process:
                request.affinity_ends.process_lost(request.affinity_stamp)
            request._vanish()

    def _log(self, answer: int) -> None:
        request = self._request
        if answer == 2:
            logger.warning(
                "A call of batch task %s was over its time limit; its tasks run again one by one.",
                request.name,
                extra={"action": "batch_timeout", "task_id": request.id},
            )
        else:
            logger.warning(
                "Task %s[%s] was over its time limit before it had started, or after its lease had "
                "ended; it has not failed by that.",
                request.name,
                request.id,
                extra={"action": "limit_without_start", "task_id": request.id},
            )
