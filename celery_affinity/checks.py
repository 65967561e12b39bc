"""What of a worker's Celery settings makes no sense with affinity queues.

docs/celery_settings.md says of each setting what it means there; here is what stops the start, and
what is worth a warning.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from celery.concurrency import get_implementation

from celery_affinity.exceptions import ConfigurationError

__all__ = ("refuse_settings", "warnings_of")

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


def warnings_of(worker: Any) -> list[str]:
    """What this worker's affinity tasks ask for and do not get, a sentence each."""
    tasks = [task for task in worker.app.tasks.values() if hasattr(task, "affinity_tag_from")]
    return [*_ignored_limits(worker, tasks), *_ignored_acks(tasks)]


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


def _names(tasks: Iterable[Any], wanted: Callable[[Any], object]) -> str:
    return ", ".join(sorted(repr(task.name) for task in tasks if wanted(task)))
