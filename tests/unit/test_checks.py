"""What of Celery's settings makes no sense with affinity queues is named, and nothing else is."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from celery import Celery

from celery_affinity import Affinity, AffinityQueue
from celery_affinity.checks import warnings_of


def warned(pool: str = "prefork", worker: dict[str, Any] | None = None, **options: Any) -> list[str]:
    """Of a worker with one affinity task of these options."""
    app = Celery("checked", broker="memory://", set_as_current=False)
    affinity = Affinity(app, queues=[AffinityQueue("jobs")])

    @affinity.task(tag_from="tag", name="limited", shared=False, **options)
    def task(tag: str) -> None: ...

    @app.task(name="ordinary", shared=False, acks_late=True, acks_on_timeout=False, time_limit=1)
    def ordinary() -> None: ...

    app.finalize()
    defaults = {"time_limit": None, "soft_time_limit": None}
    return warnings_of(SimpleNamespace(app=app, pool_cls=pool, **{**defaults, **(worker or {})}))


@pytest.mark.parametrize(
    "pool, names", [("prefork", []), ("threads", ["time_limit", "soft_time_limit"]),
                    ("solo", ["time_limit", "soft_time_limit"])],
)
def test_limits_that_a_pool_does_not_keep_are_named(pool: str, names: list[str]) -> None:
    found = warned(pool, time_limit=9, soft_time_limit=8)
    assert [line.split(" of ")[0] for line in found] == names
    assert all("'limited'" in line and "ordinary" not in line for line in found)
    found = warned(pool, {"time_limit": 9, "soft_time_limit": 8})
    assert [line.split(" has no effect")[0] for line in found] == [f"{n} of all tasks" for n in names]


def test_gevent_keeps_the_hard_limit() -> None:
    (line,) = warned("gevent", time_limit=9, soft_time_limit=8)
    assert line.startswith("soft_time_limit of 'limited'")


def test_acks_that_the_ledger_does_not_know_are_named() -> None:
    assert warned(acks_late=True, reject_on_worker_lost=True) == []
    assert warned(acks_on_timeout=False) == []
    (line,) = warned(acks_late=True, acks_on_timeout=False)
    assert line.startswith("acks_on_timeout=False of 'limited'")
    (line,) = warned(retry_on_worker_lost=True)
    assert "max_deliveries" in line
