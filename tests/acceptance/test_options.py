"""A queue's settings end to end: lost tasks, ordered retries, untagged tasks, unknown ones."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from billiard.exceptions import WorkerLostError
from celery import Celery, Signature, chord
from celery.exceptions import ChordError, NotRegistered

import acceptance.apps.newer  # noqa: F401  (the test's producer knows its tasks)
from acceptance.support import (
    APP,
    LEAN,
    QUICK,
    Producer,
    runs,
    wait_for_nodes,
    wait_for_run,
)
from celery_affinity import BuriedError
from harness import RESULTS_VARIABLE, Cluster, Node, wait_for_ends, wait_until
from history import History

pytestmark = pytest.mark.acceptance

NEWER = "acceptance.apps.newer"


@pytest.fixture
def producer(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> Producer:
    monkeypatch.setenv(RESULTS_VARIABLE, "1")
    cluster.environ[RESULTS_VARIABLE] = "1"
    return Producer(cluster.broker_url)


def worker(cluster: Cluster, name: str = "w1", app: str = NEWER, concurrency: int = 1, **queue: Any) -> Node:
    """A worker of the queue with these settings."""
    environ = {**QUICK, "AFFINITY_TEST_QUEUE": json.dumps(queue)}
    return cluster.worker(
        app, name, queues="jobs", concurrency=concurrency, environ=environ, extra=LEAN
    )


@pytest.mark.proves(
    "outcome: process or worker lost, on_lost bury",
    "buried after its one start; FAILURE is stored, errbacks run; the tag goes on",
)
@pytest.mark.parametrize("lost", ["child", "worker"])
def test_a_task_that_must_not_run_again_fails_when_its_process_is_lost(
    cluster: Cluster, history_path: Path, producer: Producer, lost: str
) -> None:
    first = worker(cluster, on_lost="bury")
    wait_for_nodes(producer.affinity, 1)
    errback = producer.app.tasks["jobs.told"].s()
    (once,) = producer.send("tag", task="long", ms=60_000, link_error=errback)
    (behind,) = producer.send("tag")
    run = wait_for_run(history_path, lambda run: run.tag == "tag")

    if lost == "child":
        os.kill(run.pid, signal.SIGKILL)
    else:
        worker(cluster, "w2", on_lost="bury")
        wait_for_nodes(producer.affinity, 2)
        first.kill9()

    with pytest.raises(WorkerLostError if lost == "child" else BuriedError, match="lost|SIGKILL"):
        once.get(timeout=30)
    assert behind.get(timeout=30) == 1
    wait_for_run(history_path, lambda run: run.tag == "errback")
    assert [run.attempt for run in runs(history_path) if (run.tag, run.seq) == ("tag", 0)] == [1]
    (dead,) = producer.affinity.dead_letters("jobs")
    assert (dead.tag, dead.attempts) == ("tag", 1) and "on_lost" in dead.reason


def test_an_ordered_retry_keeps_its_place(
    cluster: Cluster, history_path: Path, producer: Producer
) -> None:
    worker(cluster, concurrency=2, ordered_retries=True)
    wait_for_nodes(producer.affinity, 1)
    results = producer.send("tag", task="thrice", ms=300)
    results += producer.send("tag", 3)
    producer.send_each(["other", "another"], 5)

    assert [result.get(timeout=30) for result in results] == [0, 1, 2, 3]
    wait_for_ends(history_path, producer.sent + 2)
    found = History.load(history_path)
    of_tag = [(run.seq, run.retries) for run in found.runs if run.tag == "tag"]
    assert of_tag == [(0, 0), (0, 1), (0, 2), (1, 0), (2, 0), (3, 0)]
    waited = [run for run in found.runs if run.tag == "tag"]
    others = max(run.end or 0 for run in found.runs if run.tag != "tag")
    assert others < waited[2].start, "its slot was not kept waiting"


def test_untagged_tasks_are_spread_over_all_slots(
    cluster: Cluster, history_path: Path, producer: Producer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AFFINITY_TEST_QUEUE", json.dumps({"untagged": "spread"}))
    spreading = Producer(cluster.broker_url)
    worker(cluster, concurrency=2, untagged="spread")
    task = spreading.app.tasks["jobs.untagged"]
    sent = [task.delay(seq) for seq in range(4)]
    sent += [spreading.app.send_task("jobs.untagged", (4,), queue="jobs")]
    assert [result.get(timeout=30) for result in sent] == [f"untagged:{result.id}" for result in sent]
    assert spreading.affinity.stats("jobs").dead == 0


@pytest.mark.proves(
    "outcome: unknown task, another worker knows it",
    "it goes there, in its place",
)
def test_an_unknown_task_goes_to_a_worker_that_knows_it(
    cluster: Cluster, history_path: Path, producer: Producer
) -> None:
    old = worker(cluster, "old", app=APP, concurrency=2)
    wait_for_nodes(producer.affinity, 1)
    worker(cluster, "new", app=NEWER)
    wait_for_nodes(producer.affinity, 2)
    for number in range(6):
        producer.send(f"tag-{number}", 2, task="newer")
        producer.send(f"tag-{number}")

    wait_for_ends(history_path, 18)
    found = History.load(history_path)
    found.assert_lawful(lease_within="worker")
    assert {run.worker for run in found.runs if run.seq < 2} == {"new@test"}
    assert producer.affinity.stats("jobs").dead == 0
    assert "unknown here; it goes to a worker that knows it" in old.log_text()


@pytest.mark.proves(
    "outcome: unknown task",
    "buried; its caller learns of it",
)
def test_a_task_that_no_worker_knows_is_buried_and_its_caller_told(
    cluster: Cluster, history_path: Path, producer: Producer
) -> None:
    worker(cluster, "old", app=APP)
    wait_for_nodes(producer.affinity, 1)
    (lost,) = producer.send("tag", task="newer")
    (known,) = producer.send("tag")
    with pytest.raises(NotRegistered, match="jobs.newer"):
        lost.get(timeout=30)
    assert known.get(timeout=30) == 1
    (dead,) = producer.affinity.dead_letters("jobs")
    assert dead.reason == "unknown task jobs.newer"


@pytest.mark.proves(
    "outcome: buried member of a chord",
    "the chord fails",
)
def test_a_chord_hears_of_a_buried_member(
    cluster: Cluster, history_path: Path, producer: Producer
) -> None:
    """As of one that failed: its body fails instead of waiting for ever."""
    worker(cluster)
    wait_for_nodes(producer.affinity, 1)
    url = cluster.broker_url
    plain = Celery("plain", broker=url, backend=url.rpartition("/")[0] + "/1", set_as_current=False)
    plain.tasks.unregister("jobs.work")  # a producer without the library

    def work(tag: str, seq: int) -> Signature:
        return plain.signature("jobs.work", args=(tag, seq), queue="jobs", immutable=True)

    lawful = chord([work("one", 0), work("two", 0)], app=plain)(work("body", 0))
    assert lawful.get(timeout=30) == 0
    broken = chord([work("one", 1), work("", 0)], app=plain)(work("body", 1))
    with pytest.raises(BuriedError, match="identify_tag is empty"):  # the parent's, as Celery does
        broken.get(timeout=30)
    wait_until(lambda: isinstance(broken.result, ChordError), what="the failure of the body")
    assert len(producer.affinity.dead_letters("jobs")) == 1
