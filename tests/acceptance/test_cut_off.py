"""One part alone is in trouble: a leader that is cut off, no schedulers at all, a blocked event loop,
connections that are reset, an idle process or a producer that is killed.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import acceptance.apps.blocking  # noqa: F401  (the test's producer knows its task)
from acceptance.support import (
    APP,
    HEARTBEAT_TIMEOUT_SECONDS,
    LEADER_TTL_SECONDS,
    LEAN,
    QUICK,
    WORKER_ONLY,
    Producer,
    assert_nobody_was_given_up,
    finished,
    leading,
    slots,
    start,
    start_under_a_beat,
    starts_are,
    wait_for_nodes,
    wait_for_run,
)
from celery_affinity.embedded import Server
from chaos.proxy import Proxy
from harness import BROKER_VARIABLE, Cluster, allowed, wait_until
from history import History, record

pytestmark = pytest.mark.acceptance

TAGS = [f"tag-{number}" for number in range(6)]


@pytest.fixture
def proxy(server: Server) -> Iterator[Proxy]:
    proxy = Proxy(server.port)
    yield proxy
    proxy.close()


# One that hears no answers may renew once more.
@pytest.mark.parametrize("verb, terms", [("blackhole", 1), ("drop_replies", 2)])
@pytest.mark.proves(
    "30: only the leader is cut off, or hears no answers",
    "another one leads within leader_ttl + 1 s (with lost answers twice that); back, it changes nothing and stands by",
)
def test_a_leader_that_is_cut_off_is_replaced_and_changes_nothing_later(
    cluster: Cluster, history_path: Path, producer: Producer, proxy: Proxy, verb: str, terms: int
) -> None:
    cluster.worker(APP, queues="jobs", concurrency=2, environ={**QUICK, **WORKER_ONLY}, extra=LEAN)
    cut_off = cluster.beat(APP, "cut-off", environ={**QUICK, BROKER_VARIABLE: proxy.url()})
    wait_for_nodes(producer.affinity, 1)
    assert leading(producer.affinity, [cut_off]) is cut_off
    other = cluster.beat(APP, "other", environ=QUICK)
    other.wait_ready()
    producer.send_each(TAGS, 20, ms=10)
    wait_until(starts_are(history_path, 10), what="10 starts")

    getattr(proxy, verb)()
    cut_at = time.monotonic()
    assert leading(producer.affinity, [other]) is other
    took = time.monotonic() - cut_at
    assert took <= terms * LEADER_TTL_SECONDS + allowed(1), took
    producer.send_each([f"{tag}-new" for tag in TAGS], 3)
    finished(history_path)
    term = producer.affinity.leader("jobs")
    proxy.heal()

    producer.send_each(TAGS, 5, ms=10)
    history = finished(history_path)
    assert history.reruns() == 0
    cut_off.wait_for_log("No longer scheduling 'jobs': the term is over")
    now = producer.affinity.leader("jobs")
    assert term is not None and now is not None
    assert (now.leader, now.term) == (term.leader, term.term), "no further change of leaders"
    assert cut_off.alive
    assert_nobody_was_given_up(cluster)


@pytest.mark.proves("8: all schedulers are gone for longer than a lease", "what is dispatched goes on; nothing is lost; nobody is given up later")
def test_without_any_scheduler_batches_go_on_and_the_next_one_finds_everything(
    cluster: Cluster, history_path: Path, producer: Producer
) -> None:
    cluster.worker(APP, queues="jobs", concurrency=2, environ={**QUICK, **WORKER_ONLY}, extra=LEAN)
    beat = cluster.beat(APP, environ=QUICK)
    wait_for_nodes(producer.affinity, 1)
    producer.send_each(TAGS, 8, ms=20)
    wait_until(lambda: producer.affinity.stats("jobs").pending == 0, what="that all is admitted")
    beat.kill9()
    producer.send_each([f"{tag}-new" for tag in TAGS], 2)

    wait_until(
        lambda: {(tag, seq) for tag in TAGS for seq in range(8)}
        <= {(run.tag, run.seq) for run in History.load(history_path).runs if run.is_done},
        what="the end of all that was admitted",
    )
    time.sleep(2 * HEARTBEAT_TIMEOUT_SECONDS)  # the length of the trouble
    assert producer.affinity.stats("jobs").pending == 2 * len(TAGS)
    cluster.beat(APP, "beat-2", environ=QUICK)

    assert finished(history_path).reruns() == 0
    assert_nobody_was_given_up(cluster)


@pytest.mark.parametrize("pool", ["solo", "gevent"])
@pytest.mark.proves("12: a worker's event loop is blocked for 10 heartbeats", "it keeps its leases: no rescue, one run")
def test_a_task_that_blocks_the_event_loop_does_not_cost_the_lease(
    cluster: Cluster, history_path: Path, producer: Producer, pool: str
) -> None:
    for name in ("w1", "w2"):
        cluster.worker(
            "acceptance.apps.blocking", name, queues="jobs", pool=pool,
            environ={**QUICK, **WORKER_ONLY}, extra=LEAN,
        )  # fmt: skip
    cluster.beat(APP, environ=QUICK)
    wait_for_nodes(producer.affinity, 2)
    producer.send("blocked", task="blocking", ms=10 * 1000 * float(QUICK["AFFINITY_HEARTBEAT_INTERVAL"]))
    producer.send("blocked", 2)
    wait_for_run(history_path, lambda run: run.tag == "blocked")
    producer.send_each(TAGS, 2)

    assert finished(history_path).reruns() == 0
    assert_nobody_was_given_up(cluster)


@pytest.mark.proves("26: connections are reset (RST) under load", "nothing is lost or run twice")
def test_connections_that_are_reset_lose_and_double_nothing(
    cluster: Cluster, history_path: Path, producer: Producer, proxy: Proxy
) -> None:
    start_under_a_beat(cluster, producer, {**QUICK, BROKER_VARIABLE: proxy.url()})
    producer.send_each(TAGS * 4, 10, ms=12)
    for cut in range(1, 6):
        wait_until(starts_are(history_path, cut * 35), what=f"{cut * 35} starts")
        proxy.reset()

    assert finished(history_path).reruns() == 0
    wait_until(lambda: producer.affinity.stats("jobs").entries == 0, what="the last settle")
    assert all(node.alive for node in cluster.nodes)
    assert_nobody_was_given_up(cluster)


@pytest.mark.proves("1: an idle pool process is killed", "its slot is back; nothing is lost")
def test_a_slot_whose_idle_process_is_killed_is_back(
    cluster: Cluster, history_path: Path, producer: Producer
) -> None:
    (worker,) = start(cluster, "w1")
    wait_for_nodes(producer.affinity, 1)
    worker.wait_ready()
    victims = worker.children()
    assert len(victims) == 2
    for victim in victims:
        os.kill(victim, signal.SIGKILL)
    producer.send_each(TAGS, 3, ms=200)

    wait_until(lambda: all(slot.current_identify_tag for slot in slots(producer.affinity)), what="both slots at work")
    history = finished(history_path)
    assert history.reruns() == 0
    assert not {run.pid for run in history.runs} & set(victims)


SENDER = """
import sys
from itertools import count
from acceptance.support import Producer
producer = Producer(sys.argv[1])
print("up", flush=True)
for seq in count():
    producer.app.tasks["jobs.work"].delay("tag", seq)
    print(seq, flush=True)
"""


@pytest.mark.proves("50: a producer is killed while it sends", "each task whose publish returned runs once, in order; of the one under way all or nothing is there")
def test_what_a_killed_producer_had_sent_runs_once_and_in_order(
    cluster: Cluster, history_path: Path, producer: Producer
) -> None:
    start(cluster, "w1")
    wait_for_nodes(producer.affinity, 1)
    sender = subprocess.Popen(
        [sys.executable, "-c", SENDER, cluster.broker_url],
        env=cluster.environ, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert sender.stdout is not None
    returned = 0
    for line in sender.stdout:
        returned += line.strip().isdecimal()
        if returned == 100:
            sender.kill()
    sender.wait()
    for seq in range(returned):
        record("submit", tag="tag", seq=seq)

    def is_worked_off() -> bool:
        stats = producer.affinity.stats("jobs")
        return stats.pending == stats.entries == 0

    wait_until(is_worked_off, what="that all is worked off")
    history = finished(history_path)
    assert [run.seq for run in history.runs] in (list(range(returned)), list(range(returned + 1)))
