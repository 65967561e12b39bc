"""Virtual time, threads and pipes for the production modules that the actors run."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from celery_affinity import (
    burials,
    evacuation,
    leadership,
    patience,
    reporter,
    rescuer,
    scheduler,
    starts,
    watchdog,
)

if TYPE_CHECKING:
    from .world import World

__all__ = ("FakeClient", "SimDoorbell", "installed")


class Time:
    """`time` of a module: the world's monotonic clock."""

    CLOCK_BOOTTIME = CLOCK_MONOTONIC = 0

    def __init__(self, world: World) -> None:
        self._world = world

    def monotonic(self) -> float:
        return self._world.now / 1e6

    def clock_gettime(self, clock: int) -> float:
        return self._world.now / 1e6

    def time(self) -> float:
        return self._world.redis_us / 1e6

    def sleep(self, seconds: float) -> None:
        self._world.sleep(seconds)


class Pipes:
    """`os` and `wait_readable` of a module, as far as a self-pipe needs them."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._next = 2
        self._rung: set[int] = set()

    def getpid(self) -> int:
        return 1

    def pipe(self) -> tuple[int, int]:
        self._next += 2
        return self._next, self._next + 1

    def set_blocking(self, fd: int, blocking: bool) -> None:
        pass

    def write(self, fd: int, data: bytes) -> None:
        self._rung.add(fd - 1)

    def read(self, fd: int, size: int) -> bytes:
        self._rung.discard(fd)
        return b"!"

    def wait_readable(self, files: Sequence[int], seconds: float) -> list[int]:
        (fd,) = files
        if seconds > 0:
            self._world.wait_until(lambda: fd in self._rung, seconds)
        return [fd] if fd in self._rung else []


class Event:
    """`threading.Event`."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._set = False

    def set(self) -> None:
        self._set = True

    def is_set(self) -> bool:
        return self._set

    def wait(self, seconds: float) -> bool:
        self._world.wait_until(lambda: self._set, seconds)
        return self._set


class Thread:
    """`threading.Thread`: an actor beside the one that starts it, which dies with it."""

    def __init__(self, world: World, target: Any, args: tuple[Any, ...], name: str) -> None:
        self._world = world
        self._run = lambda: target(*args)
        self._name = name
        self._actor: Any = None

    def start(self) -> None:
        me = self._world.me
        self._actor = self._world.spawn(f"{me.group.name}.{self._name}", me.group, self._run)
        self._actor.crash = me.crash

    def is_alive(self) -> bool:
        return self._actor is not None and bool(self._actor.alive)


class SimDoorbell:
    """`Doorbell`: wakes while one of its lists holds something."""

    def __init__(self, world: World, lists: Sequence[str]) -> None:
        self._world = world
        self._vacancy = len(lists) == 1
        self._rung = False

    def ring(self) -> None:
        self._rung = True

    def wait(self, seconds: float) -> bool:
        self._world.wait_until(self._ready, max(0.0, seconds))
        self._rung, rung = False, self._rung
        return rung or self._ready()

    def _ready(self) -> bool:
        w = self._world
        return self._rung or (w.vacant if self._vacancy else w.arrivals)

    def close(self) -> None:
        pass


class FakeClient:
    """What the scheduler asks of the Redis client itself."""

    def __init__(self, world: World) -> None:
        self._world = world
        self.connection_pool = SimpleNamespace(
            connection_kwargs={}, connection_class=object, release=lambda connection: None,
            get_connection=lambda: SimpleNamespace(host="simulated", port=0),
        )  # fmt: skip

    def info(self, section: str = "") -> dict[str, Any]:
        self._world.pause()
        return {
            "redis_version": "7.2.0", "maxmemory_policy": "noeviction", "maxmemory": 0,
            "aof_enabled": 1, "run_id": "one", "uptime_in_seconds": 10**6,
        }  # fmt: skip

    def llen(self, key: str) -> int:
        """Nothing is carried from another broker here: inboxes are empty."""
        return 0

    def lrange(self, key: str, first: int, last: int) -> Any:
        self._world.pause()
        return self._world.ledger.command("LRANGE", key, first, last)

    def zrange(self, key: str, first: int, last: int, withscores: bool) -> list[tuple[bytes, float]]:
        self._world.pause()
        found = self._world.ledger.command("ZRANGE", key, first, last, "WITHSCORES")
        return [(member, float(score)) for member, score in zip(found[::2], found[1::2], strict=True)]

    def hget(self, key: str, field: Any) -> Any:
        self._world.pause()
        return self._world.ledger.command("HGET", key, field)

    def hkeys(self, key: str) -> Any:
        self._world.pause()
        return self._world.ledger.command("HKEYS", key)

    def hmget(self, key: str, fields: Any) -> Any:
        self._world.pause()
        return self._world.ledger.command("HMGET", key, *fields)

    def clock(self) -> tuple[str, float]:
        """Its run id and time: one round trip."""
        self._world.pause()
        self._world.looked_at_clock()
        return "one", self._world.redis_us / 1e6


@contextmanager
def installed(world: World) -> Iterator[None]:
    """The production modules live in this world until the block ends."""
    pipes = Pipes(world)
    patches: list[tuple[Any, str, Any]] = [
        (module, "time", Time(world))
        for module in (burials, evacuation, leadership, patience, reporter, rescuer, scheduler, starts, watchdog)
    ]
    patches += [(rescuer, "server_clock", lambda client, key: client.clock())]
    patches += [(reporter, "os", pipes), (reporter, "wait_readable", pipes.wait_readable)]
    threads = SimpleNamespace(
        Event=lambda: Event(world),
        Thread=lambda target, name, args=(), daemon=True: Thread(world, target, args, name),
    )
    patches += [(burials, "threading", threads), (scheduler, "threading", threads)]
    before = [(module, name, getattr(module, name)) for module, name, _ in patches]
    logger = logging.getLogger("celery_affinity")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        for module, name, value in patches:
            setattr(module, name, value)
        yield
    finally:
        logger.setLevel(level)
        for module, name, value in before:
            setattr(module, name, value)
