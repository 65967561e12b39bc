"""What waits on a broker that is not the ledger's Redis is seen by whoever looks at the system."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
from click.testing import CliRunner
from prometheus_client import CollectorRegistry, generate_latest

from acceptance.support import Producer, start
from acceptance.test_metrics import Figures, figures
from brokers import CLASSIC, ELSEWHERE, QUORUM, Broker
from celery_affinity.cli import affinity as command
from celery_affinity.embedded import Server
from celery_affinity.exporting import collector_of
from celery_affinity.types import Finding
from harness import Cluster, allowed, wait_for_ends, wait_until
from rabbit import RabbitServer

pytestmark = [
    pytest.mark.acceptance,
    pytest.mark.parametrize(
        "broker",
        [
            pytest.param(ELSEWHERE),
            pytest.param(CLASSIC, marks=pytest.mark.rabbitmq),
            pytest.param(QUORUM, marks=pytest.mark.rabbitmq),
        ],
        indirect=True,
    ),
]


@dataclass
class View:
    """A producer's app, and the server of its broker."""

    producer: Producer
    server: Server | RabbitServer

    def run(self, *arguments: str, code: int = 0) -> str:
        done = CliRunner().invoke(
            command, list(arguments), obj=SimpleNamespace(app=self.producer.app)
        )
        assert done.exit_code == code, (arguments, done.output, done.exception)
        return done.output

    def pending(self) -> int | None:
        return self.producer.affinity.stats("jobs").pending

    def connections(self) -> int:
        """Clients of the broker; of Redis those that are of this library."""
        if isinstance(self.server, RabbitServer):
            text = self.server.control("length(rabbit_networking:connections())")
            return int(text.removeprefix("{ok, ").rstrip("}\n"))
        names = [client["name"] for client in self.server.client().client_list()]
        return names.count("celery_affinity")

    def hang_up(self) -> None:
        """End all connections to the broker."""
        if isinstance(self.server, RabbitServer):
            self.server.close_connections()
        else:
            self.server.client().client_kill_filter(_type="normal")


@pytest.fixture
def view(
    cluster: Cluster, broker: Broker, request: pytest.FixtureRequest
) -> Iterator[View]:
    name = "broker_server" if broker.kind == ELSEWHERE else "rabbit"
    made = View(Producer(cluster.broker_url), request.getfixturevalue(name))
    made.producer.app.conf.broker_transport_options = (
        {} if broker.kind == ELSEWHERE else {"confirm_publish": True}
    )
    yield made
    lookout = made.producer.affinity.delivery.lookout
    assert lookout is not None
    lookout.close()


def about_broker(findings: list[Finding]) -> list[tuple[str, str]]:
    return [(one.verdict, one.found) for one in findings if one.about == "broker"]


def test_what_nobody_has_taken_in_yet_is_counted_where_it_waits(
    view: View, cluster: Cluster, history_path: Path
) -> None:
    affinity, is_redis = view.producer.affinity, isinstance(view.server, Server)
    assert view.pending() == 0, "also where the queue is not declared yet"
    tasks = view.producer.send("a", 3)

    wait_until(lambda: view.pending() == 3, what="three messages that wait")
    assert affinity.explain("a").pending == 3
    assert affinity.status().queues[0].stats.pending == 3
    for reading in ("queues", "status"):
        assert view.run(reading).splitlines()[1].split()[:3] == ["jobs", "3", "0"]
    assert view.run("top", "-n", "1").splitlines()[1].split()[:3] == ["jobs", "3", "0"]
    assert about_broker(affinity.doctor()) == [("ok", "answers; 3 messages wait in 'jobs'")]
    found = scraped(view)
    assert (found["pending_messages", ""], found["workers_needed", ""]) == (3, 1)

    task = affinity.explain_task(tasks[1].id)
    said = view.run("explain", "--task", tasks[1].id, code=0 if is_redis else 1)
    if is_redis:
        assert (task.state, task.entry) == ("pending", 2)
        assert "number 2 in the pending queue" in said
        assert affinity.explain_task("another").state == "unknown"
    else:
        assert (task.state, task.unseen) == ("unseen", 3)
        assert "waits among 3 messages on the broker; RabbitMQ shows nobody" in said
        assert "3 messages of its pending queue are not taken in yet, and it may be among them" in (
            view.run("explain", tasks[1].id, code=1)
        )

    start(cluster, "w1", beat=False)
    wait_for_ends(history_path, 3)
    wait_until(lambda: view.pending() == 0, what="an empty pending queue")
    assert affinity.explain_task(tasks[1].id).state == "unknown", "nothing is left that it could be"


def test_a_task_that_waits_deep_in_the_pending_queue_is_found_where_the_broker_lets_look(
    view: View,
) -> None:
    view.producer.send("a", 300)
    last = view.producer.send("a", 1)[0].id
    wait_until(lambda: view.pending() == 301, what="all messages")
    task = view.producer.affinity.explain_task(last)
    expected = ("pending", 301, None) if isinstance(view.server, Server) else ("unseen", None, 301)
    assert (task.state, task.entry, task.unseen) == expected


@pytest.mark.parametrize("how", ["pause", "kill"])
def test_a_broker_that_does_not_answer_is_said_by_every_reading(view: View, how: str) -> None:
    affinity = view.producer.affinity
    view.producer.send("a", 2)
    wait_until(lambda: view.pending() == 2, what="two messages that wait")
    seconds = allowed(20)
    getattr(view.server, how)()
    done = threading.Timer(seconds, lambda: None)
    done.start()
    try:
        assert view.pending() is None
        assert affinity.explain("a").pending is None
        task = affinity.explain_task("any")
        assert task.state == "unseen" and task.unseen is None
        assert "broker does not answer" in affinity.status().warnings[0]
        assert view.run("queues").splitlines()[1].split()[:3] == ["jobs", "-", "0"]
        assert "the broker gives no answer" in view.run("explain", "--task", "any", code=1)
        assert "the broker does not answer" in view.run("explain", "any", code=1)
        found = scraped(view)
        assert found["up", ""] == 1 and ("pending_messages", "") not in found
        (verdict, text), = about_broker(affinity.doctor())
        assert verdict == "error" and "the broker gives no answer" in text
        assert done.is_alive(), f"all of it took more than {seconds:.0f} s"
    finally:
        done.cancel()
        if how == "kill":
            view.server.start()
        else:
            view.server.resume()
    wait_until(lambda: view.pending() == 2, 30, "the number again")


def test_however_often_and_by_however_many_one_looks_there_is_one_connection(view: View) -> None:
    collector = collector_of(view.producer.affinity)
    registry = CollectorRegistry()
    registry.register(collector)
    before = view.connections()
    view.pending()

    def look() -> None:
        for _ in range(10):
            generate_latest(registry)
            view.pending()

    threads = [threading.Thread(target=look) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert view.connections() == before + 1


def test_a_connection_that_was_cut_between_two_looks_is_not_noticed(view: View) -> None:
    view.producer.send("a", 2)
    wait_until(lambda: view.pending() == 2, what="two messages that wait")
    view.hang_up()
    assert view.pending() == 2


def test_a_forked_child_looks_over_a_connection_of_its_own(view: View) -> None:
    view.producer.send("a", 2)
    wait_until(lambda: view.pending() == 2, what="two messages that wait")
    before = view.connections()
    lookout = view.producer.affinity.delivery.lookout
    assert lookout is not None
    reader, writer = os.pipe()
    with lookout._lock:  # as if another thread looked at that moment
        child = os.fork()
        if child == 0:
            signal.alarm(20)  # its end, should it wait for that thread
            seen = lookout.waiting("jobs")
            os.write(writer, b"ok" if seen == 2 else b"no")
            os._exit(0)
    os.close(writer)
    assert os.read(reader, 2) == b"ok"
    os.waitpid(child, 0)
    assert view.pending() == 2
    wait_until(lambda: view.connections() == before, what="the end of the child's connection")


def scraped(view: View) -> Figures:
    registry = CollectorRegistry()
    registry.register(collector_of(view.producer.affinity))
    return figures(generate_latest(registry).decode())


