"""What of Celery's settings makes no sense with affinity queues is named, and nothing else is."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from celery import Celery

from celery_affinity import Affinity, AffinityQueue
from celery_affinity.checks import serves_none, warnings_of


def warned(pool: str = "prefork", worker: dict[str, Any] | None = None, **options: Any) -> list[str]:
    """Of a worker with one affinity task of these options."""
    app = Celery("checked", broker="memory://", set_as_current=False)
    affinity = Affinity(app, queues=[AffinityQueue("jobs")])

    @affinity.task(tag_from="tag", name="limited", shared=False, **options)
    def task(tag: str) -> None: ...

    @app.task(name="ordinary", shared=False, acks_late=True, acks_on_timeout=False, time_limit=1)
    def ordinary() -> None: ...

    app.finalize()
    for name in set(app.tasks) - {"limited", "ordinary"}:
        app.tasks.unregister(name)  # shared tasks of other tests' modules
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


def test_a_mistyped_queue_is_named_and_a_worker_of_ordinary_queues_is_in_order() -> None:
    app = Celery("checked", set_as_current=False)
    app.task(name="slow", shared=False, queue="invoices-low")(ordinary)
    app.finalize()
    text, is_mistyped = serves_none(app, ["invoices", "mails"], ["celery", "invoice"])
    assert is_mistyped
    assert text.endswith("consumed: 'celery', 'invoice'); did you mean 'invoices' by 'invoice'?")
    for used in ("celery", "invoices-low"):
        text, is_mistyped = serves_none(app, ["invoices"], [used])
        assert (text[-1], is_mistyped) == (".", False)


def ordinary() -> None: ...


def of_app(queue: AffinityQueue, **conf: Any) -> list[str]:
    """Of a worker with an ordinary task that goes to this queue, and one that does not."""
    app = Celery("checked", broker="memory://", set_as_current=False)
    app.conf.update(conf)
    Affinity(app, queues=[queue])
    app.conf.task_routes = {"routed": {"queue": queue.name}, "celery.*": {"queue": queue.name}}
    for name, options in (("plain", {"queue": queue.name}), ("routed", {}), ("elsewhere", {})):
        app.task(name=name, shared=False, **options)(ordinary)
    app.finalize()
    for name in set(app.tasks) - {"plain", "routed", "elsewhere", "celery.chord_unlock"}:
        app.tasks.unregister(name)  # shared tasks of other tests' modules
    worker = {"app": app, "pool_cls": "prefork", "time_limit": None, "soft_time_limit": None}
    return warnings_of(SimpleNamespace(**worker))


def test_an_ordinary_task_of_an_affinity_queue_is_named() -> None:
    found = of_app(AffinityQueue("jobs"))
    assert [line.split(". ")[0] for line in found] == [
        "ordinary tasks go to an affinity queue: 'plain', 'routed'"
    ]
    (line,) = of_app(AffinityQueue("jobs"), task_default_queue="jobs")
    assert "'elsewhere', 'plain', 'routed'" in line
    assert of_app(AffinityQueue("jobs", untagged="spread")) == []


def test_results_that_would_halt_a_tag_while_redis_restarts_are_named() -> None:
    def found(on_failure: Any, **conf: Any) -> int:
        queue = AffinityQueue("jobs", untagged="spread", on_failure=on_failure)
        return len(of_app(queue, **{"result_backend": "redis://", **conf}))

    assert found("block") == found("park") == 1
    assert found("skip") == 0
    assert found("block", result_backend_always_retry=True) == 0
    assert found("block", task_ignore_result=True) == 0
    assert found("block", result_backend="rpc://") == found("block", result_backend=None) == 0


def test_acks_that_the_ledger_does_not_know_are_named() -> None:
    assert warned(acks_late=True, reject_on_worker_lost=True) == []
    assert warned(acks_on_timeout=False) == []
    (line,) = warned(acks_late=True, acks_on_timeout=False)
    assert line.startswith("acks_on_timeout=False of 'limited'")
    (line,) = warned(retry_on_worker_lost=True)
    assert "max_deliveries" in line
