"""What a node is told by its command line and settings, and what it tells of its surroundings."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from redis import Redis

from acceptance.domains import Domain
from acceptance.support import (
    APP,
    LEAN,
    QUICK,
    WORKER_ONLY,
    Producer,
    runs,
    wait_for_nodes,
)
from celery_affinity.embedded import Server
from harness import Cluster, wait_for_ends, wait_until
from history import History
from pools import POOLS

pytestmark = pytest.mark.acceptance

NOBODY = "Nobody schedules the affinity queue 'jobs'"
TAGS = [f"tag-{number}" for number in range(8)]


@pytest.fixture
def redis(server: Server) -> Redis:
    return server.client()


@pytest.mark.parametrize("pool", POOLS)
def test_the_command_line_goes_before_the_environment_on_every_pool(
    cluster: Cluster, history_path: Path, producer: Producer, redis: Redis, pool: str
) -> None:
    """A worker that was told to be only that never schedules; one that schedules runs nothing."""
    both = {**QUICK, "AFFINITY_ROLE": "both"}
    worker = cluster.worker(
        APP, "worker", queues="jobs", concurrency=2, pool=pool, environ=both, real=pool == "prefork",
        extra=(*LEAN, "--affinity-role", "worker"),
    )
    worker.wait_for_log(NOBODY, 60)
    assert ".> role: worker (--affinity-role)" in worker.log_text()
    assert producer.affinity.leader("jobs") is None

    scheduler = cluster.worker(
        APP, "scheduler", queues="ordinary", concurrency=1, pool=pool, environ=both,
        extra=(*LEAN, "--affinity-role=scheduler"), real=pool == "prefork",
    )
    producer.send_each(TAGS, 5)
    wait_for_ends(history_path, 40)

    History.load(history_path).assert_lawful()
    assert {run.worker for run in runs(history_path)} == {"worker@test"}
    assert ".> role: scheduler (--affinity-role)" in scheduler.log_text()
    leader = producer.affinity.leader("jobs")
    assert leader is not None and leader.leader.startswith("scheduler@test/")
    assert redis.hget(f"{{affinity:default}}:w:{producer.affinity.workers()[0].worker_id}:info",
                      "role") == b"worker"


def test_a_scheduler_that_stops_hands_over_at_once(cluster: Cluster, producer: Producer) -> None:
    slow = {"AFFINITY_LEADER_TTL": "600"}
    first, second = (
        cluster.worker(APP, name, queues="ordinary", pool="solo", environ=slow,
                       extra=(*LEAN, "--affinity-role", "scheduler"))
        for name in ("s1", "s2")
    )
    leader = wait_until(lambda: producer.affinity.leader("jobs"), 60, "a leader")
    cluster.wait_ready()
    if leader.leader.startswith("s2"):
        first, second = second, first
    first.term()
    assert first.wait() == 0
    wait_until(
        lambda: (now := producer.affinity.leader("jobs")) and now.leader.startswith(second.name),
        60, "the other scheduler",
    )


def test_the_banner_of_worker_and_beat_shows_the_origin_of_each_setting(
    cluster: Cluster, tmp_path: Path, producer: Producer
) -> None:
    (tmp_path / "celeryconfig.py").write_text(
        f"broker_url = {cluster.broker_url!r}\n"
        "broker_connection_retry_on_startup = True\n"
        "affinity_role = 'worker'\naffinity_leader_ttl = 3\naffinity_heartbeat_timeout = 9\n"
        "affinity_queues = {'jobs': {'max_batch_size': 4}}\n"
    )
    (tmp_path / "origins.py").write_text(
        "from celery import Celery\nfrom celery_affinity import Affinity\n"
        "app = Celery('origins')\n"
        "affinity = Affinity(app, heartbeat_timeout=8, namespace='origins')\n"
        "app.config_from_object('celeryconfig')\n"
    )
    environ = {"AFFINITY_NAMESPACE": "elsewhere"}
    role = ("--affinity-role", "both")
    worker = cluster.worker("origins", pool="solo", environ=environ, extra=(*LEAN, *role), real=True)
    beat = cluster.beat("origins", environ=environ, extra=role, real=True)
    configured = cluster.worker("origins", "w2", pool="solo", extra=LEAN)
    cluster.wait_ready()
    for node in (worker, beat):
        node.wait_for_log("jobs(max_batch_size=4) (app.conf.affinity_queues)")
        lines = re.sub(r"[ .>]*(\w+: .*)", r"\1", node.log_text()).splitlines()
        assert "leader_ttl: 3.0 (app.conf.affinity_leader_ttl)" in lines
        assert "heartbeat_timeout: 8.0 (Affinity(...) heartbeat_timeout)" in lines
        assert "namespace: elsewhere (AFFINITY_NAMESPACE)" in lines
        assert "role: both (--affinity-role)" in lines
        assert "heartbeat_interval:" not in node.log_text()
    configured.wait_for_log(".> role: worker (app.conf.affinity_role)")
    assert ".> namespace: origins (Affinity(...) namespace)" in configured.log_text()


def test_a_beat_cannot_have_the_role_of_a_worker(cluster: Cluster) -> None:
    beat = cluster.beat(APP, extra=("--affinity-role", "worker"))
    assert beat.wait(40) == 2
    assert "'worker' is not one of 'scheduler', 'both'" in beat.log_text()


def test_a_worker_without_a_leader_says_once_what_to_start_and_when_there_is_one(
    cluster: Cluster, history_path: Path, producer: Producer, redis: Redis
) -> None:
    worker = cluster.worker(
        APP, queues="jobs", environ={**QUICK, **WORKER_ONLY}, extra=LEAN
    ).wait_ready()
    worker.wait_for_log(NOBODY)
    said = worker.log_text()
    assert "`celery -A <app> beat -S affinity`" in said and "`--affinity-role both`" in said
    wait_until(lambda: beats(redis, producer) >= 10, 60, "many more beats than two ttls take")
    assert worker.log_text().count(NOBODY) == 1
    assert "cmdstat_mget" in redis.info("commandstats")

    beat = cluster.beat(APP, environ=QUICK)
    worker.wait_for_log("'jobs' is scheduled again, by beat@", 60)
    producer.send("a", 3)
    wait_for_ends(history_path, 3)
    beat.kill9()
    wait_until(lambda: worker.log_text().count(NOBODY) == 2, 60, "a second warning")
    assert worker.log_text().count("is scheduled again") == 1


@pytest.mark.proves(
    "44: two workers of one name",
    "both work, with queues of their own; the newcomer warns",
)
def test_two_workers_of_one_name_both_work_and_the_newcomer_says_so_once(
    cluster: Cluster, history_path: Path, producer: Producer, tmp_path: Path
) -> None:
    (tmp_path / "second").mkdir()
    elder = cluster.worker(APP, "same", queues="jobs", concurrency=2, environ=QUICK, extra=LEAN)
    wait_for_nodes(producer.affinity, 1)
    cluster.directory = tmp_path / "second"  # its log is a file of that name too
    newcomer = cluster.worker(APP, "same", queues="jobs", concurrency=2, environ=QUICK, extra=LEAN)
    wait_for_nodes(producer.affinity, 2)
    assert {worker.name for worker in producer.affinity.workers()} == {"same@test"}
    assert len({worker.worker_id for worker in producer.affinity.workers()}) == 2

    for _ in range(5):
        producer.send_each(TAGS, 5, ms=5)
    newcomer.wait_for_log("Another running worker is named 'same@test' too")
    wait_for_ends(history_path, producer.sent)

    History.load(history_path).assert_lawful()
    for node in (elder, newcomer):
        assert {run.pid for run in runs(history_path)} & set(node.children()), f"{node} ran nothing"
    elder.term()
    assert elder.wait() == 0
    producer.send_each(TAGS, 5)
    wait_for_ends(history_path, producer.sent)
    History.load(history_path).assert_lawful()
    assert newcomer.log_text().count("Another running worker") == 1
    assert "Another running worker" not in elder.log_text()


@pytest.mark.proves(
    "44: a killed worker comes back under its name",
    "it works; no warning",
)
def test_a_worker_that_comes_back_after_a_kill_meets_no_namesake(
    cluster: Cluster, producer: Producer, redis: Redis
) -> None:
    """Its predecessor is registered until its heartbeat is overdue, but silent."""
    patient = {**QUICK, "AFFINITY_HEARTBEAT_TIMEOUT": "600"}
    worker = cluster.worker(APP, queues="jobs", environ=patient, extra=LEAN)
    wait_for_nodes(producer.affinity, 1)
    (killed,) = producer.affinity.workers()
    worker.destroy()
    worker.start()
    wait_for_nodes(producer.affinity, 2)
    wait_until(
        lambda: (leader := producer.affinity.leader("jobs")) and f"/{worker.pid}/" in leader.leader,
        60, "its term",
    )
    seen = beats(redis, producer, but=killed.worker_id)
    wait_until(lambda: beats(redis, producer, but=killed.worker_id) >= seen + 3, 60, "some beats")
    assert "Another running worker" not in worker.log_text()
    # With role "both" it does not ask who leads: it campaigns.
    assert "cmdstat_mget" not in redis.info("commandstats")


def test_a_worker_of_two_affinity_queues_is_no_namesake_of_itself(
    cluster: Cluster, history_path: Path, redis: Redis
) -> None:
    shop = Domain(cluster)
    worker = shop.worker(queues=[shop.invoices, shop.reports])
    wait_for_nodes(shop.affinity, 1)
    wait_until(lambda: beats(redis, shop, namespace=shop.name) >= 4, 60, "some beats")
    for queue in (shop.invoices, shop.reports):
        shop.send(queue, "a")
    wait_for_ends(history_path, 2)
    assert "Another running worker" not in worker.log_text()


def beats(
    redis: Redis, system: Producer | Domain, but: str = "", namespace: str = "default"
) -> int:
    """How often a worker has reported; there is one, except `but`."""
    (worker,) = [w.worker_id for w in system.affinity.workers() if w.worker_id != but]
    beat = redis.hget(f"{{affinity:{namespace}}}:w:{worker}:info", "beat") or b"0.0"
    return int(beat.split(b".")[1])
