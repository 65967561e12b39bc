"""A retry may belong to another tag: then it waits for its turn there."""

from __future__ import annotations

from pathlib import Path

import pytest
from celery.result import AsyncResult

from acceptance.apps.affinity_app import make_app
from acceptance.support import LEAN, QUICK, Producer, wait_for_nodes
from celery_affinity import UndeclaredQueueError
from harness import RESULTS_VARIABLE, Cluster, wait_for_ends, wait_until
from history import History

pytestmark = pytest.mark.acceptance


def test_a_retry_with_another_tag_is_a_task_of_that_tag(
    cluster: Cluster, history_path: Path
) -> None:
    producer = Producer(cluster.broker_url)
    cluster.worker(
        "acceptance.apps.hopping", queues="jobs", concurrency=3, environ=QUICK, extra=LEAN
    )
    wait_for_nodes(producer.affinity, 1)
    for seq in range(3):
        tag = f"from-{seq}"
        producer.app.send_task(
            "jobs.hop", (tag, seq, "to"), queue="jobs", headers={"identify_tag": tag}
        )
    wait_for_ends(history_path, 3)
    history = History.load(history_path)
    history.assert_lawful()  # above all: no two of "to" at once
    assert [(run.tag, run.retries) for run in history.runs] == [("to", 1)] * 3
    wait_until(lambda: producer.affinity.stats("jobs").entries == 0, what="nothing is left")


def test_a_retry_with_headers_of_its_own_keeps_its_tag(cluster: Cluster, history_path: Path) -> None:
    """It had none: three starts later it was a dead letter."""
    producer = Producer(cluster.broker_url)
    cluster.worker("acceptance.apps.hopping", queues="jobs", environ=QUICK, extra=LEAN)
    wait_for_nodes(producer.affinity, 1)
    producer.app.send_task("jobs.plain_retry", ("tag", 0), queue="jobs", headers={"identify_tag": "tag"})
    wait_for_ends(history_path, 2)
    assert [(run.tag, run.retries) for run in History.load(history_path).runs] == [("tag", 0), ("tag", 1)]
    wait_until(lambda: producer.affinity.stats("jobs").entries == 0, what="nothing is left")
    assert not producer.affinity.dead_letters("jobs")


def test_a_retry_that_cannot_be_sent_is_the_failure_of_its_task(
    cluster: Cluster, history_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error killed the worker's parent, which could not unpickle it, and the task was over: it
    had neither failed nor would it run again."""
    monkeypatch.setenv(RESULTS_VARIABLE, "1")
    app, affinity = make_app(cluster.broker_url)
    environ = {**QUICK, RESULTS_VARIABLE: "1"}
    node = cluster.worker("acceptance.apps.hopping", queues="jobs", environ=environ, extra=LEAN)
    wait_for_nodes(affinity, 1)
    sent = app.send_task("jobs.astray", ("tag", 0), queue="jobs", headers={"identify_tag": "tag"})
    with pytest.raises(UndeclaredQueueError, match="'nowhere'"):
        AsyncResult(sent.id, app=app).get(timeout=20)
    app.send_task("jobs.plain_retry", ("tag", 1), queue="jobs", headers={"identify_tag": "tag"})
    wait_for_ends(history_path, 3)
    wait_until(lambda: affinity.stats("jobs").entries == 0, what="nothing is left")
    assert node.alive
