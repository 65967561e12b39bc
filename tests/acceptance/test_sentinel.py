"""Broker and ledger behind Sentinel: the master is killed, or demoted, under load."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from redis import Redis

from acceptance.support import (
    APP,
    LEAN,
    QUICK,
    WORKER_ONLY,
    Producer,
    assert_nobody_was_given_up,
    finished,
    start_under_a_beat,
    wait_for_run,
)
from harness import BROKER_VARIABLE, Cluster, wait_until
from history import History
from sentinels import Sentinels

pytestmark = [pytest.mark.acceptance, pytest.mark.servers]

TAGS = [f"tag-{number}" for number in range(6)]
SLOW = {**QUICK, "AFFINITY_HEARTBEAT_TIMEOUT": "8", "AFFINITY_HEARTBEAT_INTERVAL": "1"}


@pytest.fixture
def sentinels(tmp_path: Path) -> Iterator[Sentinels]:
    found = Sentinels(tmp_path / "sentinels")
    yield found
    found.close()


def start(cluster: Cluster, sentinels: Sentinels, monkeypatch: pytest.MonkeyPatch) -> Producer:
    told = {BROKER_VARIABLE: sentinels.url, "AFFINITY_TEST_MASTER": sentinels.options["master_name"]}
    cluster.environ |= told
    for name, value in told.items():
        monkeypatch.setenv(name, value)
    producer = Producer(sentinels.url)
    start_under_a_beat(cluster, producer, SLOW)
    return producer


@pytest.mark.proves("31: Sentinel failover, the master killed or demoted", "a new term, nobody is given up, nothing lost or doubled of what the replica had")
@pytest.mark.parametrize("how", ["killed", "demoted"])
def test_a_change_of_master_starts_a_new_term_and_gives_nobody_up(
    sentinels: Sentinels, cluster: Cluster, history_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    producer = start(cluster, sentinels, monkeypatch)
    before = producer.affinity.leader("jobs")
    producer.send_each(TAGS, 4, ms=20)
    producer.send("long", task="long", ms=16_000)
    wait_for_run(history_path, lambda run: run.tag == "long")
    wait_until(lambda: producer.affinity.stats("jobs").entries == 1, what="only the long one left")
    sentinels.first.client().execute_command("WAIT", 1, 5000)
    began = time.monotonic()
    if how == "killed":
        sentinels.first.kill()
    else:
        Redis(port=sentinels.ports[0]).execute_command("SENTINEL", "FAILOVER", "mymaster")
    sentinels.wait_for_failover()
    print(f"failover {time.monotonic() - began:.1f} s")
    if how == "demoted":  # what is written to it until it learns of that is lost
        sentinels.wait_for_demotion()
        print(f"demotion {time.monotonic() - began:.1f} s")
    producer.send_each(TAGS, 4, ms=20)
    found = finished(history_path, 50)
    print(f"all done {time.monotonic() - began:.1f} s")
    wait_until(lambda: producer.affinity.stats("jobs").entries == 0, what="all settled")
    assert found.reruns() == 0
    after = producer.affinity.leader("jobs")
    assert before and after and after.term > before.term
    assert_nobody_was_given_up(cluster)
    History.load(history_path).assert_lawful()


def test_a_heartbeat_timeout_shorter_than_the_failover_is_refused(
    tmp_path: Path, cluster: Cluster
) -> None:
    sentinels = Sentinels(tmp_path / "sentinels", down_after_ms=30_000)
    try:
        cluster.environ |= {BROKER_VARIABLE: sentinels.url, "AFFINITY_TEST_MASTER": "mymaster"}
        worker = cluster.worker(APP, queues="jobs", environ=WORKER_ONLY, extra=LEAN)
        beat = cluster.beat(APP)
        assert worker.wait(30) != 0
        says = "Set heartbeat_timeout to 33 s or more, or lower down-after-milliseconds"
        assert says in worker.log_text()
        beat.wait_for_log(says)
        assert "Scheduling affinity queue" not in beat.log_text()
    finally:
        sentinels.close()
