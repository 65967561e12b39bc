"""Workers whose parent is killed or frozen: no process of theirs runs a tag beside its next one."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

import acceptance.apps.stopping  # noqa: F401  (the test's producer knows its tasks)
from acceptance.support import (
    HEARTBEAT_TIMEOUT_SECONDS,
    LEAN,
    QUICK,
    WORKER_ONLY,
    Producer,
    finished,
    held_tags,
    runs,
    wait_for_nodes,
    wait_for_run,
)
from celery_affinity.types import WorkerRecord
from harness import Cluster, Node, allowed, is_gone, wait_until
from pools import GEVENT

pytestmark = pytest.mark.acceptance

APP = "acceptance.apps.stopping"


def worker(cluster: Cluster, name: str, pool: str, concurrency: int = 1) -> Node:
    return cluster.worker(
        APP, name, queues="jobs", pool=pool, concurrency=concurrency,
        environ={**QUICK, **WORKER_ONLY}, extra=LEAN,
    )


def record_of(producer: Producer, node: Node) -> WorkerRecord:
    return next(found for found in producer.affinity.workers() if found.name == node.name)


@pytest.mark.proves("4: kill -9 of a worker's parent while a task of 60 s runs", "its process is gone before the tag runs elsewhere")
@pytest.mark.parametrize("pool, child_is_stopped", [("prefork", False), ("prefork", True), ("threads", False)])
def test_no_process_of_a_killed_parent_runs_once_its_lease_has_passed_on(
    cluster: Cluster, history_path: Path, producer: Producer, pool: str, child_is_stopped: bool
) -> None:
    cluster.beat(APP, environ=QUICK)
    victim = worker(cluster, "w1", pool)
    wait_for_nodes(producer.affinity, 1)
    producer.send("tag", task="long_at_first", ms=60_000)
    running = wait_for_run(history_path, lambda run: True)
    worker(cluster, "w2", pool)
    wait_for_nodes(producer.affinity, 2)
    if child_is_stopped:
        os.kill(running.pid, signal.SIGSTOP)

    killed = time.monotonic()
    victim.kill9()
    wait_until(lambda: is_gone(running.pid), 5, "the end of the process that runs the task")
    gone = time.monotonic()
    again = wait_for_run(history_path, lambda run: run.attempt == 2)
    late = allowed(1)

    print(f"{pool}: gone after {gone - killed:.2f} s, again after {again.start / 1e9 - killed:.2f} s")
    assert gone < again.start / 1e9 <= killed + HEARTBEAT_TIMEOUT_SECONDS + late
    assert not victim.group()
    finished(history_path)


@pytest.mark.proves("10: a worker is frozen past its lease while messages for it wait", "starts nothing before it has registered anew")
@pytest.mark.parametrize("pool", ["prefork", "threads", GEVENT])
def test_a_frozen_worker_starts_nothing_before_it_has_registered_anew(
    cluster: Cluster, history_path: Path, producer: Producer, pool: str
) -> None:
    cluster.beat(APP, environ=QUICK)
    frozen, other = (worker(cluster, name, pool, concurrency=2) for name in ("w1", "w2"))
    wait_for_nodes(producer.affinity, 2)
    cluster.wait_ready()
    tags = [f"tag-{number}" for number in range(6)]
    if pool == "prefork":  # elsewhere a task that ran would be frozen with its worker
        producer.send_each(tags, 2, ms=300)
        wait_for_run(history_path, lambda run: run.worker == frozen.name)

    frozen.stop_process()  # the parent only: on prefork its processes go on
    producer.send_each(tags, 2, ms=50)
    wait_until(lambda: held_tags(record_of(producer, frozen)), what="messages for it")
    wait_until(lambda: len(producer.affinity.workers()) == 1, 10, "the rescue")
    finished(history_path)  # elsewhere
    woken, woken_epoch = time.monotonic(), time.time() * 1e6  # epochs are times
    frozen.cont()
    wait_for_nodes(producer.affinity, 2)
    producer.send_each(tags, 2, ms=50)

    finished(history_path)
    after = [run for run in runs(history_path) if run.worker == frozen.name and run.start / 1e9 > woken]
    assert after, "it works again"
    assert all((run.epoch or 0) > woken_epoch for run in after), [str(run) for run in after]
    assert "registers anew" in frozen.log_text()
    assert other.alive
