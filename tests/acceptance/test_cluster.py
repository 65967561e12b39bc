"""The ledger in a Redis Cluster, the broker elsewhere: its slot moves, its master is killed, under load."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from acceptance.support import (
    APP,
    LEAN,
    QUICK,
    WORKER_ONLY,
    Producer,
    assert_nobody_was_given_up,
    finished,
    start_under_a_beat,
    starts_are,
    wait_for_run,
)
from brokers import CLUSTERED, LEDGER_VARIABLE
from celery_affinity.embedded import Server
from celery_affinity.keys import Keys
from clusters import RedisCluster, call
from harness import Cluster, wait_until
from history import History

pytestmark = [pytest.mark.acceptance, pytest.mark.servers]

TAGS = [f"tag-{number}" for number in range(6)]
#: Seconds; a failover takes longer than QUICK's.
HEARTBEAT_TIMEOUT = 6
SLOW = {**QUICK, "AFFINITY_HEARTBEAT_TIMEOUT": f"{HEARTBEAT_TIMEOUT}", "AFFINITY_HEARTBEAT_INTERVAL": "1"}
PREFIX = Keys("default").prefix


def start(cluster: Cluster) -> Producer:
    producer = Producer(cluster.broker_url)
    start_under_a_beat(cluster, producer, SLOW)
    return producer


@contextmanager
def load(producer: Producer) -> Iterator[None]:
    """Tasks of each tag, all the time."""
    over = threading.Event()

    def send() -> None:
        while not over.wait(0.02):
            producer.send_each(TAGS, ms=20)

    thread = threading.Thread(target=send)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def wait_for_starts(history_path: Path, count: int) -> None:
    """Wait until so many more tasks have started."""
    now = len(History.load(history_path).runs)
    wait_until(starts_are(history_path, now + count), what=f"{count} more starts")


@pytest.fixture
def with_replicas(tmp_path: Path) -> Iterator[RedisCluster]:
    found = RedisCluster(tmp_path / "cluster", replicas=True)
    yield found
    found.close()


@pytest.mark.proves("the ledger's slot of a Redis Cluster moves under load, key by key, with a pause longer than heartbeat_timeout", "a new term, nobody is given up, nothing lost or doubled, in order")
@pytest.mark.parametrize(
    "broker", [CLUSTERED[0], pytest.param(CLUSTERED[1], marks=pytest.mark.rabbitmq)], indirect=True
)
def test_a_slot_that_moves_under_load_starts_a_new_term_and_gives_nobody_up(
    redis_cluster: RedisCluster, cluster: Cluster, history_path: Path
) -> None:
    producer = start(cluster)
    before = producer.affinity.leader("jobs")
    target = redis_cluster.owner(PREFIX)
    producer.send("long", task="long", ms=(2 * HEARTBEAT_TIMEOUT + 2) * 1000)
    wait_for_run(history_path, lambda run: run.tag == "long")
    with load(producer):
        wait_until(starts_are(history_path, 100), what="some load")
        # Away in one go, then back by halves: a script that went there would find all that it needs.
        source = redis_cluster.others(PREFIX)[0]
        redis_cluster.move(PREFIX, source)
        wait_for_starts(history_path, 50)
        redis_cluster.begin_move(PREFIX, target)
        keys = len(source.client().keys("*"))
        went = redis_cluster.move_keys(PREFIX, source, target, keys // 2)
        began, started = time.monotonic(), len(History.load(history_path).runs)
        while time.monotonic() - began < HEARTBEAT_TIMEOUT + 2:  # the pause
            assert set(target.client().keys("*")) <= set(went), "nobody writes on the importing node"
            time.sleep(0.1)
        print(f"{len(went)} of {keys} keys; {len(History.load(history_path).runs) - started} starts in the pause")
        redis_cluster.move_keys(PREFIX, source, target)
        redis_cluster.end_move(PREFIX, source, target)
        moved = time.monotonic()
        wait_for_starts(history_path, 50)
        print(f"50 starts {time.monotonic() - moved:.1f} s after the move")
    found = finished(history_path, 60)
    wait_until(lambda: producer.affinity.stats("jobs").entries == 0, what="all settled")
    assert found.reruns() == 0
    after = producer.affinity.leader("jobs")
    assert before and after and after.term > before.term
    assert_nobody_was_given_up(cluster)
    assert not source.client().dbsize()
    found.assert_lawful()


def test_a_node_of_a_cluster_and_a_short_heartbeat_timeout_stop_the_start(
    redis_cluster: RedisCluster, broker_server: Server, make_cluster: Callable[..., Cluster]
) -> None:
    node = redis_cluster.masters[0].url()
    for url, says in (
        (node, "Set redis_url='redis+cluster://<host>:<port>'"),
        (redis_cluster.url, "Set heartbeat_timeout to 4.5 s or more, or lower cluster-node-timeout"),
    ):
        cluster = make_cluster(broker_server.url(), **{LEDGER_VARIABLE: url})
        worker = cluster.worker(APP, queues="jobs", environ={**QUICK, **WORKER_ONLY}, extra=LEAN)
        beat = cluster.beat(APP, environ=QUICK)
        assert worker.wait(30) != 0
        assert says in worker.log_text()
        beat.wait_for_log(says)
        assert "Scheduling affinity queue" not in beat.log_text()
        cluster.destroy()


@pytest.mark.proves("the ledger's master in a Redis Cluster is killed, or hands over (CLUSTER FAILOVER)", "a new term, nobody is given up, nothing lost or doubled of what the replica had")
@pytest.mark.parametrize("how", ["killed", "hands over"])
def test_a_failover_in_a_cluster_starts_a_new_term_and_gives_nobody_up(
    with_replicas: RedisCluster, broker_server: Server, make_cluster: Callable[..., Cluster],
    history_path: Path, how: str,
) -> None:
    cluster = make_cluster(broker_server.url(), **{LEDGER_VARIABLE: with_replicas.url})
    producer = start(cluster)
    before = producer.affinity.leader("jobs")
    producer.send_each(TAGS, 4, ms=20)
    producer.send("long", task="long", ms=(HEARTBEAT_TIMEOUT + 4) * 1000)
    wait_for_run(history_path, lambda run: run.tag == "long")
    wait_until(lambda: producer.affinity.stats("jobs").entries == 1, what="only the long one left")
    first = with_replicas.owner(PREFIX)
    second = with_replicas.replica_of(first)
    call(first, "WAIT", 1, 5000)
    began = time.monotonic()
    if how == "killed":
        first.kill()
    else:
        call(second, "CLUSTER", "FAILOVER")
    with_replicas.wait_for_failover(PREFIX, second)
    print(f"failover {time.monotonic() - began:.1f} s")
    producer.send_each(TAGS, 4, ms=20)
    found = finished(history_path, 50)
    print(f"all done {time.monotonic() - began:.1f} s")
    wait_until(lambda: producer.affinity.stats("jobs").entries == 0, what="all settled")
    assert found.reruns() == 0
    after = producer.affinity.leader("jobs")
    assert before and after and after.term > before.term
    assert_nobody_was_given_up(cluster)
    found.assert_lawful()
