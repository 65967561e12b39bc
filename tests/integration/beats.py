"""Beats of one app in this process, over each kind of scheduler, and what they have published."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import django
from celery import Celery
from django.conf import settings as django_settings

from celery_affinity import Affinity, AffinityQueue
from celery_affinity.beat import AffinityBeat, AffinityScheduler
from celery_affinity.embedded import Server
from celery_affinity.keys import Keys
from harness import wait_until

SECOND = 1_000_000
#: An entry whose runs are to be seen as soon as they are published.
ORDINARY: dict[str, Any] = {"task": "plain", "args": []}


class Died(BaseException):
    """Stands for the end of a process."""


def die(*args: object, **kwargs: object) -> None:
    raise Died


def tick(tag: str) -> None: ...


def plain() -> None: ...


class Beats:
    """Beats of one app, and what they have published."""

    def __init__(self, server: Server, cls: type[Any]) -> None:
        self.cls = cls
        self.app = Celery("shop", broker=server.url())
        self.app.conf.update(
            task_default_queue="plain", task_ignore_result=True, redbeat_redis_url=server.url()
        )
        self.affinity = Affinity(self.app, queues=[AffinityQueue("jobs")], leader_ttl=1.0)
        self.affinity.task(queue="jobs", tag_from="tag", name="tick")(tick)
        self.app.task(name="plain")(plain)
        self.app.set_current()
        self.client = server.client()
        self.keys = Keys("default")
        self.state = Keys.beat_state("shop")
        self.alive: list[Any] = []

    def schedule(self, **entries: Any) -> None:
        """Set the app's entries."""
        self.app.conf.beat_schedule = {
            name: {"task": "tick", "schedule": 1.0, "args": ["a"], **options}
            for name, options in entries.items()
        }

    def beat(self) -> Any:
        scheduler = self.cls(app=self.app)
        self.alive.append(scheduler)
        return scheduler

    def kill(self, scheduler: Any) -> None:
        """As if its process were gone, and its term over."""
        self.alive.remove(scheduler)
        self.client.delete(self.keys.queue(self.state, "leader"))
        self.affinity.stop_scheduling()

    def admitted(self) -> list[dict[str, Any]]:
        """Headers of what the ledger holds, in the order of admission."""
        held: Any = self.client.hgetall(self.keys.queue("jobs", "m"))
        return [json.loads(held[entry])["headers"] for entry in sorted(held, key=int)]

    def plain(self) -> list[dict[str, Any]]:
        """Headers of what waits in the ordinary queue, in the order of publishing."""
        found: Any = self.client.lrange("plain", 0, -1)
        return [json.loads(raw)["headers"] for raw in reversed(found)]

    def unsent(self) -> dict[str, int]:
        found: Any = self.client.hgetall(self.keys.queue(self.state, "unsent"))
        return {name.decode(): int(due) for name, due in found.items()}

    def record(self, name: str) -> tuple[int, str]:
        found: Any = self.client.hget(self.keys.queue(self.state, "runs"), name)
        due, mark = found.decode().split()
        return int(due), mark

    def age(self, name: str, seconds: float) -> int:
        """Have the last run of an entry been so many seconds ago; its due time then."""
        due = time.time_ns() // 1000 - int(seconds * SECOND)
        record = f"{due} {self.record(name)[1]}"
        self.client.hset(self.keys.queue(self.state, "runs"), name, record)
        return due


class Plain(AffinityScheduler):
    """Of Celery's own entries."""


# At import: pytest-celery looks at every object of the process, and unconfigured settings object.
if not django_settings.configured:
    django_settings.configure(
        INSTALLED_APPS=["django_celery_beat"], USE_TZ=True,
        DATABASES={"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": ":memory:"}},
    )
    django.setup()


def redbeat() -> type[Any]:
    from redbeat import RedBeatScheduler

    return type("OverRedBeat", (AffinityBeat, RedBeatScheduler), {})


def database(tmp_path: Path) -> type[Any]:
    from django.core.management import call_command

    call_command("migrate", verbosity=0)
    call_command("flush", verbosity=0, interactive=False)
    from django_celery_beat.schedulers import DatabaseScheduler

    return type("OverDatabase", (AffinityBeat, DatabaseScheduler), {})


KINDS = {"celery": lambda _: Plain, "redbeat": lambda _: redbeat(), "django": database}


def tick_until(scheduler: Any, done: Callable[[], Any], timeout: float = 20.0) -> None:
    """As `celery beat` does, without its sleeps."""
    wait_until(lambda: (scheduler.tick(), done())[1], timeout)


def due(headers: dict[str, Any]) -> int:
    return round(datetime.fromisoformat(headers["affinity_due"]).timestamp() * SECOND)


def steps(found: list[dict[str, Any]]) -> set[int]:
    return {due(later) - due(earlier) for earlier, later in pairwise(found)}
