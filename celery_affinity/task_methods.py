"""The methods of an affinity task's class, above those of the app's base or of the user's."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, NoReturn, Protocol

from celery.exceptions import Reject
from celery.utils import uuid

from celery_affinity import context
from celery_affinity.context import AffinityContext
from celery_affinity.exceptions import MissingTagError, TagError
from celery_affinity.message import TAG_HEADER, spread_tag, tag_text
from celery_affinity.routing import pending_queue, usual_pending_queue
from celery_affinity.settings import AffinitySettings
from celery_affinity.tagging import derive_tag
from celery_affinity.tracing import sending_headers

__all__ = ("refuse_replace", "task_methods")


class _Bound(Protocol):
    """What an app's `Affinity` offers to its tasks."""

    settings: AffinitySettings


def task_methods() -> dict[str, Any]:
    """Attributes for the class of one task, made anew for each.

    A task's class may be the base of another's. So each set finds what is above it by the class
    that has it, which `super()` in a function outside of a class cannot.
    """
    mark = object()

    def above(self: Any) -> Any:
        kind = self if isinstance(self, type) else type(self)
        owner = next(one for one in kind.__mro__ if one.__dict__.get("affinity_methods") is mark)
        return super(owner, self)

    def apply_async(self: Any, *args: Any, **options: Any) -> Any:
        return _sending(self, above(self).apply_async)(*args, **options)

    def apply(
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
        headers = {**(headers or {}), TAG_HEADER: tag}
        try:
            return above(self).apply(args, kwargs, *positional, headers=headers, **options)
        finally:
            context.leave(here)

    def retry(self: Any, *args: Any, **options: Any) -> Any:
        handled = sys.exc_info()[1]
        try:
            return above(self).retry(*args, **options)
        except Reject as error:
            # So Celery says that it could not send it. The task would neither run again nor fail.
            cause = getattr(error, "reason", None)
            if isinstance(cause, Exception) and not error.requeue:  # type: ignore[attr-defined]
                raise cause from handled
            raise

    def on_bound(kind: Any, app: Any) -> None:
        # Read by result backends that end a chord with a task of Celery's: it goes to the queue of
        # the chord's body. Only now, since Celery 5.7 warns of a `queue` in a class that it binds.
        if getattr(kind, "queue", None) is None:
            kind.queue = property(_queue)
        above(kind).on_bound(app)

    return {
        "affinity_methods": mark,
        "apply_async": apply_async,
        "apply": apply,
        "retry": retry,
        "on_bound": classmethod(on_bound),
        # Django's: send when the transaction commits. What is wrong with the call is said at once.
        "apply_async_on_commit": property(
            lambda self: _sending(self, above(self).apply_async_on_commit)
        ),
        "delay_on_commit": property(_delay_on_commit),
        "affinity": property(_affinity),
        **dict.fromkeys(("map", "starmap", "chunks"), _refuse_inline),
    }


def _queue(self: Any) -> str | None:
    bound = _affinity_of(self)
    return usual_pending_queue(self, bound.settings) if bound else self.affinity_queue


def _affinity_of(task: Any) -> _Bound | None:
    bound: _Bound | None = getattr(task._get_app(), "celery_affinity", None)
    return bound


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
            if not _is_spread(task, args, kwargs, options):
                raise
            options["task_id"] = options.get("task_id") or uuid()
            return spread_tag(options["task_id"])
    try:
        return tag_text(explicit)
    except TagError as error:
        raise TagError(f"task {task.name!r}: {error}") from None


def _is_spread(task: Any, args: Any, kwargs: Any, options: dict[str, Any]) -> bool:
    bound = _affinity_of(task)
    if bound is None:
        return False
    pending = pending_queue(task, bound.settings, args, kwargs, options.get("queue"), options)
    return any(q.pending == pending and q.untagged == "spread" for q in bound.settings.queues)


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
    options = {**options, "queue": queue, "headers": dict(headers or {})}
    tag = _tag_of_call(self, args, kwargs, identify_tag, headers, options)
    options["headers"] = {**sending_headers(headers), TAG_HEADER: tag}
    bound = _affinity_of(self)
    addressed = options.get("routing_key") is not None and options.get("exchange") is not None
    if not addressed and not self._get_app().conf.task_always_eager:
        if bound is not None:
            queue = pending_queue(self, bound.settings, args, kwargs, queue, options)
        elif queue is None:
            queue = self.affinity_queue
    options["queue"] = queue
    if queue is None and bound is None and not addressed:
        del options["queue"]  # a base of the user's, or an annotation, may have one
    return options


def _sending(self: Any, send: Callable[..., Any]) -> Callable[..., Any]:
    """`apply_async` with a tag, as what is above sends it."""

    def apply_async(
        args: Any = None,
        kwargs: Any = None,
        *positional: Any,
        identify_tag: object = None,
        headers: Any = None,
        queue: Any = None,
        **options: Any,
    ) -> Any:
        options = _tagged(self, args, kwargs, identify_tag, headers, queue, options)
        return send(args, kwargs, *positional, **options)

    return apply_async


def _delay_on_commit(self: Any) -> Callable[..., Any]:
    """`apply_async_on_commit` with the task's arguments only."""
    on_commit = self.apply_async_on_commit
    return lambda *args, **kwargs: on_commit(args, kwargs)


def _affinity(self: Any) -> AffinityContext | None:
    """The lease under which this task runs; None outside of one."""
    return context.current()


def _refuse_inline(self: Any, *_: Any, **__: Any) -> NoReturn:
    raise TypeError(
        f"affinity task {self.name!r} has no map, starmap or chunks: they call it inside of "
        "another task, past its queue, so that calls of one tag would run side by side. Send "
        "group(task.s(...) for ...), or declare a batch task (batch=True)"
    )


def refuse_replace(self: Any, sig: Any) -> NoReturn:
    """Takes the place of ``replace`` in a batch task."""
    raise TypeError(
        f"batch task {self.name!r} cannot be replaced: its call stands for several tasks. Send the "
        "other task, and return its id as a result"
    )
