"""What of a worker's Celery settings makes no sense with affinity queues.

docs/celery_settings.md says of each setting what it means there; here is what stops the start, and
what is worth a warning.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from difflib import get_close_matches
from typing import Any

from celery.concurrency import get_implementation

from celery_affinity.exceptions import ConfigurationError
from celery_affinity.routing import usual_queue

__all__ = ("refuse_settings", "serves_none", "warnings_of")

#: Pools, by the module of their class, and the time limits that they do not keep.
IGNORED_LIMITS = {
    "thread": ("time_limit", "soft_time_limit"),
    "solo": ("time_limit", "soft_time_limit"),
    "gevent": ("soft_time_limit",),
    "eventlet": ("soft_time_limit",),
}


def refuse_settings(worker: Any) -> None:
    """Stop a worker of affinity queues that could not keep their promises.

    Arguments:
        worker: Celery's WorkController, at its ``worker_init`` signal.

    Raises:
        ConfigurationError: It says what to change.
    """
    conf = worker.app.conf
    if conf.get("worker_disable_prefetch"):
        raise ConfigurationError(
            "worker_disable_prefetch (--disable-prefetch) on a worker of an affinity queue: a task "
            "that waits behind its tag's running one would keep the other slots from getting "
            "theirs. Leave it out: the ledger sends a slot at most one message beyond the one that "
            "runs"
        )
    if conf.task_protocol == 1:
        raise ConfigurationError(
            "task_protocol is 1, expected 2: messages of protocol 1 have no headers, so no tag"
        )


def serves_none(
    app: Any, declared: Sequence[str], consumed: Sequence[str]
) -> tuple[str, bool]:
    """What is said of a worker that serves no affinity queue, and whether a name was mistyped.

    Otherwise such a worker is in order.
    """
    ours, theirs = (", ".join(map(repr, names)) or "none" for names in (declared, consumed))
    text = f"This worker serves no affinity queue (declared: {ours}; consumed: {theirs})"
    for name in consumed:
        near = get_close_matches(name, declared, n=1, cutoff=0.8)
        if near and not _is_used(app, name):
            return f"{text}; did you mean {near[0]!r} by {name!r}?", True
    return f"{text}.", False


def _is_used(app: Any, name: str) -> bool:
    """Whether the app declares a queue of that name, or has a task that goes there."""
    own = {getattr(queue, "name", queue) for queue in app.conf.task_queues or ()}
    return name in own or any(_queue_of(task) == name for task in app.tasks.values())


def _queue_of(task: Any) -> str:
    """Where calls of an ordinary task go that do not say where."""
    queue = getattr(task, "queue", None) or usual_queue(task)
    return str(getattr(queue, "name", queue) or task._get_app().conf.task_default_queue)


def warnings_of(worker: Any) -> list[str]:
    """What this worker's tasks ask for and do not get in affinity queues, a sentence each."""
    every = list(worker.app.tasks.values())
    tasks = [task for task in every if hasattr(task, "affinity_tag_from")]
    return [
        *_ignored_limits(worker, tasks),
        *_ignored_acks(tasks),
        *_untagged(worker.app, every),
        *_results_that_halt(worker.app),
    ]


def _ignored_limits(worker: Any, tasks: Iterable[Any]) -> Iterator[str]:
    pool = get_implementation(worker.pool_cls).__module__.rpartition(".")[2]
    for name in IGNORED_LIMITS.get(pool, ()):
        limited = _names(tasks, lambda task: getattr(task, name, None))  # noqa: B023
        if getattr(worker, name, None):
            limited = "all tasks"
        if limited:
            yield (
                f"{name} of {limited} has no effect on the {pool} pool: a task that hangs keeps "
                "its tag. Use prefork, or timeouts inside the task."
            )


def _ignored_acks(tasks: Iterable[Any]) -> Iterator[str]:
    if names := _names(tasks, lambda task: getattr(task, "retry_on_worker_lost", None)):
        yield (
            f"retry_on_worker_lost of {names} has no effect on an affinity queue: the ledger runs "
            "a task again whose process was lost, max_deliveries times."
        )
    for name in ("acks_on_failure", "acks_on_timeout", "acks_on_failure_or_timeout"):
        given_back = _names(
            tasks,
            lambda task: task.acks_late and getattr(task, name, None) is False,  # noqa: B023
        )
        if given_back:
            yield (
                f"{name}=False of {given_back} has no effect on an affinity queue: a task that has "
                "failed or was over its limit is done. Use autoretry_for, or raise "
                "Reject(requeue=True)."
            )


def _untagged(app: Any, tasks: Iterable[Any]) -> Iterator[str]:
    refusing = {
        name
        for queue in app.celery_affinity.settings.queues
        if queue.untagged == "error"
        for name in (queue.name, queue.pending)
    }
    ordinary = [
        task
        for task in tasks
        if not (hasattr(task, "affinity_tag_from") or task.name.startswith("celery."))
        and _queue_of(task) in refusing
    ]
    if ordinary:
        names = _names(ordinary, lambda task: True)
        yield (
            f"ordinary tasks go to an affinity queue: {names}. Without a tag each is buried: "
            "declare it with @affinity_task, or send it elsewhere."
        )


def _results_that_halt(app: Any) -> Iterator[str]:
    conf = app.conf
    backend = str(conf.result_backend or "")
    if not backend.startswith(("redis", "sentinel")) or conf.task_ignore_result:
        return
    if conf.result_backend_always_retry:
        return
    names = [q.name for q in app.celery_affinity.settings.queues if q.on_failure != "skip"]
    if names:
        yield (
            "a task whose result cannot be stored has failed, and so halts its tag in "
            f"{', '.join(map(repr, names))} (on_failure): set result_backend_always_retry = True, "
            "so that results wait for a Redis that restarts."
        )


def _names(tasks: Iterable[Any], wanted: Callable[[Any], object]) -> str:
    return ", ".join(sorted(repr(task.name) for task in tasks if wanted(task)))
