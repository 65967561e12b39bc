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
    held = SimpleNamespace(ended=lambda stamp: None, other_request=lambda *_: None)
    ends = SimpleNamespace(held=held, process_lost=lambda stamp: asked.append(stamp) or "requeued")
    kind = type("Request", (DispatchedRequest, Stock), {"affinity_ends": ends})
    one: Any = kind.__new__(kind)
    one.affinity_stamp = "stamp"
    if meant:
        setattr(one, meant, True)

    one.on_failure(SimpleNamespace(exception=Terminated(15)))

    assert asked == ([] if meant else ["stamp"]), "the ledger gives it back to its tag"
    assert getattr(one, "failures", []) == (["stock"] if meant else [])
