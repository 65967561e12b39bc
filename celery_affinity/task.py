"""`affinity_task`: a Celery task whose calls carry a tag."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Concatenate, Literal, ParamSpec, Protocol, TypeVar, overload

from celery import shared_task
from celery.utils import uuid

from celery_affinity import context
from celery_affinity.batches import batch_body
from celery_affinity.context import AffinityContext
from celery_affinity.exceptions import MissingTagError, TagError, UndeclaredQueueError
from celery_affinity.message import TAG_HEADER, spread_tag, tag_text
from celery_affinity.settings import AffinitySettings
from celery_affinity.tagging import derive_tag
from celery_affinity.tracing import sending_headers

if TYPE_CHECKING:
    from celery.app.task import Task

__all__ = ("affinity_task", "pending_queue")

P = ParamSpec("P")
R = TypeVar("R")
TagFrom = str | Callable[..., object]


class _Bound(Protocol):
    """What an app's `Affinity` offers to its tasks."""

    settings: AffinitySettings


def _tag_of_call(
    task: Any, args: Any, kwargs: Any, explicit: object, headers: Any, options: dict[str, Any]
) -> str:
    """The tag of a call; of an untagged one that may be spread by the id that it then gets."""
    if explicit is None and headers:
        explicit = headers.get(TAG_HEADER)
    if explicit is None:
        try:
            return derive_tag(task, args, kwargs)
        except MissingTagError:
            if not _is_spread(task, args, kwargs, options.get("queue")):
                raise
            options["task_id"] = options.get("task_id") or uuid()
            return spread_tag(options["task_id"])
    try:
        return tag_text(explicit)
    except TagError as error:
        raise TagError(f"task {task.name!r}: {error}") from None


def _affinity_of(task: Any) -> _Bound | None:
    bound: _Bound | None = getattr(task._get_app(), "celery_affinity", None)
    return bound


def pending_queue(task: Any, settings: AffinitySettings, args: Any, kwargs: Any, queue: Any) -> str:
    """The Celery queue to publish to: the call's, the task's, the route's, or the only one."""
    if queue is None:
        queue = task.affinity_queue
    if queue is None:
        route = task._get_app().amqp.router.lookup_route(task.name, args, kwargs) or {}
        queue = route.get("queue") if isinstance(route, Mapping) else route
    if queue is None and len(settings.queues) == 1:
        return settings.queues[0].pending
    name = getattr(queue, "name", queue)
    for declared in settings.queues:
        if name in (declared.name, declared.pending):
            return declared.pending
    raise UndeclaredQueueError(str(name), settings.queue_names, task.name)


def _is_spread(task: Any, args: Any, kwargs: Any, queue: Any) -> bool:
    bound = _affinity_of(task)
    if bound is None:
        return False
    pending = pending_queue(task, bound.settings, args, kwargs, queue)
    return any(q.pending == pending and q.untagged == "spread" for q in bound.settings.queues)


# The following become attributes of the task's class, above the app's or the user's base.


def _apply_async(
    self: Any,
    args: Any = None,
    kwargs: Any = None,
    *positional: Any,
    identify_tag: object = None,
    headers: Any = None,
    queue: Any = None,
    **options: Any,
) -> Any:
    options = _tagged(self, args, kwargs, identify_tag, headers, queue, options)
    return super(type(self), self).apply_async(args, kwargs, *positional, **options)


def _tagged(
    self: Any,
    args: Any,
    kwargs: Any,
    identify_tag: object,
    headers: Any,
    queue: Any,
    options: dict[str, Any],
) -> dict[str, Any]:
    """The options of a call with its tag and the queue to publish to. Repeats change nothing."""
    options = {**options, "queue": queue}
    tag = _tag_of_call(self, args, kwargs, identify_tag, headers, options)
    options["headers"] = {**sending_headers(headers), TAG_HEADER: tag}
    bound = _affinity_of(self)
    addressed = options.get("routing_key") is not None and options.get("exchange") is not None
    if not addressed and not self._get_app().conf.task_always_eager:
        if bound is not None:
            queue = pending_queue(self, bound.settings, args, kwargs, queue)
        elif queue is None:
            queue = self.affinity_queue
    options["queue"] = queue
    if queue is None:
        del options["queue"]
    return options


def _apply_async_on_commit(self: Any) -> Callable[..., Any]:
    """Django's: send when the transaction commits. What is wrong with the call is said at once.

    Raises:
        AttributeError: If the app is not Django's.
    """
    on_commit: Callable[..., Any] = super(type(self), self).apply_async_on_commit

    def apply_async_on_commit(
        args: Any = None,
        kwargs: Any = None,
        *positional: Any,
        identify_tag: object = None,
        headers: Any = None,
        queue: Any = None,
        **options: Any,
    ) -> Any:
        options = _tagged(self, args, kwargs, identify_tag, headers, queue, options)
        return on_commit(args, kwargs, *positional, **options)

    return apply_async_on_commit


def _delay_on_commit(self: Any) -> Callable[..., Any]:
    """`apply_async_on_commit` with the task's arguments only."""
    on_commit = self.apply_async_on_commit
    return lambda *args, **kwargs: on_commit(args, kwargs)


def _apply(
    self: Any,
    args: Any = None,
    kwargs: Any = None,
    *positional: Any,
    identify_tag: object = None,
    headers: Any = None,
    **options: Any,
) -> Any:
    tag = _tag_of_call(self, args, kwargs, identify_tag, headers, options)
    queue = str(getattr(self.affinity_queue, "name", self.affinity_queue) or "")
    here = context.enter(AffinityContext(tag, 0, 1, 1, queue, "eager", 0, 0, True))
    try:
        return super(type(self), self).apply(
            args, kwargs, *positional, headers={**(headers or {}), TAG_HEADER: tag}, **options
        )
    finally:
        context.leave(here)


def _replace(self: Any, sig: Any) -> None:
    raise TypeError(
        f"batch task {self.name!r} cannot be replaced: its call stands for several tasks. Send the "
        "other task, and return its id as a result"
    )


def _affinity(self: Any) -> AffinityContext | None:
    """The lease under which this task runs; None outside of one."""
    return context.current()


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
        options = {**options, "bind": True, "replace": _replace}
    return {
        **options,
        "affinity_batch": batch,
        # Not Celery's own attribute: 5.7 warns that `queue` on a task goes away.
        "affinity_queue": queue,
        "affinity_tag_from": staticmethod(tag_from) if callable(tag_from) else tag_from,
        "apply_async": _apply_async,
        "apply": _apply,
        "apply_async_on_commit": property(_apply_async_on_commit),
        "delay_on_commit": property(_delay_on_commit),
        "affinity": property(_affinity),
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
