"""Laws of the figures for monitoring: what they say, and what they cost."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from celery_affinity import AffinityQueue
from celery_affinity.delivery import SameRedisDelivery
from celery_affinity.embedded import Server
from celery_affinity.lua_text import source
from celery_affinity.measures import WAIT_BOUNDS_MS, Measures, QueueMeasures
from celery_affinity.shards import Shards
from celery_affinity.topology import RedisNames

from .conftest import Bench

QUEUE = AffinityQueue("q")
Read = Callable[[], QueueMeasures]


@pytest.fixture
def measures(shared_server: Server, bench: Bench) -> Measures:
    delivery = SameRedisDelivery(RedisNames.from_transport_options({}))
    return Measures(Shards(shared_server.url(), bench.scripts.keys.namespace, delivery))


@pytest.fixture
def read(measures: Measures) -> Read:
    return lambda: measures.read([QUEUE])[0]


def test_the_bounds_of_waits_are_those_of_the_scripts() -> None:
    text = ", ".join(str(bound) for bound in WAIT_BOUNDS_MS)
    assert "{" + text + "}" in source("start")


def test_a_long_queue_of_one_tag_wants_one_slot(bench: Bench, read: Read) -> None:
    bench.opening(*range(50), slots=2)
    found = read()
    assert (found.stats.entries, found.leases, found.startable) == (50, 1, 0)
    assert (found.slots_wanted, found.workers, found.workers_needed) == (1, 1, 1)


def test_each_ready_tag_wants_a_slot_however_much_it_has(bench: Bench, read: Read) -> None:
    bench.opening(1, slots=2)
    for tag in "bcdef":
        bench.send(tag, *range(3))
    bench.admit_all()
    found = read()
    assert (found.leases, found.startable, found.slots_wanted) == (2, 4, 6)
    assert found.workers_needed == 3


def test_a_tag_of_several_wants_the_room_that_it_has_and_no_more_than_waits(
    bench: Bench, read: Read
) -> None:
    bench.lead(concurrency=3, own={"alone": 1, "wide": 10})
    for tag, count in (("alone", 5), ("wide", 7), ("two", 2), ("many", 9)):
        bench.send(tag, *range(count))
    bench.admit_all()
    assert read().startable == 1 + 7 + 2 + 3


def test_the_room_of_many_tags_is_told_from_some(
    bench: Bench, read: Read, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.lead(concurrency=2)
    for tag in range(30):
        bench.send(tag, 1, 2, 3)
    bench.admit_all()
    monkeypatch.setattr("celery_affinity.measures.LOOK", 10)
    assert read().startable == 60


def test_without_a_worker_one_is_needed_if_there_is_anything_to_do(bench: Bench, read: Read) -> None:
    bench.lead()
    assert read().workers_needed == 0
    for tag in "abc":
        bench.send(tag, 1)
    bench.admit_all()
    found = read()
    assert (found.slots_wanted, found.workers_needed) == (3, 1)


def test_what_waits_for_somebody_to_schedule_needs_a_worker(bench: Bench, read: Read) -> None:
    bench.client.lpush("q", "a message")
    try:
        found = read()
        assert found.term is None
        assert (found.stats.pending, found.slots_wanted, found.workers_needed) == (1, 0, 1)
        bench.node("n")
        assert read().workers_needed == 1
    finally:
        bench.client.delete("q")


@pytest.mark.parametrize("flag", ["evac", "paused"])
def test_a_stopped_queue_wants_only_what_still_runs(bench: Bench, read: Read, flag: str) -> None:
    bench.opening(1)
    bench.send("b", 1)
    bench.admit_all()
    bench.client.hset(bench.queue_key("conf"), flag, "1")
    found = read()
    assert (found.stopped, found.slots_wanted, found.workers_needed) == (True, 1, 1)


def test_a_worker_that_drains_is_not_counted_but_its_leases_are(bench: Bench, read: Read) -> None:
    node = bench.opening(1)
    node.take().start()
    bench.scripts.drain("n", 10)
    found = read()
    assert (found.workers, found.leases) == (0, 1)


def test_the_oldest_wait_is_that_of_the_first_tag_in_the_ring(bench: Bench, read: Read) -> None:
    bench.opening(1)
    assert read().oldest_wait == 0.0
    bench.send("b", 1)
    bench.send("c", 1)
    bench.admit_all()
    assert 0.0 <= read().oldest_wait < 30
    bench.client.zincrby(bench.queue_key("ring"), -60_000_000, "b")
    assert 60 <= read().oldest_wait < 90


def test_waits_are_cumulative_up_to_their_bounds(bench: Bench, read: Read) -> None:
    bench.client.hset(
        bench.queue_key("c"), mapping={"wait:5": 3, "wait:1000": 2, "wait:inf": 1, "wait:sum": 4500}
    )
    found = read()
    waits = dict(found.waits)
    assert (waits[0.005], waits[0.5], waits[1.0], waits[1800.0], waits[float("inf")]) == (
        3, 3, 5, 5, 6,
    )
    assert found.waited == 4.5


def test_the_longest_backlogs_come_first_and_are_no_more_than_asked_for(
    bench: Bench, measures: Measures
) -> None:
    bench.lead()
    for tag, count in (("a", 1), ("b", 5), ("c", 3)):
        bench.send(tag, *range(count))
    bench.admit_all()
    (found,) = measures.read([QUEUE], top=2)
    assert [(record.tag, record.waiting) for record in found.top] == [("b", 5), ("c", 3)]
    assert measures.read([QUEUE])[0].top == ()


def test_a_reading_costs_the_same_however_many_tags_wait(bench: Bench, read: Read) -> None:
    bench.lead()
    read()  # which connects
    costs = []
    for _ in range(2):
        before = bench.client.info("stats")["total_commands_processed"]
        read()
        costs.append(bench.client.info("stats")["total_commands_processed"] - before - 1)
        for tag in range(300):
            bench.send(tag, 1)
        bench.admit_all()
    assert costs[0] == costs[1] <= 30, costs
