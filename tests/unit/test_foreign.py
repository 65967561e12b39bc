"""Laws of the look for workers that consume a pending queue past the ledger."""

from __future__ import annotations

from typing import Any

import pytest

from celery_affinity.foreign import ForeignConsumers


def consumers(**queues: str) -> dict[str, list[dict[str, Any]]]:
    """An answer to ``inspect active_queues``: node -> one queue."""
    return {node: [{"name": name, "routing_key": name}] for node, name in queues.items()}


def test_a_foreign_consumer_is_named_once_and_again_after_it_had_gone(
    caplog: pytest.LogCaptureFixture,
) -> None:
    answers: list[Any] = [
        consumers(old="jobs", ours="jobs.worker.ours", other="ordinary"),
        consumers(old="jobs"),
        None,  # nobody answered: it has gone
        consumers(old="jobs", second="jobs"),
    ]
    watch = ForeignConsumers(lambda seconds: answers.pop(0), {"jobs"}, lambda: True)

    named = []
    while answers:
        caplog.clear()
        watch.look()
        named.append([record.__dict__["worker"] for record in caplog.records])

    assert named == [["old"], [], [], ["old", "second"]]
