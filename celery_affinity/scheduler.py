"""The scheduling of one affinity queue: campaign, and while elected admit, promote, rescue, tell.

Free slots and ready tags are brought together inside the scripts, in the step that makes a slot
free or a tag ready. So the scheduler only has to let work in (intake, due entries) and to take it
back from lost workers. It sleeps on arrivals (doorbell.py), not on a clock.

Crash windows: every step is one fenced script, so a leader may stop between any two of them;
the next leader's first pass does all of it again
(test_a_killed_leader_is_replaced_within_its_ttl, test_a_superseded_term_changes_nothing).
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from redis.exceptions import RedisError

from celery_affinity.burials import Burials
from celery_affinity.carrying import Carrier
from celery_affinity.connection import Reachability
from celery_affinity.doorbell import Doorbell
from celery_affinity.exceptions import ConfigurationError, ShardsError
from celery_affinity.intake import Intake
from celery_affinity.leadership import Elector
from celery_affinity.rescuer import Rescuer
from celery_affinity.scripts import Scripts
from celery_affinity.server_checks import check_failover, check_server
from celery_affinity.settings import AffinityQueue
from celery_affinity.witness import Witness

__all__ = ("Scheduler",)

logger = logging.getLogger(__name__)

#: Due entries that one script promotes at most.
PROMOTE_BATCH = 100
#: Seconds between two looks for lost workers at least, so that an idle leader stays cheap.
RESCUE_PAUSE_SECONDS = 0.5
#: Seconds to wait before talking to a Redis that did not answer.
RETRY_SECONDS = 0.5
#: Seconds after which a Redis that cannot be used is looked at again.
REFUSED_SECONDS = 5.0


class Scheduler:
    """Schedules one affinity queue whenever it is elected. `run` blocks until `stop`.

    Does not: own its thread, or talk to workers.
    """

    def __init__(
        self,
        scripts: Scripts,
        queue: AffinityQueue,
        elector: Elector,
        intake: Intake,
        rescuer: Rescuer,
        burials: Burials,
        doorbells: Callable[[list[str]], Doorbell],
        pending: list[str],
        carrier: Carrier | None = None,
        check_shards: Callable[[], None] = lambda: None,
    ) -> None:
        self._scripts = scripts
        self._queue = queue
        self._elector = elector
        self._intake = intake
        self._rescuer = rescuer
        self._burials = burials
        self._carrier = carrier
        self._check_shards = check_shards
        self._pending = pending[0]
        self._stopping = threading.Event()
        keys = scripts.keys
        self._arrivals = doorbells([*pending, keys.queue(queue.state, "wake")])
        self._vacancy = doorbells([keys.queue(queue.state, "vacant")])
        self._reachability = Reachability(logger, f"tasks of {queue.name!r}")
        self._refused = ""
        self._evacuated = False
        self._witness = Witness(queue.state, queue.name)

    @property
    def leading(self) -> bool:
        """Whether the term is held now."""
        return self._elector.leading

    def stop(self) -> None:
        """Ask `run` to resign and return."""
        self._stopping.set()
        self._arrivals.ring()
        self._vacancy.ring()

    def run(self) -> None:
        """Campaign and lead until `stop`."""
        checked = False
        while not self._stopping.is_set():
            try:
                if not checked:
                    check_server(self._scripts.client, logger)
                    check_failover(self._scripts.client, self._rescuer.timeout)
                    checked = True
                self._witness.look(self._scripts)
                wait = self._elector.claim()
                if self._elector.term is None:
                    self._rescuer.look()
                    self._reachability.answered()
                    self._vacancy.wait(min(wait, self._rescuer.pause))
                else:
                    try:
                        self._lead()
                    finally:
                        if self._carrier is not None:
                            self._carrier.end()
            except RedisError as error:
                self._elector.concede()
                self._rescuer.unanswered()
                self._reachability.unanswered(error)
                self._stopping.wait(RETRY_SECONDS)
            except ConfigurationError as error:
                self._refuse(error)
                self._stopping.wait(REFUSED_SECONDS)
            except Exception:
                self._elector.concede()
                logger.exception(
                    "Scheduling of %r failed; conceding the term.",
                    self._queue.name,
                    extra={"action": "concede", "queue": self._queue.name},
                )
                self._stopping.wait(RETRY_SECONDS)
        self._end()

    def _lead(self) -> None:
        logger.info(
            "Scheduling affinity queue %r, term %s.",
            self._queue.name,
            self._elector.term,
            extra={"action": "elected", "queue": self._queue.name, "term": self._elector.term},
        )
        queue, fence = self._queue, self._elector.fence
        self._check_shards()
        answer = self._scripts.configure(queue.state, fence, queue.limits, queue.own_concurrencies)
        if answer == -2:
            raise ShardsError(queue.name, self._scripts.shards(queue.state) or 1, queue.shards)
        if answer == -1:
            return self._elector.concede()
        if self._carrier is not None:
            self._carrier.begin(fence)
        elif self._bring_home(fence) == -1:
            return self._elector.concede()
        rescue_at = 0.0
        while self._elector.leading and not self._stopping.is_set():
            now = time.monotonic()
            if now >= rescue_at:
                left = self._rescuer.run(self._elector.fence)
                if left < 0 or self._ends_with_its_server() or self._ends_with_its_carrier():
                    break
                self._witness.look(self._scripts)
                rescue_at = now + min(max(left, RESCUE_PAUSE_SECONDS), self._rescuer.pause)
            sleep = self._pass()
            if sleep is None:
                break
            self._reachability.answered()
            if sleep > 0:
                until = min(rescue_at, self._elector.renew_at) - time.monotonic()
                # While the queue is evacuated, what arrives is not the leader's to take.
                wait = self._stopping.wait if self._evacuated else self._arrivals.wait
                wait(min(sleep, until, queue.scheduler_interval))
            if time.monotonic() >= self._elector.renew_at and not self._elector.renew():
                break
        if not self._stopping.is_set():
            logger.info(
                "No longer scheduling %r: the term is over (not an error).",
                queue.name,
                extra={"action": "conceded", "queue": queue.name},
            )
            self._elector.concede()

    def _bring_home(self, fence: str) -> int:
        queue, pending = self._queue.state, self._pending
        if pending == self._scripts.keys.inbox(queue):
            return 0  # the first shard's carrier fills it
        return self._scripts.bring_home(queue, fence, pending)

    def _ends_with_its_server(self) -> bool:
        """Whether another server answers now: this term is of the one before.

        A replica may not have got all of it, and another candidate may have had a later one.
        """
        replaced, self._rescuer.replaced = self._rescuer.replaced, False
        if replaced:
            self._elector.resign()
        return replaced

    def _ends_with_its_carrier(self) -> bool:
        """Whether a shard has heard of a later term: only a new one can be above it."""
        refused = self._carrier is not None and self._carrier.was_refused
        if refused:
            self._elector.resign()
            self._stopping.wait(RETRY_SECONDS)
        return refused

    def _pass(self) -> float | None:
        """Let work in. Returns seconds to the next due entry, 0 for at once, None if deposed."""
        fence = self._elector.fence
        admitted, more = self._intake.run(fence)
        if admitted == -1:
            return None
        self._note_evacuated(admitted == -2)
        promoted, due_ms, untold = self._scripts.promote(self._queue.state, fence, PROMOTE_BATCH)
        if promoted == -1:
            return None
        if untold:
            self._burials.start(fence)
        if more or promoted == PROMOTE_BATCH:
            return 0.0
        return self._queue.scheduler_interval if due_ms < 0 else due_ms / 1000

    def _note_evacuated(self, evacuated: bool) -> None:
        if evacuated and not self._evacuated:
            logger.warning(
                "Affinity queue %r is evacuated: nothing is taken in or dispatched before "
                "`celery affinity resume --queue %s`.",
                self._queue.name,
                self._queue.name,
                extra={"action": "evacuated", "queue": self._queue.name},
            )
        self._evacuated = evacuated

    def _refuse(self, error: ConfigurationError) -> None:
        self._elector.concede()
        if str(error) != self._refused:
            logger.error(
                "Not scheduling %r: %s",
                self._queue.name,
                error,
                extra={"action": "refused", "queue": self._queue.name},
            )
        self._refused = str(error)

    def _end(self) -> None:
        try:
            self._elector.resign()
        except RedisError:
            pass  # it cannot be told: the term ends by itself
        self._arrivals.close()
        self._vacancy.close()
