"""What a dispatched request makes of the end of its process."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from billiard.exceptions import Terminated
from celery.worker import state as worker_state

from celery_affinity.request import DispatchedRequest


class Stock:
    """Celery's request: takes a termination that it did not ask for for a revoke."""

    id, name = "id", "task"
    _already_cancelled = _already_revoked = False

    def on_failure(self, *_: Any) -> None:
        self.failures = [*getattr(self, "failures", []), "stock"]


@pytest.mark.parametrize("meant", ["", "_already_cancelled", "_already_revoked"])
def test_a_task_whose_process_was_killed_for_the_one_before_it_is_not_revoked(
    meant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_state, "task_ready", lambda request: None)
    asked: list[object] = []
    held = SimpleNamespace(ended=lambda stamp, request: None, other_request=lambda *_: None)
    ends = SimpleNamespace(held=held, process_lost=lambda stamp: asked.append(stamp) or "requeued")
    kind = type("Request", (DispatchedRequest, Stock), {"affinity_ends": ends})
    one: Any = kind.__new__(kind)
    one.affinity_stamp = "stamp"
    if meant:
        setattr(one, meant, True)

    one.on_failure(SimpleNamespace(exception=Terminated(15)))

    assert asked == ([] if meant else ["stamp"]), "the ledger gives it back to its tag"
    assert getattr(one, "failures", []) == (["stock"] if meant else [])


class Revocable(Stock):
    """Celery's request, of a task that is revoked before it has started."""

    time_start = None

    def revoked(self) -> bool:
        self._announce_revoked("revoked", False, None, False)
        return True

    def _announce_revoked(self, *_: Any) -> None:
        self.announced = True


@pytest.mark.parametrize("in_time", [True, False])
def test_a_task_that_may_have_started_when_its_revoke_is_seen_is_left_to_its_gate(in_time: bool) -> None:
    """A copy that a reconnect had left in the pipe may run. Ended by the parent alone it stayed in the
    ledger for ever, and its tag with it (simulation, seed 3003267)."""
    held = SimpleNamespace(ended=lambda stamp, request: None, other_request=lambda *_: None)
    ends = SimpleNamespace(held=held, discard=lambda stamp, verdict, reason: in_time)
    kind = type("Request", (DispatchedRequest, Revocable), {"affinity_ends": ends})
    one: Any = kind.__new__(kind)
    one.affinity_stamp = "stamp"
    one.announced = False

    assert one.revoked() is in_time
    assert one.announced is in_time, "nobody is told of a revoke that was too late"
