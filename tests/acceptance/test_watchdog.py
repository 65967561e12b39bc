"""`on_ledger_lost="stop"`: no task outlives its lease; and what has succeeded does not run again."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

import acceptance.apps.newer  # noqa: F401  (the test's producer knows its tasks)
from acceptance.support import LEAN, QUICK, Producer, finished, runs, wait_for_nodes, wait_for_run
from celery_affinity.embedded import Server
from harness import RESULTS_VARIABLE, Cluster, allowed, is_gone, wait_until

pytestmark = pytest.mark.acceptance

APP = "acceptance.apps.newer"
STOPPING = {**QUICK, "AFFINITY_ON_LEDGER_LOST": "stop"}


@pytest.mark.proves(
    "29: a worker is cut off from Redis, on_ledger_lost stop",
    "its task is killed before the lease ends",
)
@pytest.mark.parametrize("pool", ["prefork", "threads"])
def test_a_task_ends_before_its_lease_when_the_worker_is_cut_off(
    cluster: Cluster, server: Server, history_path: Path, producer: Producer, pool: str
) -> None:
    worker = cluster.worker(
        APP, queues="jobs", concurrency=2, pool=pool, environ=STOPPING, extra=LEAN
    )
    wait_for_nodes(producer.affinity, 1)
    producer.send("tag", task="long", ms=4000)
    producer.send("tag")
    running = wait_for_run(history_path, lambda run: run.seq == 0)

    server.pause()
    cut_at = time.monotonic()
    wait_until(lambda: is_gone(running.pid), 10, "the end of the task")
    took = time.monotonic() - cut_at
    late = allowed(0.5)
    server.resume()

    assert 0.5 < took < 2 + late, took  # of the 2 s that the lease lasts from the last beat on
    if pool == "threads":
        worker.wait()  # without processes of its own it is the worker that ends
        worker.start()
    history = finished(history_path)
    assert [run.seq for run in history.runs] == [0, 0, 1]


@pytest.mark.proves(
    "10: a worker's parent is frozen, on_ledger_lost stop",
    "its task is killed before it runs elsewhere",
)
def test_a_task_ends_before_its_lease_when_its_parent_is_stopped(
    cluster: Cluster, history_path: Path, producer: Producer
) -> None:
    stopped = cluster.worker(APP, "w1", queues="jobs", environ=STOPPING, extra=LEAN)
    wait_for_nodes(producer.affinity, 1)
    producer.send("tag", task="long", ms=6000)
    running = wait_for_run(history_path, lambda run: True)
    cluster.worker(APP, "w2", queues="jobs", environ=STOPPING, extra=LEAN)
    wait_for_nodes(producer.affinity, 2)

    stopped.stop_process()  # its pool process runs on
    wait_until(lambda: is_gone(running.pid), 10, "the end of the task")
    ended_at = time.monotonic_ns()
    again = wait_for_run(history_path, lambda run: run.worker == "w2@test")
    stopped.cont()

    assert ended_at < again.start
    finished(history_path)
    wait_for_nodes(producer.affinity, 2)


@pytest.mark.proves(
    "18: Redis is frozen while a task ends",
    "its settle waits; one run",
)
def test_by_default_a_task_finishes_and_its_settle_waits(
    cluster: Cluster, server: Server, history_path: Path, producer: Producer
) -> None:
    cluster.worker(APP, queues="jobs", environ=QUICK, extra=LEAN)
    wait_for_nodes(producer.affinity, 1)
    producer.send("tag", task="long", ms=3000)
    wait_for_run(history_path, lambda run: True)
    server.pause()
    wait_until(lambda: runs(history_path)[0].is_done, 10, "its end, without Redis")
    server.resume()
    wait_until(lambda: producer.affinity.stats("jobs").settled == 1, what="its settle")
    assert len(runs(history_path)) == 1


@pytest.mark.proves(
    "outcome: SUCCESS stored, process lost before the settle",
    "settled, not run again",
)
def test_a_task_whose_success_is_stored_does_not_run_again(
    cluster: Cluster, history_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(RESULTS_VARIABLE, "1")
    cluster.environ[RESULTS_VARIABLE] = "1"
    producer = Producer(cluster.broker_url)
    worker = cluster.worker(APP, queues="jobs", environ=QUICK, extra=LEAN)
    wait_for_nodes(producer.affinity, 1)
    (stored,) = producer.send("tag", task="stored")
    (behind,) = producer.send("tag")

    assert (stored.get(timeout=20), behind.get(timeout=20)) == (0, 1)
    wait_until(lambda: producer.affinity.stats("jobs").entries == 0, what="the last settle")
    assert [run.seq for run in runs(history_path)] == [0, 1]
    requeued = producer.affinity.stats("jobs").requeued
    assert requeued == 2, "its process was lost before the settle, and what was behind it came again"
    assert "has succeeded before its process was lost" in worker.log_text()
