"""It stays Celery: ordinary tasks beside affinity tasks, and every way in which a task can end."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from celery import __version__ as celery_version
from celery import states
from redis import Redis

from acceptance.support import (
    APP,
    LEAN,
    QUICK,
    WORKER_ONLY,
    EventLog,
    Producer,
    runs,
    slots,
    wait_for_nodes,
    wait_for_run,
)
from celery_affinity.embedded import Server
from harness import RESULTS_VARIABLE, Cluster, allowed, wait_for_ends, wait_until
from history import History

pytestmark = pytest.mark.acceptance

OUTCOMES = "acceptance.apps.outcomes"


@pytest.fixture
def producer(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> Producer:
    """One that keeps results, as the workers here do."""
    monkeypatch.setenv(RESULTS_VARIABLE, "1")
    cluster.environ[RESULTS_VARIABLE] = "1"
    import acceptance.apps.outcomes  # noqa: F401  (registers its tasks)

    return Producer(cluster.broker_url)


@pytest.mark.parametrize("pool", ["prefork", "threads"])
def test_an_ordinary_task_occupies_only_its_slot(
    cluster: Cluster, history_path: Path, producer: Producer, pool: str
) -> None:
    cluster.worker(APP, queues="jobs,ordinary", pool=pool, concurrency=2, environ=QUICK, extra=LEAN)
    wait_for_nodes(producer.affinity, 1)
    producer.send("long", ms=3000, task="plain_work")
    ordinary = wait_for_run(history_path, lambda run: run.tag == "long")
    wait_until(lambda: sum(s.status == "running" for s in slots(producer.affinity)) == 1)

    producer.send_each(("a", "b", "c"), 20, ms=5)

    wait_for_ends(history_path, 60)
    assert not next(run for run in runs(history_path) if run.tag == "long").is_done
    wait_for_ends(history_path, 61)
    producer.send_each(("a", "b", "c"), 20, ms=5)
    wait_for_ends(history_path, 121)
    history = History.load(history_path)
    history.assert_lawful()
    beside = [run for run in history.runs if run.tag != "long" and run.seq < 20]
    assert not [run for run in beside if run.place("thread") == ordinary.place("thread")]
    slowest = max(max(waits[:20]) for tag, waits in history.waits().items() if tag != "long")
    print(f"{pool}: beside the ordinary task the 60 tasks were started within {slowest:.2f} s")
    later = {run.place("thread") for run in history.runs if run.tag != "long" and run.seq >= 20}
    assert len(later) == 2, "afterwards its slot takes leases again"


@pytest.mark.parametrize("pool", ["prefork", "threads"])
def test_an_ordinary_task_gets_its_turn_beside_busy_tags(
    cluster: Cluster, history_path: Path, producer: Producer, pool: str
) -> None:
    cluster.worker(APP, queues="jobs,ordinary", pool=pool, concurrency=2, environ=QUICK, extra=LEAN)
    producer.send_each(("a", "b", "c"), 60, ms=20)
    wait_for_run(history_path, lambda run: run.seq == 3)
    ordinary = [f"ordinary-{number}" for number in range(3)]
    for name in ordinary:
        producer.send(name, ms=300, task="plain_work")

    wait_for_ends(history_path, producer.sent)
    history = History.load(history_path)
    history.assert_lawful()
    before = [started_before(history, lambda tag: tag in "abc", name) for name in ordinary]
    print("before the ordinary tasks started of 180", before)
    assert max(before) < 90, "they do not wait for the end of the backlog"


@pytest.mark.parametrize("pool", ["prefork", "threads"])
def test_an_affinity_task_gets_its_turn_beside_many_ordinary_ones(
    cluster: Cluster, history_path: Path, producer: Producer, pool: str
) -> None:
    cluster.worker(APP, queues="jobs,ordinary", pool=pool, concurrency=2, environ=QUICK, extra=LEAN)
    names = [f"ordinary-{number}" for number in range(200)]
    for name in names:
        producer.send(name, ms=20, task="plain_work")
    wait_for_run(history_path, lambda run: run.tag == names[10])
    producer.send_each(("a", "b"), 3, ms=5)

    wait_for_ends(history_path, producer.sent)
    history = History.load(history_path)
    history.assert_lawful()
    before = [started_before(history, names.__contains__, tag) for tag in ("a", "b")]
    print("before the last affinity tasks started of 200", before)
    assert max(before) < 140, "not until the ordinary ones are done"


def started_before(history: History, others: Callable[[str], bool], tag: str) -> int:
    """How many runs of other tags had started before the last one of a tag."""
    last = max(run.start for run in history.runs if run.tag == tag)
    return sum(run.start < last for run in history.runs if others(run.tag))


def test_ordinary_tasks_alone_work_and_without_q_a_worker_serves_both(
    cluster: Cluster, history_path: Path, producer: Producer
) -> None:
    alone = cluster.worker(APP, "alone", queues="ordinary", concurrency=2, extra=LEAN)
    alone.wait_ready()
    (result, *_) = producer.send("plain", 5, task="plain_work")
    assert result.get(timeout=20) == 0
    wait_for_ends(history_path, 5)
    assert producer.affinity.workers() == []
    alone.term()
    alone.wait()

    cluster.worker(APP, "both", concurrency=2, extra=LEAN)
    producer.send("plain", 5, task="plain_work")
    producer.send("tag", 5)
    wait_for_ends(history_path, 15)
    assert {run.worker for run in runs(history_path) if run.tag == "tag"} == {"both@test"}


def test_an_affinity_task_in_an_ordinary_queue_takes_the_detour_through_the_ledger(
    cluster: Cluster, history_path: Path, producer: Producer
) -> None:
    ordinary = cluster.worker(APP, "ordinary", queues="ordinary", environ=QUICK, extra=LEAN)
    cluster.worker(APP, "affine", queues="jobs", concurrency=2, environ=QUICK, extra=LEAN)
    ordinary.wait_ready()
    tell = producer.app.control
    wait_until(lambda: tell.add_consumer("jobs", destination=[ordinary.name], reply=True), what="an answer")
    ordinary.wait_for_log("Not consuming 'jobs'")

    sent = [
        producer.app.send_task("jobs.work", ("tag", seq), queue="ordinary", priority=3, **options)
        for seq, options in enumerate([{}, {"identify_tag": "tag"}, {"countdown": 0.5}])
    ]
    producer.send("direct", 5)

    assert [result.get(timeout=20) for result in sent] == [0, 1, 2]
    wait_for_ends(history_path, 8)
    assert {run.worker for run in runs(history_path)} == {"affine@test"}
    assert all(run.epoch for run in runs(history_path))
    assert ordinary.log_text().count("passed on to 'jobs'") == 3


def test_beat_sends_the_apps_periodic_tasks(
    cluster: Cluster, history_path: Path, producer: Producer
) -> None:
    cluster.worker(OUTCOMES, queues="jobs,ordinary", environ={**QUICK, **WORKER_ONLY}, extra=LEAN)
    cluster.beat(OUTCOMES, environ=QUICK)
    for tag in ("ordinary tick", "affinity tick"):
        wait_until(lambda: sum(run.tag == tag for run in runs(history_path)) >= 3, what=tag)  # noqa: B023
    ticks = [run.start / 1e9 for run in runs(history_path) if run.tag == "ordinary tick"]
    assert ticks[2] - ticks[0] == pytest.approx(2, abs=0.7)
    assert {run.epoch is None for run in runs(history_path) if run.tag == "affinity tick"} == {False}


def test_every_way_to_end_leaves_its_state_and_a_tag_that_goes_on(
    cluster: Cluster, history_path: Path, producer: Producer
) -> None:
    cluster.worker(OUTCOMES, queues="jobs", concurrency=2, environ=QUICK, extra=LEAN)
    kinds = {
        "flaky": states.SUCCESS, "flaky_later": states.SUCCESS, "boom": states.FAILURE,
        "ignoring": states.PENDING, "requeuing": states.SUCCESS,
        # Celery's own: since 5.7 a rejected task has failed.
        "rejecting": states.FAILURE if celery_version >= "5.7" else states.PENDING,
    }
    results = {kind: producer.send(kind, task=kind)[0] for kind in kinds}
    last = {kind: producer.send(kind, 2)[1] for kind in kinds}

    for kind, result in last.items():
        assert result.get(timeout=20) == 2, kind
    wait_for_ends(history_path, producer.sent + 3)  # three run twice
    wait_until(lambda: producer.affinity.stats("jobs").entries == 0, what="the last settle")
    seen = {kind: wait_state(result, kinds[kind]) for kind, result in results.items()}
    assert seen == kinds
    assert str(results["boom"].result) == "boom 0"
    by_tag = History.load(history_path).by_tag()
    # What runs again joins the end of its tag; the others stand in order.
    for kind in ("flaky", "flaky_later", "requeuing"):
        assert [run.seq for run in by_tag[kind]] == [0, 1, 2, 0], kind
    for kind in ("boom", "ignoring", "rejecting"):
        assert [run.seq for run in by_tag[kind]] == [0, 1, 2], kind
    first, *_, again = by_tag["flaky_later"]
    # Its second counts from its call of retry, which is between the two records.
    assert first.start + 1e9 <= again.start + 5e6
    assert again.start < (first.end or 0) + 1e9 + allowed(1) * 1e9
    assert not producer.affinity.dead_letters("jobs")


def wait_state(result: object, wanted: str) -> str:
    """The state, once it is the wanted one; the last one seen if it never is."""
    try:
        wait_until(lambda: result.state == wanted, 3)  # type: ignore[attr-defined]
    except AssertionError:
        pass
    return result.state  # type: ignore[attr-defined, no-any-return]


def test_a_revoked_task_and_an_expired_one_do_not_run_and_their_tag_goes_on(
    cluster: Cluster, history_path: Path, producer: Producer
) -> None:
    cluster.worker(APP, queues="jobs", concurrency=2, environ=QUICK, extra=LEAN)
    wait_for_nodes(producer.affinity, 1)
    producer.send("tag", 2, ms=400)
    (revoked,) = producer.send("tag")
    (expired,) = producer.send("tag", expires=0.3)
    producer.send("tag", 2)
    wait_for_run(history_path, lambda run: run.tag == "tag")
    producer.app.control.revoke(revoked.id, reply=True, timeout=0.3)

    wait_for_ends(history_path, 4)
    wait_until(lambda: producer.affinity.stats("jobs").entries == 0, what="the last settle")
    assert [run.seq for run in runs(history_path)] == [0, 1, 4, 5]
    assert wait_state(revoked, states.REVOKED) == wait_state(expired, states.REVOKED) == states.REVOKED


@pytest.mark.proves(
    "outcome: second copy of a message",
    "refused: no run, no state, no event",
)
@pytest.mark.parametrize("when", ["while it runs", "after its end"])
def test_a_refused_copy_leaves_no_state_and_no_event(
    cluster: Cluster, server: Server, history_path: Path, producer: Producer, when: str
) -> None:
    cluster.worker(APP, queues="jobs", concurrency=2, environ=QUICK, extra=(*LEAN, "-E"))
    wait_for_nodes(producer.affinity, 1)
    redis = server.client()
    with EventLog(producer.app) as log:
        (result,) = producer.send("tag", ms=1200)
        wait_for_run(history_path, lambda run: run.tag == "tag")
        worker_list, copy = copy_of_the_running(redis)
        if when == "after its end":
            assert result.get(timeout=10) == 0
        redis.lpush(worker_list, copy)
        wait_until(lambda: not redis.exists(worker_list), what="the copy's arrival")
        assert result.get(timeout=10) == 0
        (after,) = producer.send("tag")  # behind the copy, in the same slot
        assert after.get(timeout=10) == 1
        wait_until(lambda: "task-succeeded" in log.of(after.id), what="events")
    assert [run.seq for run in runs(history_path)] == [0, 1]
    assert result.state == states.SUCCESS
    assert log.of(result.id) == ["task-received", "task-started", "task-succeeded"]
    wait_until(lambda: producer.affinity.stats("jobs").entries == 0, what="the last settle")


def copy_of_the_running(redis: Redis) -> tuple[str, bytes]:
    """The worker's list, and the message as a heartbeat that found it missing sends it again."""
    (slot_key,) = redis.keys("{affinity:default}:s:*")
    incarnation, slot = slot_key.decode().split(":")[-2:]
    epoch, entry, place = redis.hmget(slot_key, "epoch", "e1", "p1")
    raw = redis.hget("{affinity:default}:q:jobs:m", entry)
    queues = redis.hget("{affinity:default}:w:" + incarnation + ":info", "queues")
    stamp = f"{entry.decode()} {epoch.decode()} 2r {incarnation} {slot} {place.decode()} 1 jobs"
    head, brace, rest = raw[1:].partition(b"{")
    return (
        queues.decode().split("\t")[2],
        raw[:1] + head + brace + f'"affinity_stamp": "{stamp}", '.encode() + rest,
    )


def test_a_copy_given_back_by_a_stop_leaves_no_event(
    cluster: Cluster, history_path: Path, producer: Producer
) -> None:
    stopped = cluster.worker(APP, "w1", queues="jobs", concurrency=2, environ=QUICK, extra=(*LEAN, "-E"))
    wait_for_nodes(producer.affinity, 1)
    with EventLog(producer.app) as log:
        first, second, *_ = producer.send("tag", 4, ms=500)
        # The second message waits at the slot's process while the first one runs.
        wait_until(lambda: "task-received" in log.of(second.id), what="the second message's arrival")
        cluster.worker(APP, "w2", queues="jobs", concurrency=2, environ=QUICK, extra=(*LEAN, "-E"))
        stopped.term()
        wait_until(lambda: "task-succeeded" in log.of(second.id), 20, "the second task's success")
        # Sooner than the 30 s for which a pool waits for an answer that nobody counts.
        assert stopped.wait(10) == 0
        wait_until(lambda: "task-succeeded" in log.of(first.id), what="the last event of the stopped")
    assert log.of(first.id) == ["task-received", "task-started", "task-succeeded"]
    assert log.of(second.id).count("task-started") == 1, log.of(second.id)
    assert runs(history_path)[1].worker == "w2@test"
