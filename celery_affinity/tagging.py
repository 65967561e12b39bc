"""The tag of a call, derived from its arguments."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from celery_affinity.exceptions import MissingTagError, TagError
from celery_affinity.message import tag_text

__all__ = ("UNTAGGED", "derive_tag")

#: Celery's own tasks that go where a chord's body or a route sends them, and have no tag: each is
#: one of its own. Not map, starmap and chunks: they would call what they are given past the ledger.
UNTAGGED = (
    "celery.accumulate", "celery.backend_cleanup", "celery.chain", "celery.chord",
    "celery.chord_unlock", "celery.group",
)  # fmt: skip


def _argument(task: Any, path: str, args: Any, kwargs: Any) -> object:
    name, *rest = path.split(".")
    by_name = getattr(task, "affinity_batch", False)
    arguments = kwargs if by_name else _bound_arguments(task, path, args, kwargs)
    if name not in arguments:
        raise TagError(
            f"task {task.name!r} takes its tag from argument {name!r}, which this call does not "
            f"have{' by name' if by_name else ''} "
            f"(found: {', '.join(map(repr, arguments)) or 'none'}). Pass it, or pass "
            f"apply_async(..., identify_tag=...)"
        )
    value: Any = arguments[name]
    for part in rest:
        try:
            value = value[part] if isinstance(value, Mapping) else getattr(value, part)
        except (KeyError, AttributeError):
            found = ", ".join(map(repr, value)) if isinstance(value, Mapping) else repr(value)
            raise TagError(
                f"task {task.name!r} takes its tag from {path!r}, but {part!r} is not in "
                f"{type(value).__name__} (found: {found:.200}). Pass it, or pass "
                "apply_async(..., identify_tag=...)"
            ) from None
    return value


def _bound_arguments(task: Any, path: str, args: Any, kwargs: Any) -> Mapping[str, Any]:
    signature = task.__dict__.get("affinity_signature")
    if signature is None:
        signature = task.affinity_signature = inspect.signature(task.run)
    try:
        bound = signature.bind_partial(*args, **kwargs)
    except TypeError as error:
        raise TagError(
            f"cannot derive the tag of task {task.name!r} from {path!r}: {error}"
        ) from None
    bound.apply_defaults()
    arguments: Mapping[str, Any] = bound.arguments
    return arguments


def derive_tag(task: Any, args: Any, kwargs: Any) -> str:
    """The tag of a call, from the task's `tag_from`.

    Raises:
        TagError: If the task has none, or what it yields cannot be a tag.
    """
    tag_from = getattr(task, "affinity_tag_from", None)
    if tag_from is None:
        raise MissingTagError(
            f"task {task.name!r} was called without a tag: pass apply_async(..., identify_tag=...) "
            "or declare @affinity_task(tag_from=...)"
        )
    args, kwargs = args or (), kwargs or {}
    found = (
        tag_from(*args, **kwargs) if callable(tag_from) else _argument(task, tag_from, args, kwargs)
    )
    if found is None:
        raise MissingTagError(
            f"task {task.name!r}: its tag_from yields None for this call: pass "
            "apply_async(..., identify_tag=...)"
        )
    try:
        return tag_text(found)
    except TagError as error:
        source = f"tag_from={tag_from!r}" if isinstance(tag_from, str) else "tag_from"
        raise TagError(f"task {task.name!r}, {source}: {error}") from None
