"""pytest-celery on an affinity worker: nodes are processes, or containers with TEST_DOCKER=1."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from celery.result import AsyncResult
from pytest_celery import (
    CeleryBackendCluster,
    CeleryBrokerCluster,
    CeleryTestSetup,
    CeleryWorkerContainer,
    RedisTestBackend,
    RedisTestBroker,
)

import celery_affinity
from integration import process_nodes

ON_DOCKER = os.environ.get("TEST_DOCKER") == "1"
RESULT_SECONDS = 20

pytestmark = pytest.mark.acceptance

if not ON_DOCKER:
    default_redis_broker = process_nodes.default_redis_broker
    default_redis_backend = process_nodes.default_redis_backend
    default_worker_container = process_nodes.default_worker_container


@pytest.fixture
def celery_broker_cluster(celery_redis_broker: RedisTestBroker) -> CeleryBrokerCluster:
    """Redis only: the ledger lives there."""
    return CeleryBrokerCluster(celery_redis_broker)


@pytest.fixture
def celery_backend_cluster(celery_redis_backend: RedisTestBackend) -> CeleryBackendCluster:
    """Redis only."""
    return CeleryBackendCluster(celery_redis_backend)


@pytest.fixture
def default_worker_initial_content() -> dict[str, bytes]:
    """The app; in a container also the library, which no index has yet."""
    content = {"app.py": (Path(__file__).parent / "node_app.py").read_bytes()}
    if ON_DOCKER:
        package = Path(celery_affinity.__file__).parent
        content |= {
            str(path.relative_to(package.parent)): path.read_bytes()
            for path in package.rglob("*")
            if path.suffix in (".py", ".lua")
        }
    return content


@pytest.fixture(scope="session")
def default_worker_pytest_celery_pkg() -> str:
    """What the image has beside celery: the library's other dependency, not the plugin."""
    return "celery[pydantic]"


@pytest.fixture
def default_worker_command() -> list[str]:
    """A worker of the affinity queue, and of an ordinary one for the plugin's ping."""
    return CeleryWorkerContainer.command("-Q", "jobs,celery", "-c", "2")


def send(
    setup: CeleryTestSetup, tag: str, numbers: range, seconds: float = 0
) -> list[AsyncResult[Any]]:
    """Publish as a producer that has no library."""
    return [
        setup.app.send_task(
            "nodes.echo", (tag, number, seconds), queue="jobs", headers={"identify_tag": tag}
        )
        for number in numbers
    ]


def assert_done_in_order(results: list[AsyncResult[Any]], tag: str) -> None:
    """Each result belongs to its id, and the tasks began in the order of their numbers."""
    found = [result.get(timeout=RESULT_SECONDS) for result in results]
    assert [row[:3] for row in found] == [
        [result.id, tag, number] for number, result in enumerate(results)
    ]
    began = [row[3] for row in found]
    assert began == sorted(began)


def test_an_affinity_worker_answers_ping_and_control(celery_setup: CeleryTestSetup) -> None:
    assert celery_setup.ready(ping=True, control=True, docker=True)
    worker = celery_setup.worker
    assert worker is not None
    answers = celery_setup.app.control.ping(timeout=1)
    assert answers == [{worker.hostname(): {"ok": "pong"}}]

    # The same ping, through the ledger.
    tagged = celery_setup.ping.apply_async(queue="jobs", headers={"identify_tag": "ping"})
    assert tagged.get(timeout=RESULT_SECONDS) == "pong"
    stats = celery_setup.app.control.inspect(timeout=1).stats()
    assert "jobs" in stats[worker.hostname()]["affinity"]["queues"]


def test_results_are_found_under_the_ids_that_the_producer_got(
    celery_setup: CeleryTestSetup,
) -> None:
    tags = [f"tag-{number}" for number in range(5)]
    sent = {tag: send(celery_setup, tag, range(10)) for tag in tags}

    for tag, results in sent.items():
        assert_done_in_order(results, tag)


def test_a_killed_and_restarted_worker_goes_on(celery_setup: CeleryTestSetup) -> None:
    worker = celery_setup.worker
    assert worker is not None
    results = send(celery_setup, "tenant", range(10), seconds=0.2)
    results[2].get(timeout=RESULT_SECONDS)

    worker.kill()
    assert worker.container.status == "exited"
    worker.restart()

    assert_done_in_order(results, "tenant")
    assert_done_in_order(send(celery_setup, "tenant", range(3)), "tenant")


def test_a_killed_and_restarted_broker_loses_nothing(celery_setup: CeleryTestSetup) -> None:
    broker = celery_setup.broker
    assert broker is not None
    results = send(celery_setup, "tenant", range(10), seconds=0.2)
    results[2].get(timeout=RESULT_SECONDS)

    broker.kill()
    assert broker.container.status == "exited"
    broker.restart()

    assert_done_in_order(results, "tenant")
    assert_done_in_order(send(celery_setup, "tenant", range(3)), "tenant")
