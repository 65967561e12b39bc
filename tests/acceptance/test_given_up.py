"""Workers on RabbitMQ that are given up as lost while they start, and come back."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from acceptance.support import APP, LEAN, QUICK, WORKER_ONLY, Producer
from brokers import CLASSIC
from celery_affinity.embedded import Server
from harness import Cluster, Node, wait_for_ends, wait_until
from history import History
from rabbit import RabbitServer

pytestmark = [pytest.mark.acceptance, pytest.mark.rabbitmq]

FREEZING = "acceptance.apps.freezing"
TAGS = [f"tag-{number}" for number in range(8)]


def is_frozen(node: Node) -> bool:
    return bool(psutil.Process(node.pid).status() == psutil.STATUS_STOPPED)


@pytest.mark.parametrize("comes_back", ["when-given-up", "when-swept"])
@pytest.mark.parametrize(
    "freezes", ["registered", "noted", "declared", "started", "consuming", "looping", "relaying"]
)
@pytest.mark.parametrize("broker", [CLASSIC], indirect=True)
def test_both_workers_given_up_while_they_start_run_again(
    cluster: Cluster, rabbit: RabbitServer, server: Server, history_path: Path, freezes: str,
    comes_back: str,
) -> None:
    cluster.beat(APP, environ=QUICK).wait_ready()
    producer = Producer(cluster.broker_url)
    producer.send_each(TAGS, 3)
    environ = {**QUICK, **WORKER_ONLY, "AFFINITY_TEST_FREEZES": freezes}
    workers = [
        cluster.worker(FREEZING, name, queues="jobs", environ=environ, extra=LEAN)
        for name in ("w1", "w2")
    ]
    wait_until(lambda: all(is_frozen(node) for node in workers), 40, "two frozen workers")

    wait_until(lambda: not producer.affinity.workers(), what="that both are given up")
    if comes_back == "when-swept":
        notes = "{affinity:default}:q:jobs:abroad"
        wait_until(lambda: not server.client().exists(notes), what="the leader's sweep")
        names = rabbit.queues(cluster.broker_url)
        assert not [name for name in names if name.startswith("jobs.worker.")]
    for node in workers:
        node.cont()

    wait_for_ends(history_path, producer.sent, 30)
    wait_until(lambda: len(producer.affinity.workers()) == 2, what="that both are back")
    producer.send_each(TAGS, 2)
    wait_for_ends(history_path, producer.sent, 30)
    history = History.load(history_path)
    history.assert_lawful()
    assert {run.worker for run in history.runs} == {node.name for node in workers}
