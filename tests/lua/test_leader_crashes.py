"""A leader that dies between any two of its Redis commands, or when one was done and not answered."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count
from typing import Any

import pytest
from redis import Redis

from celery_affinity.burials import Burials
from celery_affinity.doorbell import Doorbell
from celery_affinity.embedded import Server
from celery_affinity.intake import Intake, no_tag
from celery_affinity.keys import Keys
from celery_affinity.leadership import Elector
from celery_affinity.rescuer import Rescuer
from celery_affinity.scheduler import Scheduler
from celery_affinity.scripts import Scripts
from celery_affinity.settings import AffinityQueue

from .conftest import Bench, Node

QUEUE = AffinityQueue("q")


class Killed(BaseException):
    """Its process has ended: nothing catches this, nothing is cleaned up."""


class Failpoint:
    """Ends the process at its k-th command: before it is sent, or after its reply is lost."""

    def __init__(self, at: int, done: bool) -> None:
        self.at = at
        self.done = done
        self.sent = 0

    def reached(self) -> bool:
        return self.sent >= self.at


def dying_client(server: Server, failpoint: Failpoint) -> Redis:
    client = server.client()
    real = client.execute_command

    def execute_command(*args: Any, **options: Any) -> Any:
        if failpoint.reached():
            raise Killed
        failpoint.sent += 1
        if not failpoint.reached():
            return real(*args, **options)
        if failpoint.done:
            real(*args, **options)
        raise Killed

    client.execute_command = execute_command  # type: ignore[method-assign]
    return client


class Told:
    """Whoever waits for the results of what was buried."""

    def __init__(self) -> None:
        self.reasons: list[str] = []

    def __call__(self, message: Any, reason: str) -> None:
        self.reasons.append(reason)


class OneThread(Burials):
    """Tells in the leader's own thread, so that each of its commands comes in its turn."""

    def start(self, fence: str) -> None:
        self.run(fence)


def leader(client: Redis, bench: Bench, name: str, told: Told) -> Scheduler:
    scripts = Scripts(client, bench.scripts.keys)
    rescuer = Rescuer(scripts, "q", 5.0)
    rescuer._clock_moved = lambda: False  # type: ignore[method-assign]  # it has been looking on
    return Scheduler(
        scripts, QUEUE, Elector(scripts, "q", name, 60.0),
        Intake(scripts, "q", [bench.pending], no_tag), rescuer, OneThread(scripts, "q", told),
        lambda lists: Doorbell(bench.client, lists), [bench.pending],
    )  # fmt: skip


def full_of_work(bench: Bench) -> Node:
    """Something of everything that a leader does in a pass; the node that lives."""
    bench.lead(candidate="earlier/1")
    lost = bench.node("lost", slots=2, depth=2)
    bench.send("a", *range(3))
    bench.send("b", *range(3))
    bench.admit()
    node = bench.node("n", slots=2, depth=2)
    while copy := lost.receive():
        copy.start()
    bench.scripts.resign("q", bench.fence)
    bench.overdue("lost")
    bench.send("due", 0, eta="2020-01-01T00:00:00+00:00")
    bench.send("a", 3)
    bench.send_untagged("is buried")
    bench.send("b", 3)
    bench.send("c", *range(3))
    return node


def pass_until_idle(scheduler: Scheduler) -> None:
    """Passes until nothing is left for a leader; then its process may stop."""
    waits = iter(range(2))

    def wait(seconds: float) -> bool:
        if next(waits, None) is None:
            scheduler._stopping.set()
        return True

    scheduler._arrivals.wait = wait  # type: ignore[method-assign]
    scheduler.run()


def life(server: Server, bench: Bench, failpoint: Failpoint) -> Told:
    """A leader that dies at the failpoint, and its successor."""
    told = Told()
    first = leader(dying_client(server, failpoint), bench, "first/1", told)
    try:
        pass_until_idle(first)
    except Killed:
        bench.client.delete(bench.queue_key("leader"))  # its term has run out
    pass_until_idle(leader(server.client(), bench, "second/1", told))
    return told


@pytest.fixture
def benches(shared_server: Server, namespace: str) -> Iterator[Iterator[Bench]]:
    client = shared_server.client()
    numbers = count()
    yield (
        Bench(client, Scripts(client, Keys(f"{namespace}-{number}"))) for number in numbers
    )
    for key in client.scan_iter(match="{affinity:" + namespace + "*", count=1000):
        client.delete(key)


@pytest.mark.parametrize("done", [False, True], ids=["before it", "its reply lost"])
@pytest.mark.proves("7: a leader is killed at each of its commands", "its successor finishes; nothing lost or doubled")
def test_a_leader_that_dies_at_any_command_leaves_nothing_undone(
    shared_server: Server, benches: Iterator[Bench], done: bool
) -> None:
    for at in count(1):
        bench = next(benches)
        failpoint = Failpoint(at, done)
        node = full_of_work(bench)
        told = life(shared_server, bench, failpoint)
        ran: dict[str, list[str]] = {}
        while copy := node.receive():
            if copy.start() == 1:
                ran.setdefault(copy.tag, []).append(copy.id)
                copy.settle()
        where = f"killed at command {at} of {failpoint.sent}"
        assert ran == {
            "a": [f"a-{n}" for n in range(4)], "b": [f"b-{n}" for n in range(4)],
            "c": [f"c-{n}" for n in range(3)], "due": ["due-0"],
        }, where  # fmt: skip
        assert bench.client.hlen(bench.queue_key("m")) == 0, where
        assert len(bench.dead()) == 1 and len(told.reasons) in (1, 2), where
        assert not bench.client.exists(bench.queue_key("untold"), bench.pending), where
        if not failpoint.reached():
            print(f"{at - 1} commands of a leader with something of everything to do")
            assert at > 15
            return
