"""A node that was given up registers anew without the slots that still run something; each of
those has to be free again once that has ended, whenever that is."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from redis.exceptions import ConnectionError as RedisConnectionError

from celery_affinity.held import Held
from celery_affinity.message import Stamp
from celery_affinity.reporter import Reporter
from celery_affinity.watchdog import Lifeline
from harness import wait_until

STAMP = Stamp("1", "7", "1", "incarnation", 1, 1, 1, "jobs")


class Ledger:
    """Gives the node up at its first beat; keeps what is told."""

    def __init__(self) -> None:
        self.busy: list[set[int]] = []
        self.vacated: list[str] = []
        self.vacate_errors = 0

    def heartbeat(self, *_: Any) -> tuple[bool, int, int, int]:
        return bool(self.busy), 0, 0, 0

    def register(self, *_: Any, busy: list[int], change: int, **__: Any) -> int:
        self.busy.append(set(busy))
        return change

    def serve(self, *_: Any, **__: Any) -> None:
        """It is not registered."""

    def vacate(self, _: str, token: str) -> None:
        if self.vacate_errors:
            self.vacate_errors -= 1
            raise RedisConnectionError("gone")
        self.vacated.append(token)


class EndsWhileLookedAt(Held):
    """Its one message ends just after the heartbeat's thread has looked what runs."""

    def running_slots(self) -> set[int]:
        found = super().running_slots()
        self.ended(STAMP, None)
        return found


def reporter_of(ledger: Ledger, held: Held) -> Reporter:
    reporter = Reporter(lambda: ledger, "incarnation", lambda: {"slots": 2, "queues": [], "junk": []}, 0.01, Lifeline())  # type: ignore[arg-type, return-value]
    held.on_end = reporter.held.on_end
    reporter.held = held
    held.arrived(STAMP, None)
    held.accepted(STAMP, None)
    return reporter


@pytest.mark.parametrize("when", ["while it registers", "later"])
@pytest.mark.parametrize("errors", [0, 1])
def test_a_slot_that_was_busy_when_its_node_registered_anew_is_vacated(when: str, errors: int) -> None:
    ledger = Ledger()
    ledger.vacate_errors = errors
    held = EndsWhileLookedAt() if when == "while it registers" else Held()
    reporter = reporter_of(ledger, held)
    threading.Thread(target=reporter.run, daemon=True).start()
    wait_until(lambda: ledger.busy, what="the registration")

    if when == "later":
        held.ended(STAMP, None)

    wait_until(lambda: ledger.vacated, 5, "its slot to be vacated")
    reporter._stopping = True
    assert ledger.busy == [{1}]
    assert ledger.vacated == ["slot:1"]
