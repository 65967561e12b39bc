"""Dead letters end to end: what an operator sees, requeues, purges and resumes (on_failure)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from celery.result import AsyncResult

import acceptance.apps.odd  # noqa: F401  (the test's producer knows its tasks)
from acceptance.apps.odd import REPAIRED_VARIABLE
from acceptance.support import LEAN, QUICK, Producer, runs, starts_are, wait_for_nodes
from celery_affinity import BuriedError
from harness import RESULTS_VARIABLE, Cluster, Node, wait_for_ends, wait_until
from history import History

pytestmark = pytest.mark.acceptance

ODD = "acceptance.apps.odd"


@pytest.fixture
def producer(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> Producer:
    monkeypatch.setenv(RESULTS_VARIABLE, "1")
    cluster.environ[RESULTS_VARIABLE] = "1"
    return Producer(cluster.broker_url)


@pytest.fixture
def repair(tmp_path: Path, cluster: Cluster) -> Path:
    """Touched, it mends what makes `repairable` fail."""
    path = tmp_path / "repaired"
    cluster.environ[REPAIRED_VARIABLE] = str(path)
    return path


def serve(
    cluster: Cluster, producer: Producer, *, pool: str = "prefork", extra: Any = (), **queue: Any
) -> Node:
    environ = {**QUICK, "AFFINITY_TEST_QUEUE": json.dumps(queue)}
    node = cluster.worker(
        ODD, queues="jobs", concurrency=2, pool=pool, environ=environ, extra=[*LEAN, *extra]
    )
    wait_for_nodes(producer.affinity, 1)
    return node


def halted(producer: Producer) -> dict[str, tuple[int, tuple[str, ...]]]:
    """Halted tags: what waits, and what failed."""
    return {
        record.tag: (record.waiting, record.halted)
        for record in producer.affinity.tags("jobs") if record.halted
    }


@pytest.mark.parametrize("pool", ["prefork", "threads"])
def test_a_blocked_tag_waits_for_its_failed_task_and_goes_on_with_it(
    cluster: Cluster, history_path: Path, producer: Producer, repair: Path, pool: str
) -> None:
    serve(cluster, producer, pool=pool, on_failure="block")
    (failing,) = producer.send("tag", task="repairable")
    behind = producer.send("tag", 5)
    others = producer.send("other", 10)
    with pytest.raises(ValueError, match="broken 0"):
        failing.get(timeout=30)
    assert [result.get(timeout=30) for result in others] == list(range(10))
    (letter,) = producer.affinity.dead_letters("jobs")
    assert (letter.tag, letter.reason, letter.attempts) == ("tag", "ValueError: broken 0", 1)
    assert letter.traceback.startswith("Traceback") and "in repairable" in letter.traceback
    assert failing.id.encode() in letter.message
    wait_until(lambda: halted(producer) == {"tag": (5, (f"block:{letter.entry}",))}, what="the halt")
    assert [run.seq for run in runs(history_path) if run.tag == "tag"] == [0]
    assert producer.affinity.stats("jobs").halted_tags == 1

    assert producer.affinity.requeue_dead("jobs", [letter.entry]) == 1
    wait_until(starts_are(history_path, 12), what="another failure")
    wait_until(lambda: producer.affinity.dead_letters("jobs"), what="its burial")
    repair.touch()
    assert producer.affinity.requeue_dead("jobs", tag="tag") == 1
    assert [result.get(timeout=30) for result in behind] == [1, 2, 3, 4, 5]
    assert AsyncResult(failing.id, app=producer.app).result == 0, "the same id, another end"
    wait_for_ends(history_path, 18)
    assert [run.seq for run in runs(history_path) if run.tag == "tag"] == [0, 0, 0, 1, 2, 3, 4, 5]
    wait_until(lambda: producer.affinity.stats("jobs").entries == 0, what="an empty ledger")
    assert (halted(producer), producer.affinity.dead_letters("jobs")) == ({}, [])


def test_a_parked_tag_is_set_aside_until_it_is_resumed(
    cluster: Cluster, history_path: Path, producer: Producer, repair: Path
) -> None:
    serve(cluster, producer, on_failure="park")
    (failing,) = producer.send("tag", task="repairable")
    with pytest.raises(ValueError, match="broken 0"):
        failing.get(timeout=30)
    wait_until(lambda: halted(producer), what="the halt")
    behind = producer.send("tag", 3)
    assert producer.affinity.purge_dead("jobs", tag="tag") == 1
    assert producer.send("other")[0].get(timeout=30) == 0
    wait_until(lambda: halted(producer)["tag"][0] == 3, what="a backlog that is set aside")
    producer.affinity.resume("jobs", "tag")
    assert [result.get(timeout=30) for result in behind] == [1, 2, 3]
    assert halted(producer) == {}


def test_a_task_past_its_time_limit_blocks_its_tag(
    cluster: Cluster, history_path: Path, producer: Producer
) -> None:
    serve(cluster, producer, extra=("--time-limit", "1"), on_failure="block")
    producer.send("tag", task="long", ms=60_000)
    behind = producer.send("tag", 1)
    wait_until(lambda: halted(producer), what="the halt")
    (letter,) = producer.affinity.dead_letters("jobs")
    assert "time limit" in letter.reason
    assert producer.affinity.purge_dead("jobs", [letter.entry]) == 1
    assert behind[0].get(timeout=30) == 1


def test_a_halted_tag_outlives_its_workers(
    cluster: Cluster, history_path: Path, producer: Producer, repair: Path
) -> None:
    node = serve(cluster, producer, on_failure="block")
    (failing,) = producer.send("tag", task="repairable")
    (behind,) = producer.send("tag")
    wait_until(lambda: halted(producer), what="the halt")
    node.kill9()
    cluster.worker(
        ODD, "w2", queues="jobs",
        environ={**QUICK, "AFFINITY_TEST_QUEUE": json.dumps({"on_failure": "block"})}, extra=LEAN,
    )
    assert producer.send("other")[0].get(timeout=60) == 0
    assert halted(producer), "the new leader has not forgotten"
    repair.touch()
    assert producer.affinity.requeue_dead("jobs") == 1
    assert behind.get(timeout=30) == 1
    assert AsyncResult(failing.id, app=producer.app).result == 0


def test_a_failure_by_default_leaves_no_letter_and_the_tag_goes_on(
    cluster: Cluster, history_path: Path, producer: Producer, repair: Path
) -> None:
    serve(cluster, producer)
    producer.send("tag", task="repairable")
    (behind,) = producer.send("tag")
    assert behind.get(timeout=30) == 1
    assert (halted(producer), producer.affinity.dead_letters("jobs")) == ({}, [])


def test_celerys_own_retries_with_ordered_retries_are_the_retry_in_place(
    cluster: Cluster, history_path: Path, producer: Producer
) -> None:
    """And on_failure asks only once they are over."""
    serve(cluster, producer, ordered_retries=True, on_failure="block")
    (stubborn,) = producer.send("tag", task="persistent")
    behind = producer.send("tag", 2)
    assert [result.get(timeout=30) for result in (stubborn, *behind)] == [0, 1, 2]
    found = History.load(history_path)
    assert [(run.seq, run.retries) for run in found.runs] == [(0, 0), (0, 1), (0, 2), (1, 0), (2, 0)]
    assert producer.affinity.dead_letters("jobs") == []


def test_what_was_buried_for_want_of_a_tag_goes_on_once_the_operators_app_can_derive_it(
    cluster: Cluster, history_path: Path, producer: Producer
) -> None:
    serve(cluster, producer)
    app = producer.app
    bad = app.send_task("jobs.work", ("tag", 0), queue="jobs", headers={"identify_tag": ""})
    worse = app.send_task("jobs.nobody", ("tag", 1), queue="jobs")
    for result in (bad, worse):
        with pytest.raises(BuriedError):
            result.get(timeout=30)
    assert [letter.tag for letter in producer.affinity.dead_letters("jobs")] == ["", ""]
    assert producer.affinity.requeue_dead("jobs") == 0, "intake would bury them again"

    @producer.affinity.task(tag_from="tag", name="jobs.nobody")
    def known_to_the_operator(tag: str, seq: int) -> None: ...

    assert producer.affinity.requeue_dead("jobs") == 1
    wait_until(
        lambda: [letter.reason for letter in producer.affinity.dead_letters("jobs")][1:]
        == ["unknown task jobs.nobody"],
        what="its burial, now for want of a worker that knows it",
    )
