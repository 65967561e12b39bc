"""An app that runs on plain Celery takes the library in: nothing waits, is lost, or starts over."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from celery import Celery
from redis import Redis

from acceptance.apps.affinity_app import release_held
from acceptance.support import APP, LEAN, QUICK, Producer, runs, wait_for_nodes
from celery_affinity.embedded import Server
from harness import Cluster, wait_for_ends, wait_until
from history import History, record

pytestmark = pytest.mark.acceptance

BEFORE = "acceptance.apps.before"
TAGS = [f"tag-{number}" for number in range(20)]


@pytest.fixture
def redis(server: Server) -> Redis:
    return server.client()


@pytest.fixture
def plain(cluster: Cluster) -> Celery:
    """A producer without the library."""
    return Celery("plain", broker=cluster.broker_url, set_as_current=False)


def send_plainly(app: Celery, first: int, count: int) -> None:
    """Send what plain Celery sends: the call and no tag."""
    for seq in range(first, first + count):
        for tag in TAGS:
            record("submit", tag=tag, seq=seq)
            call = ((tag, seq, 1), {}) if seq % 2 else ((), {"seq": seq, "tag": tag, "ms": 1})
            app.send_task("jobs.work", *call, queue="jobs")


def test_messages_of_plain_celery_are_taken_over_in_order_and_none_is_buried(
    cluster: Cluster, history_path: Path, producer: Producer, plain: Celery
) -> None:
    send_plainly(plain, 0, 50)

    cluster.worker(APP, queues="jobs", concurrency=2, environ=QUICK, extra=LEAN)

    wait_for_ends(history_path, 1000)
    History.load(history_path).assert_lawful()
    stats = producer.affinity.stats("jobs")
    assert (stats.admitted, stats.buried, stats.dead) == (1000, 0, 0)


def test_a_property_identify_tag_counts_as_the_header(
    cluster: Cluster, history_path: Path, plain: Celery, redis: Redis
) -> None:
    """Where Celery puts what a plain task is sent with."""
    for seq in range(3):
        plain.send_task(
            "jobs.work", ("of the arguments", seq), queue="jobs", identify_tag="of the property"
        )
    cluster.worker(APP, queues="jobs", environ=QUICK, extra=LEAN)
    wait_for_ends(history_path, 3)
    tags = wait_until(lambda: redis.hkeys("{affinity:default}:q:jobs:warm"), what="its release")
    assert tags == [b"of the property"]


def test_a_worker_without_the_library_is_named_in_one_warning(
    cluster: Cluster, history_path: Path, producer: Producer
) -> None:
    old = cluster.worker(BEFORE, "old", queues="jobs", concurrency=1)
    old.wait_ready()

    leader = cluster.worker(APP, "new", queues="jobs", concurrency=1, environ=QUICK, extra=LEAN)

    leader.wait_for_log("Worker 'old@test' consumes the affinity queue 'jobs' past the ledger", 30)
    assert leader.log_text().count("past the ledger") == 1


@pytest.mark.proves(
    "deploy over plain Celery",
    "nothing is lost; the promises hold once the old workers are gone",
)
@pytest.mark.parametrize("first", ["web", "workers"])
def test_a_rolling_deploy_loses_nothing_and_keeps_the_laws_once_the_old_are_gone(
    cluster: Cluster, history_path: Path, producer: Producer, plain: Celery, first: str
) -> None:
    old = cluster.worker(BEFORE, "old", queues="jobs", concurrency=1, extra=LEAN)
    old.wait_ready()

    if first == "web":
        producer.send_each(TAGS, 10, ms=1)  # tagged, for the old worker
        cluster.worker(APP, "new", queues="jobs", concurrency=2, environ=QUICK, extra=LEAN)
    else:
        cluster.worker(APP, "new", queues="jobs", concurrency=2, environ=QUICK, extra=LEAN)
        send_plainly(plain, 0, 10)  # untagged, for the new worker
    wait_for_nodes(producer.affinity, 1)
    old.term()
    # Plain Celery's process may wait 30 s for a result that its parent has flushed.
    assert old.wait(60) == 0
    wait_for_ends(history_path, 200)
    deployed = len(runs(history_path))

    if first == "web":
        producer.send_each(TAGS, 10, ms=1)
    else:
        send_plainly(plain, 10, 10)

    # One that ran in the old worker may have run twice: to count ends would be to end too soon.
    def losses() -> list[str]:
        return [str(v) for v in History.load(history_path).violations(allow_rerun=True) if v.kind == "loss"]

    wait_until(lambda: not losses(), 60, "the end of all tasks")
    found = History.load(history_path)
    later = History(found.runs[deployed:], {s: t for s, t in found.submits.items() if s[1] >= 10})
    later.assert_lawful()
    assert {run.worker for run in later.runs} == {"new@test"}
    assert producer.affinity.stats("jobs").buried == 0


def test_an_evacuated_app_runs_on_under_plain_celery_and_can_come_back(
    cluster: Cluster, history_path: Path, producer: Producer
) -> None:
    worker = cluster.worker(APP, "new", queues="jobs", concurrency=2, environ=QUICK, extra=LEAN)
    wait_for_nodes(producer.affinity, 1)
    for tag in ("hot", "hotter"):
        producer.send(tag, task="hold")
    wait_until(lambda: len(runs(history_path)) == 2, what="running tasks")
    producer.send_each(TAGS, 30)
    for number in range(20):
        producer.send(f"later-{number}", countdown=12)
    wait_until(lambda: producer.affinity.stats("jobs").pending == 0, what="the admission")

    with operating(cluster, "evacuate", "jobs", "--yes", "--json") as command:
        wait_until(lambda: producer.affinity.stats("jobs").evacuated, 60, "the stop of the queue")
        release_held()
        answer = json.loads(command.communicate(timeout=60)[0])

    assert answer["done"] and answer["moved"] == producer.sent - 2 >= 500
    stats = producer.affinity.stats("jobs")
    assert (stats.evacuated, stats.entries, stats.pending) == (True, 0, answer["moved"])
    producer.send("afterwards", 3)
    worker.wait_for_log("is evacuated")
    worker.term()
    assert worker.wait() == 0

    old = cluster.worker(BEFORE, "old", queues="jobs", concurrency=1, extra=LEAN)
    wait_for_ends(history_path, producer.sent)
    history = History.load(history_path)
    history.assert_lawful(lease_within="worker")
    assert sum(run.worker == old.name for run in history.runs) == answer["moved"] + 3
    old.term()
    old.wait()

    cluster.worker(APP, "again", queues="jobs", concurrency=2, environ=QUICK, extra=LEAN)
    assert "dispatches again" in operate(cluster, "resume", "--queue", "jobs")
    producer.send_each(TAGS)
    wait_for_ends(history_path, producer.sent)
    assert {run.worker for run in runs(history_path)[-len(TAGS):]} == {"again@test"}


def operating(cluster: Cluster, *command: str) -> subprocess.Popen[str]:
    """Run ``celery affinity ...``."""
    return subprocess.Popen(
        [sys.executable, "-m", "celery", "-A", APP, "affinity", *command],
        env=cluster.environ, cwd=cluster.directory, text=True, stdout=subprocess.PIPE,
    )


def operate(cluster: Cluster, *command: str) -> str:
    """Run ``celery affinity ...``; what it printed."""
    with operating(cluster, *command) as process:
        printed = process.communicate(timeout=90)[0]
    assert process.returncode == 0
    return printed
