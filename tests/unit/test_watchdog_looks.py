"""When a watchdog ends its process."""

from __future__ import annotations

import pytest

from celery_affinity import watchdog
from celery_affinity.watchdog import Lifeline, Watchdog


class Clock:
    now = 1000.0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(watchdog, "seconds", lambda: clock.now)
    return clock


def ended(lifeline: Lifeline, began: float | None) -> bool:
    """Whether a watchdog of leases of 10 s ends a process whose task began then."""
    calls: list[None] = []
    began_at = [] if began is None else [("inc", began)]
    Watchdog({"inc": lifeline}, lambda: began_at, 10.0, lambda: calls.append(None)).look()
    return bool(calls)


def test_a_task_is_ended_before_its_lease_can_end(clock: Clock) -> None:
    lifeline = Lifeline()
    lifeline.answered(clock.now)
    clock.now += 8.4
    assert not ended(lifeline, 1000.0)
    clock.now += 0.2
    assert ended(lifeline, 1000.0)


def test_the_lease_counts_from_when_the_beat_was_sent(clock: Clock) -> None:
    lifeline = Lifeline()
    sent = clock.now
    clock.now += 9
    lifeline.answered(sent)
    assert ended(lifeline, 1000.0)


def test_a_start_is_a_sign_of_half_a_lease(clock: Clock) -> None:
    lifeline = Lifeline()
    clock.now += 60  # its beats were answered, but this process has not seen it yet
    began = clock.now
    clock.now += 3.4
    assert not ended(lifeline, began)
    clock.now += 0.2
    assert ended(lifeline, began)


def test_a_process_without_a_task_is_left_alone(clock: Clock) -> None:
    lifeline = Lifeline()
    clock.now += 100
    assert not ended(lifeline, None)


def test_what_ran_when_its_leases_were_taken_is_ended_and_what_began_later_is_not(
    clock: Clock,
) -> None:
    lifeline = Lifeline()
    lifeline.answered(clock.now)
    clock.now += 5
    lifeline.given_up()
    lifeline.answered(clock.now)
    assert ended(lifeline, 1004.0)
    assert not ended(lifeline, 1005.0)


def test_a_task_ends_when_its_own_shard_has_not_heard_of_its_node_for_long(clock: Clock) -> None:
    """What another shard has or has not heard says nothing about its lease."""
    lifelines = {"inc": Lifeline(), "inc-1": Lifeline()}
    clock.now += 100
    lifelines["inc"].answered(clock.now)
    lifelines["inc-1"].given_up()
    clock.now += 5
    lifelines["inc"].answered(clock.now)
    calls: list[str] = []
    runs = [("inc", 1050.0)]
    dog = Watchdog(lifelines, lambda: runs, 10.0, lambda: calls.append(runs[-1][0]))
    dog.look()
    assert calls == []
    runs.append(("inc-1", 1100.0))
    dog.look()
    assert calls == ["inc-1"]
