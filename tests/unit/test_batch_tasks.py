"""Laws of a batch task's declaration, and of its calls where there is no worker."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from typing import Any

import pytest
from celery import Celery, Task
from celery.exceptions import MaxRetriesExceededError, SoftTimeLimitExceeded

from celery_affinity import (
    Affinity,
    AffinityQueue,
    BatchRequest,
    BatchResultError,
    TagError,
    affinity_task,
    batch_calls,
    current,
)
from celery_affinity.batches import results_of
from celery_affinity.message import Stamp, envelope
from celery_affinity.running import Run

_numbers = count()


@pytest.fixture
def app() -> Celery:
    made = Celery("batches", broker="memory://", backend="cache+memory://", set_as_current=True)
    Affinity(made, queues=[AffinityQueue("jobs")])
    return made


def declared(app: Celery, fun: Any, **options: Any) -> Task:
    options = {"tag_from": "tag", "batch": True, **options}
    return app.celery_affinity.task(name=f"batches.work{next(_numbers)}", **options)(fun)


def test_called_directly_or_eagerly_it_is_a_batch_of_one(app: Celery) -> None:
    seen: list[BatchRequest] = []

    def work(requests: list[BatchRequest]) -> list[Any]:
        seen.extend(requests)
        return [(request.args, dict(request.kwargs), current() and current().tag) for request in requests]

    task = declared(app, work)
    assert task(1, tag="a") == ((1,), {"tag": "a"}, None)
    assert task.apply((1,), {"tag": "a"}).get() == ((1,), {"tag": "a"}, "a")
    app.conf.task_always_eager = True
    assert task.delay(1, tag="a").get() == ((1,), {"tag": "a"}, "a")
    assert [request.name for request in seen] == [task.name] * 3
    assert seen[0].id is None and seen[1].id is not None


def test_eagerly_its_results_count_as_in_a_worker(app: Celery) -> None:
    def work(requests: list[BatchRequest]) -> list[Any]:
        return [
            request.retry(countdown=0) if request.retries < request.kwargs.get("times", 0)
            else request.kwargs.get("result") for request in requests
        ]

    task = declared(app, work, max_retries=2)
    failed = task.apply(kwargs={"tag": "a", "result": ValueError("bad")})
    assert (failed.state, str(failed.result)) == ("FAILURE", "bad")
    assert task.apply(kwargs={"tag": "a", "times": 2, "result": 7}).get() == 7
    with pytest.raises(MaxRetriesExceededError):
        task.apply(kwargs={"tag": "a", "times": 9}).get()


def test_a_bound_one_is_given_its_task(app: Celery) -> None:
    def work(self: Task, requests: list[BatchRequest]) -> list[Any]:
        return [self.name for _ in requests]

    task = declared(app, work, bind=True)
    assert task(tag="a") == task.name


def test_the_tag_is_a_keyword_argument_or_what_a_callable_yields(app: Celery) -> None:
    def work(requests: list[BatchRequest]) -> None: ...

    task = declared(app, work, tag_from="order.tenant")
    assert task.apply(kwargs={"order": {"tenant": "a"}}).state == "SUCCESS"
    with pytest.raises(TagError, match="argument 'order', which this call does not have by name"):
        task.apply(({"tenant": "a"},))
    with pytest.raises(TagError, match="'tenant' is not in dict"):
        task.apply(kwargs={"order": {}})


def test_it_works_as_a_shared_task_without_an_affinity() -> None:
    @affinity_task(queue="jobs", tag_from="tag", batch=True, name="batches.shared")
    def work(requests: list[BatchRequest]) -> list[int]:
        return [1 for _ in requests]

    Celery("alone", broker="memory://", set_as_current=True)
    assert work.apply(kwargs={"tag": "a"}).get() == 1
    assert work.run("a") == 1


def test_a_call_within_a_call_is_its_own(app: Celery) -> None:
    def inner(requests: list[BatchRequest]) -> list[int]:
        return [len(requests) * 10 for _ in requests]

    other = app.celery_affinity.task(name="batches.inner", tag_from="tag", batch=True)(inner)
    def outer(requests: list[BatchRequest]) -> list[int]:
        return [other(tag="b") + other.apply(kwargs={"tag": "b"}).get() for _ in requests]

    assert declared(app, outer)(tag="a") == 20


def test_what_makes_no_sense_is_refused(app: Celery) -> None:
    with pytest.raises(TypeError, match="batch=True goes without pydantic=True"):
        declared(app, lambda requests: None, pydantic=True)

    def work(self: Task, requests: list[BatchRequest]) -> list[Any]:
        raise self.replace(self.s(tag="b"))

    with pytest.raises(TypeError, match="cannot be replaced"):
        declared(app, work, bind=True)(tag="a")


def yields(*results: Any) -> Iterator[Any]:
    yield from results


REQUESTS = [BatchRequest(str(n), "work", (n,), {}) for n in range(2)]


@pytest.mark.parametrize("returned", [[1, 2], (1, 2), yields(1, 2)])
def test_any_sequence_of_results_will_do(returned: Any) -> None:
    assert results_of(lambda requests: returned, REQUESTS) == [1, 2]


def test_none_is_a_result_of_none_for_each() -> None:
    assert results_of(lambda requests: None, REQUESTS) == [None, None]


@pytest.mark.parametrize(
    ("returned", "found"),
    [("ab", "str"), ({0: 1, 1: 2}, "dict"), ({1, 2}, "set"), (7, "int"), ([1], "1 results"),
     ([1, 2, 3], "more than 2 results"), (yields(1, 2, 3), "more than 2 results")],
)
def test_a_return_value_whose_results_belong_to_nobody_fails_all(returned: Any, found: str) -> None:
    results = results_of(lambda requests: returned, REQUESTS)
    assert [type(result.error) for result in results] == [BatchResultError] * 2
    assert f"returned {found}, expected a list of 2" in str(results[0].error)


def test_what_was_yielded_before_an_error_counts() -> None:
    def work(requests: Any) -> Iterator[int]:
        yield 1
        raise ValueError("bad")

    first, second = results_of(work, REQUESTS)
    assert (first, str(second.error)) == (1, "bad")


def test_a_soft_time_limit_that_strikes_while_a_call_is_read_buries_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    app, reads = Celery("x", set_as_current=False), []

    @app.task(name="t", shared=False)
    def task() -> None:
        """Only read here."""

    decoded = batch_calls.decoded_body

    def struck_once(*arguments: Any) -> Any:
        reads.append(1)
        if len(reads) == 1:
            raise SoftTimeLimitExceeded
        return decoded(*arguments)

    monkeypatch.setattr(batch_calls, "decoded_body", struck_once)
    raw = envelope([[], {}, {}], {"id": "second", "task": "t"}, {}, serializer="json", compression=None, routing_key="q")
    run = Run(Stamp("1", "2", "3", "inc", 0, 1, 1, "jobs"), "first", 0, "token")
    first = {"id": "first", "args": (), "kwargs": {}}
    call = batch_calls.BatchTask(task).call(run, first, [("2", raw)])
    assert len(reads) == 2
    assert "bury" not in [outcome for _, outcome, _ in call.ends(run, "done", ())]
