"""Twins of one function each: "plain.<name>" as a Celery task, "tagged.<name>" as an affinity task.

What is done with the one must come out with the other. All take their tag by keyword, so that the
result of the task before in a chain can stand first. `note` writes into NOTES, beside the history.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

from celery import Task, chord, group, shared_task
from celery.exceptions import SoftTimeLimitExceeded
from celery.result import AsyncResult, ResultSet, allow_join_result
from pydantic import BaseModel

from acceptance.apps.affinity_app import affinity, app
from celery_affinity import affinity_task, current
from history import HISTORY_VARIABLE, record

__all__ = ("affinity", "app", "notes", "twin_of")

#: A task whose process was lost after its result was stored is not run again.
app.conf.worker_deduplicate_successful_tasks = True


def notes(name: str) -> list[dict[str, Any]]:
    """What tasks noted under a name, in order."""
    path = Path(os.environ[HISTORY_VARIABLE] + ".notes")
    lines = path.read_text().splitlines() if path.exists() else []
    return [found for found in map(json.loads, lines) if found["event"] == name]


def note(name: str, **fields: Any) -> None:
    """Note something for the test to read."""
    record(name, path=os.environ[HISTORY_VARIABLE] + ".notes", **fields)


def twin_of(kind: str, name: str) -> Any:
    """The task of that name: kind is "plain" or "tagged"."""
    return app.tasks[f"{kind}.{name}"]


def twins(**options: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Declare a function as both."""

    def declare(fun: Callable[..., Any]) -> Callable[..., Any]:
        name = fun.__name__
        shared_task(name=f"plain.{name}", bind=True, **options)(fun)
        affinity_task(queue="jobs", tag_from="tag", name=f"tagged.{name}", bind=True, **options)(fun)
        return fun

    return declare


@contextmanager
def running(task: Task, tag: str) -> Iterator[None]:
    """Record when it ran, whatever becomes of it; the place in its id's runs is its number."""
    lease = current()
    fields = {
        "tag": tag, "seq": 0, "task_id": task.request.id, "worker": task.request.hostname,
        "retries": task.request.retries, "epoch": lease.epoch if lease else None,
        "attempt": lease.attempt if lease else None,
    }
    record("start", **fields)
    try:
        yield
    finally:
        record("end", **fields)


def sibling(task: Task, name: str) -> Any:
    """Another task of the same kind."""
    return twin_of(task.name.split(".")[0], name)


@twins()
def add(self: Task, *numbers: int, tag: str) -> int:
    """Sum the arguments."""
    with running(self, tag):
        return sum(numbers)


@twins()
def total(self: Task, numbers: list[int], tag: str) -> int:
    """Sum a list: a chord's body."""
    with running(self, tag):
        return sum(numbers)


@twins()
def fail(self: Task, *numbers: int, tag: str) -> None:
    """Fail."""
    with running(self, tag):
        raise ValueError(f"failed with {list(numbers)}")


@twins()
def nap(self: Task, seconds: float, *numbers: int, tag: str) -> float:
    """Sleep in short naps, which signals and limits interrupt; then take `finally` as long."""
    with running(self, tag):
        try:
            deadline = time.monotonic() + seconds
            while time.monotonic() < deadline:
                time.sleep(0.02)
        finally:
            for part in numbers:
                time.sleep(part / 1000)
    return seconds


@twins(soft_time_limit=0.4)
def softly_limited(self: Task, *, tag: str) -> str:
    """Notice its limit."""
    with running(self, tag):
        try:
            time.sleep(20)
        except SoftTimeLimitExceeded:
            return "noticed"
    return "never"


@twins(ignore_result=True)
def quiet(self: Task, *, tag: str) -> int:
    """Keep no result."""
    with running(self, tag):
        return 7


@twins(track_started=True)
def tracked(self: Task, seconds: float, *, tag: str) -> float:
    """Show that it runs."""
    with running(self, tag):
        time.sleep(seconds)
    return seconds


@twins(autoretry_for=(KeyError,), retry_kwargs={"max_retries": 2, "countdown": 0})
def automatic(self: Task, *, tag: str) -> int:
    """Succeed at the third attempt, without asking for one."""
    with running(self, tag):
        if self.request.retries < 2:
            raise KeyError("again")
        return int(self.request.retries)


@twins(max_retries=2)
def again(self: Task, how: str, *, tag: str) -> str:
    """Ask for one retry, in one of Celery's ways; or for too many."""
    with running(self, tag):
        if how == "too often":
            raise self.retry(countdown=0, exc=LookupError("gave up"))
        if self.request.retries == 0:
            if how == "countdown":
                raise self.retry(countdown=0.5)
            if how == "eta":
                raise self.retry(eta=datetime.now(timezone.utc) + timedelta(seconds=0.5))
            if how == "throw=False":
                self.retry(countdown=0, throw=False)
                return "first"
            if how == "arguments":
                raise self.retry(args=("other",), countdown=0)
        return f"{how} {self.request.retries}"


@twins()
def replaced(self: Task, how: str, *, tag: str) -> None:
    """Put another task in its place."""
    with running(self, tag):
        add = sibling(self, "add")
        if how == "one":
            raise self.replace(add.s(1, 2, tag=tag))
        if how == "group":
            raise self.replace(group(add.s(n, tag=tag) for n in range(3)))
        raise self.replace(chord([add.s(1, tag=tag), add.s(2, tag=tag)], sibling(self, "total").s(tag=tag)))


@twins()
def parent(self: Task, *, tag: str) -> list[str]:
    """Call two others; their ids."""
    with running(self, tag):
        tell = sibling(self, "headers")
        return [tell.delay(tag=f"{tag}/child").id, twin_of("plain", "headers").delay(tag="none").id]


@twins()
def headers(self: Task, *, tag: str) -> dict[str, Any]:
    """What its message brought along."""
    with running(self, tag):
        lease = current()
        return {
            "lease": lease.tag if lease else None,
            "header": (self.request.headers or {}).get("identify_tag"),
            "parent": self.request.parent_id, "root": self.request.root_id,
            "priority": (self.request.delivery_info or {}).get("priority"),
        }


@twins(max_retries=1)
def typed(self: Task, *, tag: str) -> dict[str, str]:
    """What its producer's own headers are after a retry."""
    with running(self, tag):
        if not self.request.retries:
            raise self.retry(countdown=0)
        found = self.request.headers.items()
        return {name: type(value).__name__ for name, value in found if name.startswith("my_")}


@twins(acks_late=True, reject_on_worker_lost=True, max_retries=5, retry_on_worker_lost=True)
def dying(self: Task, *, tag: str) -> None:
    """Take its process along, with all that Celery has for it."""
    record("start", tag=tag, seq=0, task_id=self.request.id)
    os.kill(os.getpid(), signal.SIGKILL)


class DiesAfterwards(Task):  # type: ignore[misc]
    """A task whose process dies between its result and its settle."""

    def after_return(self, *args: Any) -> None:
        """Called when the result is stored."""
        os.kill(os.getpid(), signal.SIGKILL)


@affinity_task(
    queue="jobs", tag_from="tag", name="tagged.done_and_dead", bind=True, base=DiesAfterwards,
    acks_late=True,
)
def done_and_dead(self: Task, *, tag: str) -> int:
    """Store a result, then die."""
    record("start", tag=tag, seq=0, task_id=self.request.id)
    return 5


@twins(rate_limit="4/s")
def limited(self: Task, *, tag: str) -> None:
    """Not run more than four times a second on a worker."""
    with running(self, tag):
        pass


@shared_task(name="semantics.errback")
def errback(task_id: str, about: str) -> None:
    """An errback of the old kind: given the id, run as a task."""
    note("errback", task_id=task_id, about=about)


@shared_task(name="semantics.called_errback")
def called_errback(request: Any, error: Exception, traceback: Any, about: str = "") -> None:
    """An errback of the new kind: called by whoever stores the failure."""
    note("errback", task_id=request.id, about=type(error).__name__)


class Tenant(BaseModel):
    """A tenant."""

    id: int


class Order(BaseModel):
    """An order of a tenant."""

    number: int
    tenant: Tenant


@affinity_task(
    queue="jobs", tag_from="order.tenant.id", name="tagged.take_order", bind=True, pydantic=True
)
def take_order(self: Task, order: Order) -> Order:
    """Take a model, return one."""
    assert isinstance(order, Order)
    with running(self, str(order.tenant.id)):
        return Order(number=order.number + 1, tenant=order.tenant)


@affinity_task(queue="jobs", tag_from="tag", name="tagged.waiting", bind=True)
def waiting(self: Task, how: str, *, tag: str) -> Any:
    """Wait for a task of its own tag, or of another one."""
    work = twin_of("tagged", "add")
    own = work.s(1, 2, tag=tag)
    with running(self, tag), allow_join_result():
        if how == "result":
            return own.apply_async().get(timeout=20)
        if how == "by id":
            return AsyncResult(own.apply_async().id).get(timeout=20)
        if how == "send_task":
            sent = self.app.send_task(
                "tagged.add", (1, 2), {"tag": tag}, queue="jobs", headers={"identify_tag": tag}
            )
            return sent.get(timeout=20, disable_sync_subtasks=False)
        if how == "group":
            return group(work.s(1, tag="elsewhere"), own)().get(timeout=20)
        if how == "set":
            return ResultSet([own.apply_async()]).join(timeout=20)
        if how == "chain":
            return (own | work.s(3, tag="elsewhere"))().get(timeout=20)
        if how == "chord":
            return chord([own], twin_of("tagged", "total").s(tag="elsewhere"))().get(timeout=20)
        if how == "other tag":
            return work.s(1, 2, tag=f"{tag}/other").apply_async().get(timeout=20)
        if how == "ready":
            sent = own.apply_async()
            return sent.state
    raise ValueError(how)
