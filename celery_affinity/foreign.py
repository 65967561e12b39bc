"""Finds workers that consume a pending queue past the ledger: those without the library.

Whoever schedules asks all workers, by Celery's remote control, what they consume. A worker that
has turned remote control off, or is too busy to answer (solo), is not seen.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Collection, Mapping
from typing import Any

__all__ = ("ForeignConsumers", "consumed_queues")

logger = logging.getLogger(__name__)

#: Seconds between two questions: one found 30 s after its start at the latest.
INTERVAL_SECONDS = 15.0
#: How long workers have for the answer.
ANSWER_SECONDS = 2.0

#: Node -> its queues, as ``inspect active_queues`` gives them.
Answers = Mapping[str, Collection[Mapping[str, Any]]]


def consumed_queues(app: Any, seconds: float) -> Answers | None:
    """Ask all workers of an app what they consume.

    Over a connection of its own: a pooled one stays open with a read under way, and every pool
    process that the worker forks from then on waits for that read while it closes the pool
    (test_every_killed_child_is_noticed_at_once).
    """
    with app.connection_for_read() as connection:
        answers: Answers | None = app.control.inspect(
            timeout=seconds, connection=connection
        ).active_queues()
    return answers


class ForeignConsumers:
    """Names each such worker once, and again only after it had gone.

    Arguments:
        ask: Asks all workers; None or empty if nobody answers.
        pending: Names of the pending queues.
        leading: Whether this process schedules now; only then it asks.
    """

    def __init__(
        self,
        ask: Callable[[float], Answers | None],
        pending: Collection[str],
        leading: Callable[[], bool],
    ) -> None:
        self._ask = ask
        self._pending = set(pending)
        self._leading = leading
        self._stopping = threading.Event()
        self._known: set[tuple[str, str]] = set()

    def start(self) -> None:
        """Ask from time to time, in a thread, until `stop`."""
        threading.Thread(target=self._run, name="affinity-foreign", daemon=True).start()

    def stop(self) -> None:
        """Ask no more. Safe in a signal handler."""
        self._stopping.set()

    def look(self) -> None:
        """Ask once and name whoever is new."""
        answers = self._ask(ANSWER_SECONDS) or {}
        found = {
            (node, str(queue.get("name")))
            for node, queues in answers.items()
            for queue in queues
            if queue.get("name") in self._pending
        }
        for node, queue in sorted(found - self._known):
            logger.warning(
                "Worker %r consumes the affinity queue %r past the ledger: tasks that it runs "
                "break order and exclusion. Stop it, or give its app Affinity(app, ...) and "
                "start it anew.",
                node,
                queue,
                extra={"action": "foreign_consumer", "worker": node, "queue": queue},
            )
        self._known = found

    def _run(self) -> None:
        pause = 1.0  # soon after the start, then rarely
        while not self._stopping.wait(pause):
            if not self._leading():
                continue
            try:
                self.look()
            except Exception as error:
                # Redis away is told by the scheduler; here the next question will do.
                logger.debug(
                    "Could not ask for foreign consumers: %s",
                    error,
                    extra={"action": "foreign_unknown"},
                )
            pause = INTERVAL_SECONDS
