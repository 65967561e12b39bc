"""Knows a queue's ledger again, and says so when it is emptied or an older copy of itself.

Redis that comes back without its AOF, or with an earlier one, and a FLUSHALL cannot be told from
a new ledger by looking at it. So every scheduler keeps in mind how far the counters were that only
grow, and the mark that the first election of a data set leaves in it (claim.lua).

What cannot be seen: what happened after the last look (a quarter of `heartbeat_timeout` at most),
and anything if all schedulers were restarted too.
"""

from __future__ import annotations

import logging
from typing import Any

from celery_affinity.scripts import Scripts

__all__ = ("Witness",)

logger = logging.getLogger(__name__)

#: Counters that only grow, and the words for what they count.
GROWING = {"seq": "admitted messages", "epoch": "leases", "settled": "settled tasks"}


class Witness:
    """One queue's witness in one process. Does not: change anything.

    Arguments:
        state: The queue's name in the ledger.
        name: Its name.
    """

    def __init__(self, state: str, name: str) -> None:
        self._state = state
        self._name = name
        self._born: bytes | None = None
        self._seen: dict[str, float] = {}

    def look(self, scripts: Scripts) -> None:
        """Compare the ledger with what is known of it, in one round trip."""
        key = scripts.keys.queue(self._state, "c")
        found: Any = scripts.client.hmget(key, ["born", *GROWING])
        born, now = (
            found[0],
            {counter: float(value or 0) for counter, value in zip(GROWING, found[1:], strict=True)},
        )
        back = [counter for counter, value in now.items() if value < self._seen.get(counter, 0)]
        if self._born is not None and born != self._born:
            self._tell_emptied()
        elif back:
            self._tell_older(back, now)
        self._born, self._seen = born, now

    def _tell_emptied(self) -> None:
        logger.critical(
            "The ledger of affinity queue %r was emptied: its Redis was flushed, or restarted "
            "without its data. %d messages had been admitted and %d tasks settled; the rest is "
            "lost, and so is what waited in the pending queue. What runs goes on, but a new task "
            "of its tag may run beside it; workers with on_ledger_lost='stop' end it, and nothing "
            "runs it again. Send the lost tasks again; set appendonly yes.",
            self._name,
            self._seen["seq"],
            self._seen["settled"],
            extra={"action": "ledger_emptied", "queue": self._name},
        )

    def _tell_older(self, back: list[str], now: dict[str, float]) -> None:
        found = ", ".join(
            f"{GROWING[counter]} {now[counter]:.0f}, before {self._seen[counter]:.0f}"
            for counter in back
        )
        logger.critical(
            "The ledger of affinity queue %r is an older copy of itself (%s). Tasks that have "
            "ended since that copy run again, those sent since are lost: send them again, and "
            "check the effects of what was done twice (celery_affinity.current().epoch is higher "
            "the second time).",
            self._name,
            found,
            extra={"action": "ledger_older", "queue": self._name},
        )
