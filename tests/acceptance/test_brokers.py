"""The ledger in a Redis of its own, with the broker elsewhere: in another Redis, in RabbitMQ."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from amqp.exceptions import ChannelError
from kombu import Connection
from redis import Redis

from acceptance.support import (
    APP,
    LEAN,
    QUICK,
    Producer,
    finished,
    leading,
    start,
    starts_are,
    wait_for_nodes,
    wait_for_run,
)
from celery_affinity.amqp_broker import AmqpSource
from celery_affinity.embedded import Server
from celery_affinity.redis_broker import RedisSource
from harness import Cluster, wait_for_ends, wait_until
from history import History
from rabbit import RabbitServer

pytestmark = pytest.mark.acceptance

TAGS = [f"tag-{number}" for number in range(8)]


@dataclass
class Elsewhere:
    """A cluster whose broker is not its ledger."""

    cluster: Cluster
    ledger: Server
    kind: str
    rabbit: RabbitServer | None

    @property
    def url(self) -> str:
        return self.cluster.broker_url

    def noted(self) -> set[str]:
        """Worker queues that the ledger knows to be on the broker."""
        found = self.ledger.client().hkeys("{affinity:default}:q:jobs:abroad")
        return {name.decode() for name in found}

    def there(self, worker_queues: Iterable[str]) -> set[str]:
        """Those of them of which the broker has anything."""
        if self.kind == "redis":
            keys = b" ".join(Redis.from_url(self.url).keys("*jobs.worker*")).decode()
            return {name for name in worker_queues if name in keys}
        return {name for name in worker_queues if self.length(name) is not None}

    def length(self, queue: str) -> int | None:
        """Messages that wait in a queue of the broker; None if it is not there."""
        try:
            with Connection(self.url) as connection:
                answer = connection.default_channel.queue_declare(queue, passive=True)
                return int(answer.message_count)
        except ChannelError:
            return None


@pytest.fixture(params=["redis", pytest.param("rabbitmq", marks=pytest.mark.rabbitmq)])
def elsewhere(
    request: pytest.FixtureRequest, aof_server: Server, make_cluster: Callable[..., Cluster]
) -> Elsewhere:
    rabbit: RabbitServer | None = None
    if request.param == "rabbitmq":
        rabbit = request.getfixturevalue("rabbit")
        url = rabbit.new_virtual_host()
    else:
        url = request.getfixturevalue("broker_server").url()
    cluster = make_cluster(url, AFFINITY_REDIS_URL=aof_server.url())
    return Elsewhere(cluster, aof_server, request.param, rabbit)


def test_many_tags_on_two_nodes_lose_double_overlap_and_reorder_nothing(
    elsewhere: Elsewhere, history_path: Path
) -> None:
    producer = Producer(elsewhere.url)
    start(elsewhere.cluster, "w1", "w2")
    elsewhere.cluster.wait_ready()
    for _ in range(10):
        producer.send_each(TAGS, 5, ms=2)

    wait_for_ends(history_path, producer.sent)
    history = History.load(history_path)
    history.assert_lawful()  # also: each lease in one process of one node
    assert history.reruns() == 0
    resent = elsewhere.ledger.client().hget("{affinity:default}:q:jobs:c", "resent")
    assert resent is None, "no doorbell was rung twice"


def test_a_broker_elsewhere_loses_nothing_when_any_process_dies(
    elsewhere: Elsewhere, history_path: Path
) -> None:
    producer = Producer(elsewhere.url)
    nodes = start(elsewhere.cluster, "w1", "w2", beat=False)
    wait_for_nodes(producer.affinity, 2)
    for number in range(3):
        producer.send_each(TAGS * 2, 5, ms=20)
        wait_until(starts_are(history_path, (number + 1) * 40), what="starts")
        leader = leading(producer.affinity, nodes)
        dies = leader if number % 2 == 0 else next(node for node in nodes if node is not leader)
        dies.kill9()
        producer.send_each(TAGS, 1)
        dies.start()
    finished(history_path, 60)
    wait_until(lambda: len(elsewhere.noted()) == 2, 30, "the queues of those that live")


@pytest.mark.parametrize("pool, concurrency", [("threads", 2), ("solo", 1), ("gevent", 4)])
def test_on_every_pool_a_broker_elsewhere_loses_and_reorders_nothing(
    elsewhere: Elsewhere, history_path: Path, pool: str, concurrency: int
) -> None:
    producer = Producer(elsewhere.url)
    elsewhere.cluster.worker(
        APP, queues="jobs", pool=pool, concurrency=concurrency, environ=QUICK, extra=LEAN
    )
    producer.send_each(TAGS, 10, ms=2)
    wait_for_ends(history_path, producer.sent)
    history = History.load(history_path)
    history.assert_lawful()
    assert history.reruns() == 0


def test_worker_queues_go_with_their_incarnation(elsewhere: Elsewhere) -> None:
    producer = Producer(elsewhere.url)
    nodes = start(elsewhere.cluster, "w1", "w2", "w3")
    wait_for_nodes(producer.affinity, 3)
    queues = elsewhere.noted()
    wait_until(lambda: len(elsewhere.there(queues)) == len(queues) == 3, what="three queues")

    nodes[0].kill9()
    nodes[1].term()
    wait_until(lambda: len(elsewhere.there(queues)) == 1, 30, "the end of two")
    wait_until(lambda: elsewhere.noted() == elsewhere.there(queues), what="the end of their notes")
    nodes[2].term()
    wait_until(lambda: not elsewhere.there(queues) and not elsewhere.noted(), 30, "the last one's")
    assert not [key for key in elsewhere.ledger.client().keys("*") if b":w:" in key]


def test_a_retry_and_a_due_time_stay_in_the_ledger(elsewhere: Elsewhere, history_path: Path) -> None:
    producer = Producer(elsewhere.url)
    start(elsewhere.cluster, "w1", beat=False)
    elsewhere.cluster.wait_ready()
    producer.send("later", 1, countdown=1)
    producer.send("a", 3, task="flaky")
    wait_for_run(history_path, lambda run: run.tag == "later")
    finished(history_path)
    assert not elsewhere.length("jobs")


def test_a_worker_waits_for_its_ledger_at_start_and_while_it_runs(
    elsewhere: Elsewhere, history_path: Path
) -> None:
    producer = Producer(elsewhere.url)
    elsewhere.ledger.kill()
    worker, = start(elsewhere.cluster, "w1", beat=False)
    worker.wait_for_log("does not answer", 40)
    producer.send_each(TAGS, 2)
    elsewhere.ledger.restart()
    wait_for_ends(history_path, producer.sent)

    producer.send_each(TAGS, 5, ms=50)
    wait_until(starts_are(history_path, 20), what="starts")
    elsewhere.ledger.kill()
    producer.send_each(TAGS, 2)
    elsewhere.ledger.restart()
    finished(history_path)


def test_while_the_broker_is_away_no_message_is_sent_again_and_again(
    broker_server: Server, aof_server: Server, make_cluster: Callable[..., Cluster], history_path: Path
) -> None:
    """Ten heartbeats long. Settles go on dispatching meanwhile."""
    cluster = make_cluster(broker_server.url(), AFFINITY_REDIS_URL=aof_server.url())
    producer = Producer(broker_server.url())
    start(cluster, "w1", beat=False)
    producer.send_each(TAGS, 10, ms=50)
    wait_until(starts_are(history_path, 10), what="starts")
    broker_server.kill()
    ledger, beats = aof_server.client(), set()

    def ten_beats() -> bool:
        beats.update(ledger.zrange("{affinity:default}:workers", 0, 0, withscores=True))
        return len(beats) > 10

    wait_until(ten_beats, what="ten heartbeats")
    broker_server.restart()
    finished(history_path)
    resent = int(ledger.hget("{affinity:default}:q:jobs:c", "resent") or 0)
    print(f"{resent} messages were sent again")
    assert resent <= 4, "what two slots had out, once"


def test_a_url_that_names_the_same_server_otherwise_is_the_same_redis(
    server: Server, make_cluster: Callable[..., Cluster], history_path: Path
) -> None:
    broker = server.url()
    other = broker.replace("127.0.0.1", "localhost.").replace("localhost.", "127.1")
    assert other != broker
    cluster = make_cluster(broker, AFFINITY_REDIS_URL=other)
    producer = Producer(broker)
    assert type(producer.affinity.delivery).__name__ == "SameRedisDelivery"
    start(cluster, "w1", beat=False)
    producer.send("a", 3)
    wait_for_ends(history_path, 3)
    assert not server.client().keys("*abroad*")


def test_another_database_of_the_same_server_is_another_redis(
    server: Server, make_cluster: Callable[..., Cluster], history_path: Path
) -> None:
    cluster = make_cluster(server.url(), AFFINITY_REDIS_URL=server.url(5))
    producer = Producer(server.url())
    assert type(producer.affinity.delivery).__name__ == "CarriedDelivery"
    start(cluster, "w1", beat=False)
    producer.send("a", 3)
    wait_for_ends(history_path, 3)
    History.load(history_path).assert_lawful()
    assert not [key for key in server.client().keys("*") if b"affinity" in key]


def test_what_is_evacuated_is_plain_messages_on_the_broker(
    elsewhere: Elsewhere, history_path: Path
) -> None:
    producer = Producer(elsewhere.url)
    beat = elsewhere.cluster.beat(APP, environ=QUICK)
    beat.wait_ready()
    producer.send_each(["a", "b"], 3)
    wait_until(lambda: producer.affinity.stats("jobs").entries == 6, what="admission")
    moved = producer.affinity.evacuate("jobs")
    assert moved.done and moved.moved == 6
    wait_until(lambda: elsewhere.length("jobs") == 6, what="six messages on the broker")
    producer.send("a", 1)
    producer.affinity.resume("jobs")
    start(elsewhere.cluster, "w1", beat=False)
    wait_for_ends(history_path, 7)
    history = History.load(history_path)
    history.assert_lawful()
    assert history.reruns() == 0


def test_an_evacuation_that_dies_when_it_has_published_runs_nothing_twice_after_a_resume(
    elsewhere: Elsewhere, history_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    producer = Producer(elsewhere.url)
    elsewhere.cluster.beat(APP, environ=QUICK).wait_ready()
    producer.send_each(["a", "b"], 3)
    wait_until(lambda: producer.affinity.stats("jobs").entries == 6, what="admission")
    # What was handed out once RabbitMQ tells itself: hardly any is, in this test.
    monkeypatch.setattr("celery_affinity.amqp_broker.PREFETCH", 1)
    kind = RedisSource if elsewhere.kind == "redis" else AmqpSource
    publish = kind.give_back

    def publish_and_die(source: Any, *messages: Any) -> None:
        publish(source, *messages)
        raise KeyboardInterrupt

    with monkeypatch.context() as dying:
        dying.setattr(kind, "give_back", publish_and_die)
        with pytest.raises(KeyboardInterrupt):
            producer.affinity.evacuate("jobs")
    producer.send("a", 1)
    assert producer.affinity.evacuate("jobs").done
    wait_until(lambda: elsewhere.length("jobs") == 13, what="each of the six twice, and another")

    producer.affinity.resume("jobs")
    start(elsewhere.cluster, "w1", beat=False)
    wait_for_ends(history_path, 7)
    wait_until(lambda: producer.affinity.stats("jobs").pending == 0, what="an empty queue")
    wait_until(lambda: producer.affinity.stats("jobs").entries == 0, what="an empty ledger")
    history = History.load(history_path)
    history.assert_lawful()
    assert history.reruns() == 0 and len(history.runs) == 7
