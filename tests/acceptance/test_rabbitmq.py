"""RabbitMQ as the broker, with the faults that only it has; classic and quorum queues.

The producers here confirm their publishes: a message whose publish returned is on disk.
"""

from __future__ import annotations

import contextlib
import json
import time
from base64 import b64decode
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from celery import Celery
from kombu import Connection, Queue

from acceptance.apps.affinity_app import release_held
from acceptance.support import (
    APP,
    HEARTBEAT_TIMEOUT_SECONDS,
    LEAN,
    QUICK,
    WORKER_ONLY,
    Producer,
    finished,
    leading,
    runs,
    start,
    starts_are,
    wait_for_nodes,
)
from brokers import CLASSIC, QUORUM, RABBIT
from celery_affinity.amqp_broker import AmqpBroker
from celery_affinity.embedded import Server
from harness import Cluster, wait_for_ends, wait_until
from history import History, record
from rabbit import RabbitServer

pytestmark = [
    pytest.mark.acceptance, pytest.mark.rabbitmq,
    # A restart of the server takes its time.
    pytest.mark.timeout(300),
]
on_both = pytest.mark.parametrize("broker", RABBIT, indirect=True)
on_quorum = pytest.mark.parametrize("broker", [QUORUM], indirect=True)

TAGS = [f"tag-{number}" for number in range(8)]
ENDS_SECONDS = 60.0


@pytest.fixture
def server(aof_server: Server) -> Server:
    """The ledger's loses no write when it is killed."""
    return aof_server


@pytest.fixture
def producer(cluster: Cluster) -> Producer:
    made = Producer(cluster.broker_url)
    made.app.conf.broker_transport_options = {"confirm_publish": True}
    return made


def worker_queues(rabbit: RabbitServer, url: str) -> list[str]:
    return sorted(name for name in rabbit.queues(url) if name.startswith("jobs.worker."))


def delete(url: str, *names: str) -> None:
    with Connection(url) as connection:
        for name in names:
            Queue(name).bind(connection.default_channel).delete()


def exactly_once(history_path: Path, count: int) -> History:
    """Wait until all tasks have ended, and judge: none lost, doubled, overlapping, out of order."""
    wait_for_ends(history_path, count, ENDS_SECONDS)
    history = History.load(history_path)
    history.assert_lawful()
    assert history.reruns() == 0
    return history


@pytest.mark.proves("34: RabbitMQ is killed and comes back", "nothing is lost or run twice")
@on_both
def test_a_broker_that_is_killed_and_comes_back_loses_nothing_in_order(
    cluster: Cluster, rabbit: RabbitServer, history_path: Path, producer: Producer
) -> None:
    workers = start(cluster, "w1", "w2")
    wait_for_nodes(producer.affinity, 2)
    for kill in range(2):
        before = producer.sent
        producer.send_each(TAGS * 2, 10, ms=10)
        wait_until(starts_are(history_path, before + 30), ENDS_SECONDS, "30 starts")
        rabbit.kill()
        if kill:
            time.sleep(HEARTBEAT_TIMEOUT_SECONDS + 1)  # the length of the outage
        rabbit.start()

    producer.send_each(TAGS, 2)
    exactly_once(history_path, producer.sent)
    assert all(node.alive for node in workers)


@pytest.mark.proves(
    "4, 6, 34: a worker, the leader and RabbitMQ are killed at once",
    "nothing is lost; at most one task of each slot runs twice",
)
@on_both
def test_a_worker_the_leader_and_the_broker_that_are_killed_at_once_lose_nothing(
    cluster: Cluster, rabbit: RabbitServer, history_path: Path, producer: Producer
) -> None:
    victim, _ = start(cluster, "w1", "w2")
    beats = [cluster.nodes[-1], cluster.beat(APP, "beat-2", environ=QUICK)]
    wait_for_nodes(producer.affinity, 2)
    leader = leading(producer.affinity, beats)
    producer.send_each(TAGS * 2, 10, ms=20)
    wait_until(starts_are(history_path, 30), ENDS_SECONDS, "30 starts")

    for node in (victim, leader):
        node.kill9()
    rabbit.kill()
    rabbit.start()

    history = finished(history_path, ENDS_SECONDS)
    assert history.reruns() <= 2, "a task more than once, for each slot of the victim"


@pytest.mark.proves("34: RabbitMQ is down when a worker and a beat start", "they wait and work then")
@on_both
def test_a_broker_that_is_down_at_start_is_waited_for(
    cluster: Cluster, rabbit: RabbitServer, history_path: Path, producer: Producer
) -> None:
    producer.send_each(TAGS, 5)
    rabbit.kill()
    worker = cluster.worker(
        APP, queues="jobs", concurrency=2, environ={**QUICK, **WORKER_ONLY}, extra=LEAN
    )
    beat = cluster.beat(APP, environ=QUICK)
    worker.wait_for_log("Cannot connect to amqp", 40)
    beat.wait_for_log("does not answer (", 40)

    rabbit.start()
    exactly_once(history_path, producer.sent)
    assert "Traceback" not in beat.log_text()


@pytest.mark.proves(
    "35: RabbitMQ closes all connections", "nothing is lost or run twice"
)
@on_both
def test_closed_connections_lose_nothing(
    cluster: Cluster, rabbit: RabbitServer, history_path: Path, producer: Producer
) -> None:
    workers = start(cluster, "w1", "w2")
    wait_for_nodes(producer.affinity, 2)
    producer.send_each(TAGS * 3, 10, ms=12)
    for cut in range(1, 4):
        wait_until(starts_are(history_path, cut * 50), ENDS_SECONDS, f"{cut * 50} starts")
        rabbit.close_connections()

    exactly_once(history_path, producer.sent)
    assert all("Connected to amqp" in node.log_text() for node in workers)


@pytest.mark.proves(
    "35: RabbitMQ's memory alarm blocks publishers",
    "what is dispatched waits, no worker is given up, nothing is lost or run twice",
)
@on_both
def test_a_memory_alarm_is_waited_for(
    cluster: Cluster, rabbit: RabbitServer, server: Server, history_path: Path, producer: Producer
) -> None:
    start(cluster, "w1", "w2")
    wait_for_nodes(producer.affinity, 2)
    producer.send_each(TAGS * 2, 10, ms=10)
    wait_until(starts_are(history_path, 30), ENDS_SECONDS, "30 starts")
    incarnations = {worker.worker_id for worker in producer.affinity.workers()}

    with rabbit.memory_alarm():
        counted, since = 0, time.monotonic()
        while time.monotonic() - since < HEARTBEAT_TIMEOUT_SECONDS + 1:
            if (now := len(runs(history_path))) != counted:
                counted, since = now, time.monotonic()
            time.sleep(0.1)
        assert counted < producer.sent, "the alarm holds up what is dispatched"

    exactly_once(history_path, producer.sent)
    assert {worker.worker_id for worker in producer.affinity.workers()} == incarnations


@pytest.mark.proves(
    "36: a pending or a worker queue is deleted on RabbitMQ",
    "it is declared again; what the ledger had is not lost or run twice",
)
@pytest.mark.parametrize("which", ["pending", "worker"])
@on_both
def test_a_deleted_queue_is_declared_again(
    cluster: Cluster, rabbit: RabbitServer, history_path: Path, producer: Producer, which: str
) -> None:
    start(cluster, "w1")
    wait_for_nodes(producer.affinity, 1)
    producer.send_each(TAGS, 10, ms=10)
    wait_until(lambda: producer.affinity.stats("jobs").pending == 0, what="their admission")
    wait_until(starts_are(history_path, 10), ENDS_SECONDS, "10 starts")
    names = ["jobs"] if which == "pending" else worker_queues(rabbit, cluster.broker_url)
    assert len(names) == 1

    delete(cluster.broker_url, *names)
    wait_until(lambda: set(names) <= set(rabbit.queues(cluster.broker_url)), what="the declaration")

    producer.send_each(TAGS, 2)
    exactly_once(history_path, producer.sent)


@pytest.mark.proves(
    "37: RabbitMQ closes the channel of a leader that does not ack (consumer_timeout)",
    "it connects again; nothing is lost or run twice",
)
@on_both
def test_a_consumer_timeout_is_a_reconnect(
    cluster: Cluster, rabbit: RabbitServer, history_path: Path, producer: Producer
) -> None:
    # The default times: it is frozen for a while, and is not to lose its leases or its term.
    with rabbit.consumer_timeout(1):
        worker = cluster.worker(
            APP, queues="jobs", extra=LEAN,
            environ={"AFFINITY_HEARTBEAT_TIMEOUT": "60", "AFFINITY_LEADER_TTL": "60"},
        )
        wait_for_nodes(producer.affinity, 1)
        producer.send_each(TAGS)
        wait_for_ends(history_path, producer.sent, ENDS_SECONDS)
        timed_out = "has timed out waiting for delivery acknowledgement"
        before = rabbit.log_text().count(timed_out)

        worker.stop_process()
        producer.send_each(TAGS, 5)  # which are on their way to it, and so not acknowledged
        wait_until(
            lambda: rabbit.log_text().count(timed_out) > before, ENDS_SECONDS, "the timeout"
        )
        worker.cont()

        exactly_once(history_path, producer.sent)
        producer.send_each(TAGS)
        exactly_once(history_path, producer.sent)


@pytest.mark.proves(
    "3, 35: a worker is frozen until it is given up and RabbitMQ has lost its queue",
    "it comes back and works on; at most one task of each slot runs twice",
)
@on_both
def test_a_worker_that_was_given_up_comes_back_with_its_queue(
    cluster: Cluster, rabbit: RabbitServer, history_path: Path, producer: Producer
) -> None:
    (worker,) = start(cluster, "w1")
    wait_for_nodes(producer.affinity, 1)
    producer.send_each(TAGS * 2, 10, ms=10)
    wait_until(starts_are(history_path, 30), ENDS_SECONDS, "30 starts")

    worker.stop_process(tree=True)
    wait_for_nodes(producer.affinity, 0)
    wait_until(lambda: not worker_queues(rabbit, cluster.broker_url), what="the end of its queue")
    worker.cont(tree=True)

    history = finished(history_path, ENDS_SECONDS)
    assert history.reruns() <= 2
    producer.send_each(TAGS, 2)
    finished(history_path, ENDS_SECONDS)


#: What Celery rejects in three places of its own, put into a worker queue without a stamp.
STRAYS: list[dict[str, Any]] = [
    {"body": [[], {}, {}], "headers": {"id": "a", "task": "jobs.nobody"}},
    {"body": "no task"},
    {"body": b"{", "content_type": "application/json", "content_encoding": "utf-8"},
]


@pytest.mark.parametrize("broker", [CLASSIC], indirect=True)
def test_what_a_worker_makes_nothing_of_costs_it_no_connection(
    cluster: Cluster, rabbit: RabbitServer, history_path: Path, producer: Producer
) -> None:
    """A lost connection would give back the ordinary task, which is acked late, to run again."""
    worker = cluster.worker(
        APP, queues="jobs,ordinary", concurrency=3, environ={**QUICK, **WORKER_ONLY}, extra=LEAN
    )
    cluster.beat(APP, environ=QUICK)
    wait_for_nodes(producer.affinity, 1)
    producer.send("ordinary", task="plain_hold")
    wait_until(starts_are(history_path, 1), what="its start")

    producer.app.send_task("jobs.nobody", queue="jobs", headers={"identify_tag": "odd"})
    wait_until(lambda: producer.affinity.dead_letters("jobs"), what="the burial")
    (name,) = worker_queues(rabbit, cluster.broker_url)
    with Connection(cluster.broker_url) as connection:
        for stray in STRAYS:
            connection.Producer().publish(routing_key=name, **stray)
    producer.send_each(TAGS, 2)  # behind them, on the same channel
    wait_for_ends(history_path, producer.sent - 1, ENDS_SECONDS)
    release_held()

    exactly_once(history_path, producer.sent)
    said = worker.log_text()
    assert said.count("jobs.nobody") >= 2 and "Can't decode message body" in said
    assert "onnection to broker lost" not in said and "PRECONDITION_FAILED" not in said
    assert "lost on the way" not in said
    assert [dead.reason for dead in producer.affinity.dead_letters("jobs")] == ["unknown task jobs.nobody"]


@pytest.mark.parametrize("how", ["term", "kill9"])
@on_both
def test_worker_queues_go_with_their_incarnation(
    cluster: Cluster, rabbit: RabbitServer, history_path: Path, producer: Producer, how: str
) -> None:
    goes, _ = start(cluster, "w1", "w2")
    wait_for_nodes(producer.affinity, 2)
    producer.send_each(TAGS, 5)
    exactly_once(history_path, producer.sent)
    both = wait_until(
        lambda: (found := worker_queues(rabbit, cluster.broker_url))[1:] and found, what="two queues"
    )

    getattr(goes, how)()
    goes.wait()

    wait_until(
        lambda: worker_queues(rabbit, cluster.broker_url) == [name for name in both if ".w2" in name],
        what="the end of its queue",
    )
    queues = rabbit.queues(cluster.broker_url)
    assert not [name for name in queues if "w1" in name], queues


@on_quorum
def test_ten_thousand_plain_messages_are_taken_while_a_leader_is_killed(
    cluster: Cluster, rabbit: RabbitServer, history_path: Path, producer: Producer
) -> None:
    """Sent by a Celery that does not know of the library."""
    app = Celery(broker=cluster.broker_url, set_as_current=False)
    app.conf.task_create_missing_queue_type = "quorum"
    count, tags = 10_000, 100
    with app.producer_pool.acquire(block=True) as plain:
        for number in range(count):
            seq, tag = divmod(number, tags)
            record("submit", tag=f"tag-{tag}", seq=seq)
            app.send_task(
                "jobs.work", (f"tag-{tag}", seq), queue="jobs", producer=plain,
                headers={"identify_tag": f"tag-{tag}"},
            )
    start(cluster, "w1", "w2")
    beats = [cluster.nodes[-1], cluster.beat(APP, "beat-2", environ=QUICK)]
    leader = leading(producer.affinity, beats)
    wait_until(lambda: admitted(producer) > count / 5, ENDS_SECONDS, "the first fifth")

    leader.kill9()

    wait_for_ends(history_path, count, 200)
    history = History.load(history_path)
    history.assert_lawful()
    assert history.reruns() == 0
    with contextlib.closing(Connection(cluster.broker_url)) as connection:
        assert Queue("jobs").bind(connection.default_channel).queue_declare(passive=True)[1] == 0


def admitted(producer: Producer) -> int:
    stats = producer.affinity.stats("jobs")
    return stats.entries + stats.settled


@pytest.mark.parametrize("kind", ["classic", "quorum"])
def test_messages_that_a_frozen_leader_holds_are_not_overtaken(rabbit: RabbitServer, kind: str) -> None:
    url = rabbit.new_virtual_host()
    queue = Queue("jobs", queue_arguments={"x-queue-type": kind})
    broker = AmqpBroker(partial(Connection, url), lambda name: queue, 2.0, 60.0)

    def publish(*names: str) -> None:
        with Connection(url) as connection:
            for name in names:
                connection.Producer().publish(name, routing_key="jobs", declare=[queue], retry=True)

    publish("first", "second")
    frozen, following = broker.source("jobs"), broker.source("jobs")
    assert len(frozen.take(10, 5.0)) == 2
    began = time.monotonic()
    found = following.take(10, 0.1)
    later = [f"later {number}" for number in range(6)]  # RabbitMQ deals them out to both
    publish(*later)
    while len(found) < 8:
        found += following.take(10, 5.0)
    print(f"{time.monotonic() - began:.1f} s until RabbitMQ gave up the frozen one")
    bodies = [b64decode(json.loads(one.raw)["body"]).decode() for one in found]
    assert bodies == ["first", "second", *later]
    following.done(found)
    following.close()
    frozen.close()


def test_somebody_who_consumes_the_queue_and_is_no_leader_is_waited_for_once(rabbit: RabbitServer) -> None:
    url = rabbit.new_virtual_host()
    broker = AmqpBroker(partial(Connection, url), Queue, 2.0, 60.0)
    with Connection(url) as stranger:
        bound = Queue("jobs")(stranger.default_channel)
        bound.declare()
        bound.consume(callback=lambda message: None)
        source = broker.source("jobs")
        began = time.monotonic()
        assert source.take(1, 0.1) == []
        assert 7 < time.monotonic() - began < 12, "four times what RabbitMQ is told"
        began = time.monotonic()
        assert source.take(1, 0.1) == []
        assert time.monotonic() - began < 5
        source.close()
