"""Refuses to wait, inside a task, for a task of its own tag: that one starts only afterwards.

Known are the ids of what this run has published itself, with its own tag, to its own queue. What
others publish for it later (the second task of a chain, a chord's body) is not known, nor a tag
that only the intake derives, nor what a thread of the task's own does. A tag of which several may
run at once is never refused: another slot can have room.

Wraps `get`, `join`, `join_native` and `iter_native` of Celery's results, which are public; in a
process that serves affinity queues only, and without effect outside of a dispatched task.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any

from celery.result import AsyncResult, EagerResult, ResultSet

from celery_affinity.context import current
from celery_affinity.exceptions import OwnTagWaitError
from celery_affinity.running import current_run

__all__ = ("refuse_waits_for_own_tag",)


def refuse_waits_for_own_tag() -> None:
    """Have results look at what they wait for. A repeat changes nothing."""
    for kind, names in (
        (AsyncResult, ("get", "wait")),
        (ResultSet, ("get", "join", "join_native", "iter_native")),
    ):
        for name in names:
            stock = getattr(kind, name, None)
            if stock is not None and not hasattr(stock, "celery_affinity"):
                setattr(kind, name, _looking(stock))


def _looking(stock: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(stock)
    def waits(self: Any, *args: Any, **kwargs: Any) -> Any:
        _look(self)
        return stock(self, *args, **kwargs)

    waits.celery_affinity = True  # type: ignore[attr-defined]
    return waits


def _look(result: Any) -> None:
    run = current_run()
    if run is None or not run.own_tag_ids:
        return
    lease = current()
    for one in _waited_for(result):
        if one.id in run.own_tag_ids and lease is not None and not one.ready():
            raise OwnTagWaitError(str(one.id), lease.tag, lease.queue)


def _waited_for(result: Any) -> Iterator[Any]:
    """Single results that have to be there before this one is: its parts, and what goes before."""
    found = [result]
    while found:
        one = found.pop()
        if isinstance(one, ResultSet):
            found += one.results or ()
        elif isinstance(one, AsyncResult) and not isinstance(one, EagerResult):
            yield one
        if getattr(one, "parent", None) is not None:
            found.append(one.parent)
