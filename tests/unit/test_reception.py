"""What a worker's parent does with a message that another copy of it has decided about."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from celery_affinity.held import Held
from celery_affinity.message import STAMP_HEADER, Stamp
from celery_affinity.reception import Strategy
from celery_affinity.reporter import Reporter
from celery_affinity.watchdog import Lifeline

STAMP = Stamp("1", "7", "2", "incarnation", 0, 1, 1, "jobs")
MESSAGE = SimpleNamespace(headers={STAMP_HEADER: "1 7 2 incarnation 0 1 1 jobs"})


class Ledger:
    """Answers each discard in the same way."""

    def __init__(self, answer: int) -> None:
        self.answer = answer

    def discard(self, *_: Any) -> int:
        return self.answer


def reporter_of(answer: int) -> Reporter:
    return Reporter(lambda: Ledger(answer), "incarnation", dict, 1.0, Lifeline())  # type: ignore[arg-type, return-value]


class Received(Strategy):
    """Celery's part is left out; each message that is looked at is a request of the wrong kind."""

    def __init__(self, reporter: Reporter) -> None:
        self.ends = reporter
        self.looked_at = 0

    def _request(self, message: Any) -> Any:
        self.looked_at += 1
        raise MemoryError

    def receive(self) -> None:
        self(MESSAGE, None, None, None, [])


@pytest.mark.parametrize("answer", [1, 2])
def test_no_copy_of_an_entry_that_ended_unstarted_gets_to_its_process(answer: int) -> None:
    """The process may have been granted its start, and would not ask."""
    reporter = reporter_of(answer)
    reporter.discard(STAMP, "settle", "revoked")
    received = Received(reporter)
    received.receive()
    assert received.looked_at == 0
    assert not reporter.held.was_discarded(Stamp("1", "8", "1", "incarnation", 0, 1, 1, "jobs"))


def test_a_message_of_no_use_whose_other_copy_may_run_is_asked_for_once_more() -> None:
    """Its gate decides: thrown away here, with a granted start, it would hold its tag for ever."""
    received = Received(reporter_of(0))
    received.receive()
    assert received.ends.held.names() == [f"{STAMP.held}:?"]


def test_what_the_ledger_has_buried_is_held_no_more() -> None:
    received = Received(reporter_of(1))
    received.receive()
    assert received.ends.held.names() == []


def test_entries_that_ended_unstarted_are_remembered_up_to_a_bound() -> None:
    held = Held()
    for entry in range(2 * held.REFUSED):
        held.discarded(Stamp(str(entry), "7", "1", "incarnation", 0, 1, 1, "jobs"))
    assert len(held._discarded) == held.REFUSED
