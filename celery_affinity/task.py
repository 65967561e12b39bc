"""`affinity_task`: a Celery task whose calls carry a tag."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Concatenate, Literal, ParamSpec, TypeVar, overload

from celery import shared_task

from celery_affinity.batches import batch_body
from celery_affinity.task_methods import refuse_replace, task_methods

if TYPE_CHECKING:
    from celery.app.task import Task

__all__ = ("affinity_task",)

P = ParamSpec("P")
R = TypeVar("R")
TagFrom = str | Callable[..., object]


def task_options(
    tag_from: TagFrom | None, queue: Any, batch: bool, options: dict[str, Any]
) -> dict[str, Any]:
    """Celery's task options that make a task an affinity task."""
    if tag_from is not None and not isinstance(tag_from, str) and not callable(tag_from):
        raise TypeError(
            f"tag_from is {tag_from!r}, expected an argument's name or a callable that is given "
            "the call's arguments"
        )
    if batch:
        if options.get("pydantic"):
            raise TypeError("batch=True goes without pydantic=True: the function is given requests")
        # The body that stands for the function is bound, so that it knows its task.
        options = {**options, "bind": True, "replace": refuse_replace}
    return {
        **task_methods(),
        **options,
        "affinity_batch": batch,
        # Not Celery's own attribute: 5.7 warns that `queue` as an option goes away.
        "affinity_queue": queue,
        "affinity_tag_from": staticmethod(tag_from) if callable(tag_from) else tag_from,
    }


def declare(
    decorator: Callable[..., Any],
    fun: Callable[..., Any] | None,
    tag_from: TagFrom | None,
    queue: Any,
    batch: bool,
    options: dict[str, Any],
) -> Any:
    """Apply Celery's decorator with the options of an affinity task."""
    made = decorator(**task_options(tag_from, queue, batch, options))

    def decorate(fun: Callable[..., Any]) -> Any:
        if batch:
            return made(batch_body(fun, bool(options.get("bind"))))
        _check_tag_from(fun, tag_from)
        return made(fun)

    return decorate(fun) if fun is not None else decorate


def _check_tag_from(fun: Callable[..., Any], tag_from: TagFrom | None) -> None:
    if not isinstance(tag_from, str):
        return
    name = tag_from.split(".")[0]
    parameters = inspect.signature(fun).parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    if name not in parameters and not takes_any:
        raise TypeError(
            f"tag_from={tag_from!r}: {fun.__name__}() has no argument {name!r} "
            f"(found: {', '.join(map(repr, parameters)) or 'none'})"
        )


@overload
def affinity_task(fun: Callable[P, R], /) -> Task[P, R]: ...
@overload
def affinity_task(
    *,
    batch: Literal[True],
    bind: bool = ...,
    queue: str | None = ...,
    tag_from: TagFrom | None = ...,
    **options: Any,
) -> Callable[[Callable[..., Any]], Task[..., Any]]: ...
@overload
def affinity_task(
    *,
    bind: Literal[True],
    queue: str | None = ...,
    tag_from: TagFrom | None = ...,
    batch: Literal[False] = ...,
    **options: Any,
) -> Callable[[Callable[Concatenate[Any, P], R]], Task[P, R]]: ...
@overload
def affinity_task(
    *,
    bind: Literal[False] = ...,
    queue: str | None = ...,
    tag_from: TagFrom | None = ...,
    batch: Literal[False] = ...,
    **options: Any,
) -> Callable[[Callable[P, R]], Task[P, R]]: ...
def affinity_task(
    fun: Callable[..., Any] | None = None,
    /,
    *,
    queue: Any = None,
    tag_from: TagFrom | None = None,
    batch: bool = False,
    **options: Any,
) -> Any:
    """Declare a task whose calls carry a tag. Like `celery.shared_task`, and with its options.

    Arguments:
        queue: An affinity queue. May be left out where ``task_routes`` names it, or where there
            is only one.
        tag_from: Where the tag of a call comes from: an argument's name, with a dotted path into
            a model or dict (``"order.company_id"``), or a callable given the call's arguments.
            ``apply_async(..., identify_tag=...)`` goes before it. Of a batch task it names a
            keyword argument.
        batch: The function is given a list of `BatchRequest`: waiting tasks of one tag, at most
            ``max_batch_size`` of them. It returns a result for each; an exception as a result
            fails its task, ``request.retry(...)`` retries it. What it raises is the result of each
            task that has none yet.

    Raises:
        TagError: When the task is called without a usable tag.
        UndeclaredQueueError: When it is called and its queue is not an affinity queue.
    """
    return declare(shared_task, fun, tag_from, queue, batch, options)
