"""The test app with periodic tasks, and with tasks that end in every way that Celery knows."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from billiard.process import current_process
from celery import Celery, Task, signals
from celery.exceptions import Ignore, Reject, SoftTimeLimitExceeded

from acceptance.apps.affinity_app import affinity, app, recorded
from celery_affinity import affinity_task
from history import HISTORY_VARIABLE, record

__all__ = ("affinity", "app")

#: Names a server that keeps results and nothing else.
BACKEND_VARIABLE = "AFFINITY_TEST_BACKEND"


def keep_results(app: Celery, url: str) -> None:
    """Keep them there, and give up after some tries while it is away."""
    app.conf.update(
        task_ignore_result=False, result_backend=url,
        result_backend_transport_options={"retry_policy": {"max_retries": 1, "interval_start": 0.1}},
    )


if BACKEND_VARIABLE in os.environ:
    keep_results(app, os.environ[BACKEND_VARIABLE])

app.conf.beat_schedule = {
    "ordinary": {"task": "jobs.plain_work", "schedule": 1.0, "args": ("ordinary tick", 0)},
    "affinity": {"task": "jobs.work", "schedule": 1.0, "args": ("affinity tick", 0)},
}


@affinity_task(queue="jobs", tag_from="tag", bind=True, name="jobs.flaky_later")
def flaky_later(self: Task, tag: str, seq: int, ms: float = 0) -> int:
    """Ask for one retry in a second, then succeed."""
    with recorded(self, tag, seq):
        if not self.request.retries:
            raise self.retry(countdown=1, max_retries=1)
    return seq


@affinity_task(queue="jobs", tag_from="tag", bind=True, name="jobs.ignoring")
def ignoring(self: Task, tag: str, seq: int, ms: float = 0) -> None:
    """Leave no state."""
    with recorded(self, tag, seq):
        raise Ignore()


@affinity_task(queue="jobs", tag_from="tag", bind=True, name="jobs.rejecting")
def rejecting(self: Task, tag: str, seq: int, ms: float = 0) -> None:
    """Refuse the message."""
    with recorded(self, tag, seq):
        raise Reject("not mine")


@affinity_task(queue="jobs", tag_from="tag", bind=True, name="jobs.requeuing")
def requeuing(self: Task, tag: str, seq: int, ms: float = 0) -> int:
    """Give the message back until the tag's backlog has passed by once."""
    with recorded(self, tag, seq):
        requeuing.__dict__["times"] = requeuing.__dict__.get("times", 0) + 1
        if requeuing.__dict__["times"] == 1:
            raise Reject("later", requeue=True)
    return seq


class Strikes(Exception):
    """Has the worker stopped cold by whoever unpickles it: its parent, while it reads a result."""

    def __reduce__(self) -> tuple[object, ...]:
        """Called in the pool process."""
        return strike, ()


def strike() -> Strikes:
    """Called where the exception is unpickled; pool processes do that too, as a trial."""
    if current_process().name == "MainProcess":
        os.kill(os.getpid(), signal.SIGQUIT)
    return Strikes()


@affinity_task(queue="jobs", tag_from="tag", bind=True, name="jobs.striking")
def striking(self: Task, tag: str, seq: int, ms: float = 0) -> None:
    """Fail in a way that stops the worker while it reads of it."""
    with recorded(self, tag, seq):
        raise Strikes


class Hooked(Task):  # type: ignore[misc]
    """A task whose hooks take a while, and are in the history as runs of their tag: seq is HOOK."""

    def before_start(self, task_id: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Called in front of the task."""
        hook(args[0], task_id)

    def on_success(self, retval: Any, task_id: str, args: Any, kwargs: Any) -> None:
        """Called when its result is stored."""
        hook(args[0], task_id)

    def on_retry(self, exc: Any, task_id: str, args: Any, kwargs: Any, einfo: Any) -> None:
        """Called when it is to run again."""
        hook(args[0], task_id)

    def on_failure(self, exc: Any, task_id: str, args: Any, kwargs: Any, einfo: Any) -> None:
        """Called when it has failed; of a time limit in the worker's parent."""
        hook(args[0], task_id)

    def after_return(
        self, status: str, retval: Any, task_id: str, args: Any, kwargs: Any, einfo: Any
    ) -> None:
        """Called last."""
        hook(args[0], task_id)


#: What a hook is in the history.
HOOK = -1


def hook(tag: str, task_id: str) -> None:
    """Take a while, on record."""
    fields = {"tag": tag, "seq": HOOK, "task_id": task_id}
    record("start", **fields)
    try:
        time.sleep(0.02)
    finally:
        record("end", **fields)


@signals.task_prerun.connect
@signals.task_postrun.connect
def around(task_id: str, task: Task, args: Any, **rest: Any) -> None:
    """Called in the process that runs the task; by a process that is terminated, too."""
    if isinstance(task, Hooked):
        hook(args[0], task_id)


class Unpicklable(Exception):
    """An error that cannot be sent to the worker's parent."""

    def __init__(self, what: str, why: object) -> None:
        super().__init__(what)
        self.why = why


def first_time(task_id: str) -> bool:
    """Whether no attempt of this task was here before."""
    path = f"{os.environ[HISTORY_VARIABLE]}.{task_id}"
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


def exhaust_memory() -> None:
    """Ask for more than this process may have: the kernel kills it."""
    group = os.environ.get(CGROUP_VARIABLE)
    if not group:
        os.kill(os.getpid(), signal.SIGKILL)  # what the kernel would do
    with open(f"{group}/cgroup.procs", "w", encoding="ascii") as members:
        members.write(str(os.getpid()))
    held = []
    while True:
        held.append(bytes(bytearray(os.urandom(1)) * (1 << 20)))


#: Names a memory cgroup with a low limit, for processes that are to run out of memory.
CGROUP_VARIABLE = "AFFINITY_TEST_CGROUP"


@affinity_task(queue="jobs", tag_from="tag", bind=True, name="jobs.ending", base=Hooked)
def ending(self: Task, tag: str, seq: int, how: str = "", ms: float = 0, after_ms: float = 0) -> Any:
    """End in the way that is asked for, after a while that signals and limits cut short.

    Arguments:
        after_ms: How long it takes to clean up.
    """
    with recorded(self, tag, seq):
        try:
            deadline = time.monotonic() + ms / 1000
            while time.monotonic() < deadline:
                time.sleep(0.02)
            return WAYS[how](self)
        except SoftTimeLimitExceeded:
            return "limited"
        finally:
            until = time.monotonic() + after_ms / 1000
            while time.monotonic() < until:
                with suppress(SystemExit):  # Celery sends TERM twice
                    time.sleep(0.02)


def _raise(error: BaseException) -> None:
    raise error


def _once(end: Callable[[Task], Any]) -> Callable[[Task], Any]:
    return lambda task: end(task) if first_time(task.request.id) else "again"


#: Ways to end, by name.
WAYS: dict[str, Callable[[Task], Any]] = {
    "": lambda task: "done",
    "failure": lambda task: _raise(ValueError("failed")),
    "unencodable": lambda task: object(),
    "unpicklable error": lambda task: _raise(Unpicklable("odd", open(os.devnull))),  # noqa: SIM115
    "memory error": lambda task: _raise(MemoryError("much")),
    "ignore": lambda task: _raise(Ignore()),
    "reject": lambda task: _raise(Reject("not mine")),
    "requeue": _once(lambda task: _raise(Reject("later", requeue=True))),
    "retry": lambda task: "again" if task.request.retries else task.retry(countdown=0),
    "retries": lambda task: task.retry(countdown=0, max_retries=1, exc=LookupError("gave up")),
    "exit": lambda task: _raise(SystemExit(3)),
    "exit once": _once(lambda task: _raise(SystemExit(3))),
    "kill": lambda task: os.kill(os.getpid(), signal.SIGKILL),
    "kill once": _once(lambda task: os.kill(os.getpid(), signal.SIGKILL)),
    "_exit once": _once(lambda task: os._exit(3)),
    "out of memory once": _once(lambda task: exhaust_memory()),
}
