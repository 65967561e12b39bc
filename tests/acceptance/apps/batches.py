"""A batch task that does with each of its requests what that asks for, and notes its calls.

Every request is recorded as a run of its own, one after the other, so that the history checker can
judge order and exclusion. A batch task's `hooks` note what Celery calls around it.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

from celery import Task
from celery.exceptions import Ignore, Reject, SoftTimeLimitExceeded

from acceptance.apps.affinity_app import affinity, app, recorded
from acceptance.apps.semantics import note, notes
from celery_affinity import BatchRequest, affinity_task, current
from history import record

__all__ = ("affinity", "app", "notes")


def tag_of(tag: str, *_: Any, **__: Any) -> str:
    """The tag of a call."""
    return tag


class Hooked(Task):
    """Notes its hooks."""

    def on_success(self, retval: Any, task_id: str, args: Any, kwargs: Any) -> None:
        note("on_success", tag=args[0], seq=args[1], retval=retval)

    def on_failure(self, exc: Any, task_id: str, args: Any, kwargs: Any, einfo: Any) -> None:
        note("on_failure", tag=args[0], seq=args[1], error=repr(exc))

    def on_retry(self, exc: Any, task_id: str, args: Any, kwargs: Any, einfo: Any) -> None:
        note("on_retry", tag=args[0], seq=args[1])


def one(request: BatchRequest) -> Any:
    """Do what a request asks for; its result."""
    tag, seq, *wish = request.args
    how, ms = (*wish, *("", 0)[len(wish):])
    lease = current()
    fields = {
        "tag": tag, "seq": seq, "task_id": request.id, "retries": request.retries,
        "epoch": lease.epoch if lease else None, "attempt": lease.attempt if lease else None,
        "worker": request.request_dict.get("hostname"),
    }
    record("start", **fields)
    outcome = "ok"
    try:
        time.sleep(ms / 1000)
        if how == "kill":
            outcome = "aborted"
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "fail":
            return ValueError(f"failed {seq}")
        if how == "ignore":
            return Ignore()
        if how == "reject":
            return Reject("once more", requeue=not request.request_dict.get("redelivered"))
        if how == "retry" and not request.retries:
            return request.retry(countdown=0)
        if how == "retry too often":
            return request.retry(LookupError("gave up"), countdown=0, max_retries=1)
        return seq
    finally:
        record("end", outcome=outcome, **fields)


def call(requests: list[BatchRequest]) -> list[Any]:
    """Note a call, and do each request."""
    lease = current()
    note(
        "call", tag=requests[0].args[0], seqs=[request.args[1] for request in requests],
        pid=os.getpid(), place=lease.place if lease else None, epoch=lease.epoch if lease else None,
        attempt=lease.attempt if lease else None, names=sorted({r.name for r in requests}),
    )
    return [one(request) for request in requests]


@affinity_task(queue="jobs", tag_from=tag_of, batch=True, name="batch.bulk", base=Hooked, max_retries=3)
def bulk(requests: list[BatchRequest]) -> list[Any]:
    """A result for each."""
    return call(requests)


@affinity_task(queue="jobs", tag_from=tag_of, batch=True, bind=True, name="batch.whole", max_retries=3)
def whole(self: Task, requests: list[BatchRequest]) -> list[Any]:
    """Fail, or be retried, as a whole; yield nothing useful."""
    found = call(requests)
    how = (requests[0].args[2:] or ("",))[0]
    if how == "raise":
        raise ValueError("the call failed")
    if how == "self.retry" and not self.request.retries:
        raise self.retry(countdown=0)
    if how == "one short":
        return found[:-1]
    return found


@affinity_task(
    queue="jobs", tag_from=tag_of, batch=True, name="batch.automatic", autoretry_for=(KeyError,),
    retry_kwargs={"max_retries": 2, "countdown": 0},
)
def automatic(requests: list[BatchRequest]) -> Any:
    """Yield results, until one fails that was not retried."""
    call(requests)
    for request in requests:
        if request.args[2:] == ["raise"] and not request.retries:
            raise KeyError("again")
        yield request.args[1]


@affinity_task(queue="jobs", tag_from=tag_of, batch=True, name="batch.limited", soft_time_limit=0.5, time_limit=10)
def limited(requests: list[BatchRequest]) -> Any:
    """Give what was reached in time."""
    found: list[Any] = []
    try:
        for request in requests:
            found.append(one(request))
    except SoftTimeLimitExceeded as error:
        found += [error] * (len(requests) - len(found))
    return found


@affinity_task(queue="jobs", tag_from=tag_of, batch=True, name="batch.cut", time_limit=1)
def cut(requests: list[BatchRequest]) -> Any:
    """Be cut off by the hard limit."""
    return call(requests)


@affinity_task(queue="jobs", tag_from=tag_of, bind=True, name="batch.hold")
def hold(self: Task, tag: str, seq: int, path: str) -> int:
    """An ordinary affinity task that holds its tag until a file is there."""
    with recorded(self, tag, seq):
        while not Path(path).exists():
            time.sleep(0.01)
    return seq


@affinity_task(queue="jobs", tag_from=tag_of, bind=True, name="batch.single")
def single(self: Task, tag: str, seq: int) -> int:
    """An ordinary affinity task."""
    with recorded(self, tag, seq):
        return seq


@app.task(name="batch.follow")
def follow(result: Any, *rest: Any) -> Any:
    """What is linked to a batch task: it notes what it is given."""
    note("follow", result=result, rest=list(rest))
    return result


@app.task(name="batch.errback")
def errback(request: Any, error: Any, traceback: Any) -> None:
    """Notes which task failed."""
    note("errback", id=request.id)
