"""One affinity queue over three shards, with real workers."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from acceptance.support import (
    APP,
    LEAN,
    QUICK,
    Producer,
    finished,
    start,
    starts_are,
    wait_for_nodes,
)
from celery_affinity.embedded import Server
from celery_affinity.keys import Keys
from celery_affinity.sharding import shard_of
from clusters import RedisCluster
from harness import Cluster, wait_for_ends, wait_until
from history import History

pytestmark = pytest.mark.acceptance

SHARDS = 3
TAGS = [f"tag-{number}" for number in range(12)]


@pytest.fixture(
    params=[
        "same",
        pytest.param("redis", marks=pytest.mark.long),
        pytest.param("rabbitmq", marks=pytest.mark.rabbitmq),
        pytest.param("redis cluster", marks=pytest.mark.servers),
    ]
)
def sharded(
    request: pytest.FixtureRequest,
    aof_server: Server,
    make_cluster: Callable[..., Cluster],
    monkeypatch: pytest.MonkeyPatch,
) -> Cluster:
    """All shards in one Redis, and the broker is that one, another one, or RabbitMQ; or over the
    masters of a Redis Cluster, and the broker is another Redis."""
    ledger = aof_server.url()
    if request.param == "redis cluster":
        redis_cluster = request.getfixturevalue("redis_cluster")
        for server in redis_cluster.masters:  # its failover would take longer than QUICK allows
            server.client().execute_command("ACL", "SETUSER", "default", "-config|get")
        ledger, url = redis_cluster.url, aof_server.url()
    elif request.param == "rabbitmq":
        url = request.getfixturevalue("rabbit").new_virtual_host()
    elif request.param == "redis":
        url = request.getfixturevalue("broker_server").url()
    else:
        url = aof_server.url()
    told = {
        "AFFINITY_REDIS_URL": ledger,
        "AFFINITY_TEST_QUEUE": json.dumps({"shards": SHARDS}),
    }
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    return make_cluster(url, **told)


@pytest.mark.servers
def test_three_shards_of_a_cluster_are_on_several_masters(redis_cluster: RedisCluster) -> None:
    owners = {redis_cluster.owner(Keys("default", shard).prefix).port for shard in range(SHARDS)}
    assert len(owners) > 1, "the laws here are about several servers"


def by_shard(tags: list[str]) -> list[list[str]]:
    return [[tag for tag in tags if shard_of(tag, SHARDS) == shard] for shard in range(SHARDS)]


def test_tags_over_three_shards_lose_double_overlap_and_reorder_nothing(
    sharded: Cluster, history_path: Path
) -> None:
    assert all(by_shard(TAGS)), "the law is about all shards"
    producer = Producer(sharded.broker_url)
    start(sharded, "w1", "w2")
    sharded.wait_ready()
    for _ in range(10):
        producer.send_each(TAGS, 5, ms=2)
    wait_for_ends(history_path, producer.sent)
    history = History.load(history_path)
    history.assert_lawful()  # also: each lease in one process of one node
    assert history.reruns() == 0


def test_three_shards_lose_nothing_when_any_process_dies(sharded: Cluster, history_path: Path) -> None:
    producer = Producer(sharded.broker_url)
    nodes = start(sharded, "w1", "w2", beat=False)
    wait_for_nodes(producer.affinity, 2)
    for number in range(4):
        producer.send_each(TAGS, 5, ms=20)
        wait_until(starts_are(history_path, (number + 1) * 30), what="starts")
        dies = nodes[number % 2]
        dies.kill9()
        producer.send_each(TAGS, 1)
        dies.start()
    finished(history_path, 60)


def test_one_slot_serves_all_shards_in_turn(sharded: Cluster, history_path: Path) -> None:
    """Each shard has a tag that never runs out; none waits for another's end."""
    producer = Producer(sharded.broker_url)
    sharded.worker(APP, queues="jobs", concurrency=1, environ=QUICK, extra=LEAN)
    wait_for_nodes(producer.affinity, 1)
    hot = [tags[0] for tags in by_shard(TAGS)]
    for _ in range(6):
        producer.send_each(hot, 10, ms=20)
    wait_for_ends(history_path, producer.sent)
    history = History.load(history_path)
    history.assert_lawful()
    first: dict[str, int] = {}
    for at, run in enumerate(history.runs):
        first.setdefault(run.tag, at)
    print(f"first starts of {len(hot)} shards among {len(history.runs)}: {first}")
    assert max(first.values()) < len(history.runs) / 2, "a shard waited for the others' end"


@pytest.mark.parametrize("pool, concurrency", [("threads", 3), ("solo", 1), ("gevent", 4)])
def test_on_every_pool_three_shards_lose_and_reorder_nothing(
    sharded: Cluster, history_path: Path, pool: str, concurrency: int
) -> None:
    producer = Producer(sharded.broker_url)
    sharded.worker(APP, queues="jobs", pool=pool, concurrency=concurrency, environ=QUICK, extra=LEAN)
    producer.send_each(TAGS, 10, ms=2)
    wait_for_ends(history_path, producer.sent)
    history = History.load(history_path)
    history.assert_lawful()
    assert history.reruns() == 0


def test_a_free_slot_is_with_the_shard_that_needs_it_within_a_second(
    sharded: Cluster, history_path: Path
) -> None:
    """Tags of one shard only, on a node with a slot for each: all slots work for them."""
    producer = Producer(sharded.broker_url)
    sharded.worker(APP, queues="jobs", concurrency=SHARDS, environ=QUICK, extra=LEAN)
    wait_for_nodes(producer.affinity, 1)
    waits = []
    for number in range(6):
        shard = number % SHARDS
        tags = [f"t{n}" for n in range(100) if shard_of(f"t{n}", SHARDS) == shard]
        sent = time.monotonic_ns()
        producer.send_each(tags[:SHARDS], 1, ms=700)
        wait_for_ends(history_path, producer.sent)
        mine = [run for run in History.load(history_path).runs if run.start > sent]
        waits.append((max(run.start for run in mine) - sent) / 1e9)
    print("the last of three started after", ", ".join(f"{wait:.2f}" for wait in waits), "s")
    assert sorted(waits)[len(waits) // 2] < 1
