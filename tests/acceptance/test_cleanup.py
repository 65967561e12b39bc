"""No leak: what an idle system and stopped workers leave behind, and what can be seen of them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from redis import Redis

from acceptance.support import (
    APP,
    LEAN,
    QUICK,
    WORKER_ONLY,
    Producer,
    finished,
    keys_with,
    slots,
    start,
    starts_are,
    wait_for_nodes,
    wait_for_run,
)
from celery_affinity.embedded import Server
from celery_affinity.types import SlotRecord
from harness import Cluster, wait_for_ends, wait_until
from history import History
from pools import long

pytestmark = pytest.mark.acceptance

#: Of the ledger, without any work and any worker: counters, settings, the layout's version,
#: the bounded memory of where tags ran and how fast they were, doorbells.
LASTING = re.compile(
    r"\{affinity:default\}:(schema|q:jobs:(c|conf|warm|warmz|wake|vacant|leader|pace)"
    r"|q:\"beat:affinity_app\":(c|runs|vacant|leader))"  # of the beats, and last runs
)


@pytest.fixture
def redis(server: Server) -> Redis:
    return server.client()


def names(redis: Redis) -> set[str]:
    return {key.decode() for key in redis.keys("*")}


def assert_nothing_of_workers(redis: Redis, incarnations: list[str]) -> None:
    """No key, no binding and no queue of them; and of the ledger only what is to last."""
    left = names(redis)
    assert not [key for key in left if "jobs.worker" in key], left
    assert not keys_with(redis, "jobs.worker"), "not in a binding table either"
    for incarnation in incarnations:
        # The warm memory may still name a slot of it; it is bounded, and a hint only.
        assert not keys_with(redis, incarnation, but=(":warm",))
    of_ledger = {key for key in left if key.startswith("{affinity")}
    assert all(LASTING.fullmatch(key) for key in of_ledger), of_ledger


def test_an_idle_system_holds_no_key_for_any_tag(
    cluster: Cluster, history_path: Path, producer: Producer, redis: Redis
) -> None:
    start(cluster, "w1", "w2")
    wait_for_nodes(producer.affinity, 2)
    cluster.wait_ready()  # Celery's own bindings come after the registration
    before = names(redis)
    tags = [f"sought-{number}" for number in range(25)]
    producer.send("sought-later", 2, countdown=1)
    wait_until(lambda: len(keys_with(redis, "sought")) >= 2, what="keys of the tags")
    producer.send_each(tags, 4, ms=1)
    producer.send_each(tags, 2)
    producer.send("sought-flaky", 3, task="flaky")
    producer.send("sought-boom", 3, task="boom")

    wait_for_ends(history_path, producer.sent + 3)
    History.load(history_path).assert_lawful()
    wait_until(lambda: producer.affinity.stats("jobs").entries == 0, what="the last settle")
    wait_until(lambda: all(slot.status == "idle" for slot in slots(producer.affinity)))
    assert not keys_with(redis, "sought", but=(":warm", ":warmz"))
    assert redis.hlen("{affinity:default}:q:jobs:warm") == len(tags) + 3
    # Beside those of the tags the work left no key at all, except what the slots keep of their
    # last settle, and the pending queue's binding. (The leader's question who consumes what has a
    # reply queue for as long as it is under way.)
    allowed = r"\{affinity:default\}:(s:<inc>:\d|w:<inc>:idle|q:jobs:\w+)|_kombu\.binding\w*\.jobs"

    def unexpected() -> list[str]:
        new = {re.sub(r"[0-9a-f]{32}", "<inc>", key) for key in names(redis) - before}
        return sorted(key for key in new if not re.fullmatch(allowed, key))

    wait_until(lambda: not unexpected(), what="the end of keys that are not to last")
    stats = producer.affinity.stats("jobs")
    assert (stats.pending, stats.scheduled, stats.ready_tags, stats.held_tags) == (0, 0, 0, 0)
    assert stats.admitted == producer.sent


@pytest.mark.proves(
    "4: workers are stopped or killed",
    "no key, binding or queue of them is left",
)
@pytest.mark.parametrize("how", ["stopped", "killed"])
def test_workers_that_are_gone_leave_no_key_no_binding_and_no_queue(
    cluster: Cluster, history_path: Path, producer: Producer, redis: Redis, how: str
) -> None:
    nodes = start(cluster, "w1", "w2")
    wait_for_nodes(producer.affinity, 2)
    incarnations = [worker.worker_id for worker in producer.affinity.workers()]
    assert all(keys_with(redis, incarnation) for incarnation in incarnations)
    producer.send_each([f"tag-{number}" for number in range(8)], 10, ms=30)
    wait_until(starts_are(history_path, 10), what="10 starts")

    for node in nodes:
        node.term() if how == "stopped" else node.destroy()
    if how == "stopped":
        assert [node.wait() for node in nodes] == [0, 0]
    else:
        wait_for_nodes(producer.affinity, 0, timeout=10)
        # Work waits: the backlogs stay, and nothing of the workers does.
        assert producer.affinity.stats("jobs").entries > 0
    # A new worker finishes the work and goes, too.
    late = cluster.worker(
        APP, "w3", queues="jobs", concurrency=2, environ={**QUICK, **WORKER_ONLY}, extra=LEAN
    )
    wait_for_nodes(producer.affinity, 1)
    incarnations += [worker.worker_id for worker in producer.affinity.workers()]
    finished(history_path)
    late.term()
    assert late.wait() == 0
    cluster.nodes[2].term()
    assert cluster.nodes[2].wait() == 0

    assert_nothing_of_workers(redis, incarnations)
    print("left:", sorted(names(redis)))


@pytest.mark.parametrize("pool, concurrency", [("prefork", 2), ("threads", 2), pytest.param("solo", 1, marks=long), pytest.param("gevent", 2, marks=long)])
def test_workers_are_seen_idle_then_running_then_idle(
    cluster: Cluster, history_path: Path, producer: Producer, pool: str, concurrency: int
) -> None:
    cluster.worker(
        APP, queues="jobs", pool=pool, concurrency=concurrency, environ=QUICK, extra=LEAN
    )
    affinity = producer.affinity
    wait_for_nodes(affinity, 1)
    (worker,) = affinity.workers()
    assert (worker.name, worker.status, worker.queues) == ("w1@test", "idle", ("jobs",))
    assert [(slot.index, slot.status) for slot in worker.slots] == [
        (index, "idle") for index in range(concurrency)
    ]

    producer.send("busy", 3, ms=600)
    wait_for_run(history_path, lambda run: run.seq == 1)
    (worker,) = affinity.workers()
    seen = {slot.current_identify_tag: slot for slot in worker.slots}
    assert worker.status == "running"
    assert_running(seen["busy"], concurrency, pool)
    if concurrency > 1:
        assert (seen[None].status, seen[None].current_batch_size) == ("idle", 0)

    wait_for_ends(history_path, 3)
    wait_until(lambda: affinity.workers()[0].status == "idle", what="idle again")
    assert {(slot.status, slot.current_identify_tag, slot.current_batch_size) for slot in slots(affinity)} == {
        ("idle", None, 0)
    }


def assert_running(slot: SlotRecord, concurrency: int, pool: str) -> None:
    assert slot.status == "running"
    assert slot.queue == "jobs"
    # The second task runs; on prefork the third is already waiting at the process.
    assert slot.current_batch_size == (3 if pool == "prefork" else 2)
    assert slot.epoch is not None
    assert slot.running_entry == 2


@pytest.mark.proves(
    "4: a worker dies while it starts",
    "no key, binding or queue of it is left",
)
def test_a_worker_that_dies_while_it_starts_leaves_nothing(
    cluster: Cluster, producer: Producer, redis: Redis
) -> None:
    start(cluster, "w1")
    wait_for_nodes(producer.affinity, 1)
    dying = cluster.worker(
        "acceptance.apps.dying", "w2", queues="jobs", environ={**QUICK, **WORKER_ONLY}, extra=LEAN
    )

    assert dying.wait(40) == -9

    assert keys_with(redis, "jobs.worker.w2@test"), "its queue was declared"
    wait_until(lambda: not keys_with(redis, "jobs.worker.w2@test"), 20, "the end of its keys")
    assert [worker.name for worker in producer.affinity.workers()] == ["w1@test"]
