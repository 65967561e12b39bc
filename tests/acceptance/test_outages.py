"""Redis that goes, comes back, or drops its connections: nothing is lost, and little is said."""

from __future__ import annotations

import random
import time
from pathlib import Path

import psutil
import pytest

from acceptance.support import (
    APP,
    LEAN,
    QUICK,
    WORKER_ONLY,
    Producer,
    finished,
    leading,
    runs,
    start,
    starts_are,
    wait_for_nodes,
)
from celery_affinity.embedded import Server
from harness import Cluster, Node, wait_for_ends, wait_until
from history import History

pytestmark = pytest.mark.acceptance

TAGS = [f"tag-{number}" for number in range(8)]
#: What the library logs when Redis goes, and when it is back; one line each for every part of a
#: node: its heartbeat, its scheduler, the gates of its processes.
GONE, BACK = "does not answer (", "answers again"


@pytest.fixture
def server(aof_server: Server) -> Server:
    """Every server here loses no write when it is killed."""
    return aof_server


def lines(node: Node, text: str) -> list[str]:
    return [line for line in node.log_text(all_starts=True).splitlines() if text in line]


@pytest.mark.proves(
    "25: all connections are killed",
    "nothing is lost or run twice",
)
def test_a_reconnected_worker_loses_nothing(
    cluster: Cluster, server: Server, history_path: Path, producer: Producer
) -> None:
    workers = start(cluster, "w1", "w2")
    wait_for_nodes(producer.affinity, 2)
    producer.send_each(TAGS * 3, 10, ms=12)
    client = server.client()
    for cut in range(1, 5):
        wait_until(starts_are(history_path, cut * 40), what=f"{cut * 40} starts")
        client.client_kill_filter(_type="normal", skipme=True)

    wait_for_ends(history_path, producer.sent)
    history = History.load(history_path)
    history.assert_lawful()
    assert history.reruns() == 0
    again = sum(line.count("sent again") for node in workers for line in lines(node, "sent again"))
    reconnects = [len(lines(node, "Connected to redis")) - 1 for node in workers]
    print(f"reconnects {reconnects}, {again} beats that had messages sent again")
    assert min(reconnects) >= 1
    assert all(node.alive for node in workers)


@pytest.mark.proves(
    "4, 6, 14: Redis, workers and beats are killed and started again",
    "nothing is lost",
)
def test_everything_restarted_at_once_loses_nothing(
    cluster: Cluster, server: Server, history_path: Path, producer: Producer
) -> None:
    nodes = start(cluster, "w1", "w2")
    beat = cluster.nodes[-1]
    wait_for_nodes(producer.affinity, 2)
    producer.send_each(TAGS * 2, 10, ms=20)
    wait_until(starts_are(history_path, 30), what="30 starts")

    for node in (*nodes, beat):
        node.destroy()
    server.kill()
    server.start()
    restarted = time.monotonic()
    for node in (*nodes, beat):
        node.start()

    history = finished(history_path)
    last = max(run.end or 0 for run in history.runs) / 1e9
    print(f"all done {last - restarted:.2f} s after the restart; {history.reruns()} reruns")
    assert history.reruns() <= 4, "one for each slot"
    wait_for_nodes(producer.affinity, 2)


@pytest.mark.proves(
    "14: Redis is down when a worker starts",
    "it waits and works then",
)
@pytest.mark.parametrize("pool", ["prefork", "threads"])
def test_redis_down_at_start_is_waited_for(
    cluster: Cluster, server: Server, history_path: Path, producer: Producer, pool: str
) -> None:
    producer.send_each(TAGS, 5)
    server.kill()
    worker = cluster.worker(
        APP, queues="jobs", concurrency=2, pool=pool, environ={**QUICK, **WORKER_ONLY}, extra=LEAN
    )
    beat = cluster.beat(APP, environ=QUICK)
    worker.wait_for_log("Cannot connect to redis")
    beat.wait_for_log(GONE)
    # Long enough for the scheduler, which tries every half second, to say it again if it did;
    # and longer than Celery gives a new process to come up.
    wait_until(lambda: len(lines(worker, "Cannot connect to redis")) >= 2, 20, "more tries")

    server.start()
    wait_for_ends(history_path, producer.sent)
    History.load(history_path).assert_lawful()
    wait_until(lambda: len(lines(beat, BACK)) >= 2, what="both to go on")
    print([line for node in (worker, beat) for line in lines(node, GONE) + lines(node, BACK)])
    # One of the queue's scheduler, one of the periodic tasks.
    assert len(lines(beat, GONE)) == len(lines(beat, BACK)) == 2
    assert worker.alive
    assert not lines(worker, "Timed out waiting for UP message")
    assert not lines(worker, "exited with")
    assert "Traceback" not in beat.log_text()


@pytest.mark.proves(
    "14, 18: Redis is killed or frozen and comes back",
    "workers and leader wait; nothing is lost",
)
@pytest.mark.parametrize("how", ["killed", "paused"])
def test_redis_that_goes_in_the_middle_is_waited_for(
    cluster: Cluster, server: Server, history_path: Path, producer: Producer, how: str
) -> None:
    (worker,) = start(cluster, "w1", beat=False)
    wait_for_nodes(producer.affinity, 1)
    leading(producer.affinity, [worker])
    random.seed(1)
    producer.send_each(TAGS * 2, 10, ms=random.uniform(5, 15))
    wait_until(starts_are(history_path, 30), what="30 starts")

    if how == "killed":
        server.kill()
        wait_until(lambda: len(lines(worker, GONE)) >= 2, what="the scheduler and a heartbeat")
        started = len(runs(history_path))
        # Another try of Celery's own connection, which waits 2 s and then 4 s.
        wait_until(lambda: len(lines(worker, "Trying again in 4")) >= 1, what="another try")
        assert len(runs(history_path)) == started, "nothing starts without the ledger"
        server.start()
    else:
        server.pause()
        time.sleep(3)  # not for synchronisation: the length of the outage, past the timeouts
        server.resume()

    history = finished(history_path)
    gone, back = lines(worker, GONE), lines(worker, BACK)
    print(f"{how}: {history.reruns()} reruns, {len(gone)} lines gone, {len(back)} lines back")
    assert worker.alive
    # One line for each part that noticed: heartbeat, scheduler, two processes.
    assert len(gone) <= 4, gone
    wait_until(lambda: len(lines(worker, BACK)) == len(gone), what="as many lines that it is back")
    assert "Scheduling of 'jobs' failed" not in worker.log_text()
    assert history.reruns() == 0 or how == "paused"


@pytest.mark.proves(
    "15: Redis' process is killed with appendfsync everysec, three times",
    "nothing is lost: the operating system has what was written (a machine without power may lose 2 s)",
)
def test_a_redis_that_is_killed_with_appendfsync_everysec_loses_nothing(
    cluster: Cluster, server: Server, history_path: Path, producer: Producer
) -> None:
    start(cluster, "w1", "w2")
    wait_for_nodes(producer.affinity, 2)
    for kill in range(3):
        assert server.client().config_set("appendfsync", "everysec")
        producer.send_each(TAGS * 2, 10, ms=10)
        wait_until(starts_are(history_path, 60 * (kill + 1)), what=f"{60 * (kill + 1)} starts")
        server.kill()
        server.start()
    assert finished(history_path).reruns() == 0


@pytest.mark.proves(
    "25: connections are killed while a result is half read",
    "the slot and its tag go on",
)
def test_a_connection_that_is_lost_while_a_result_is_read_does_not_wedge_the_slot(
    cluster: Cluster, server: Server, history_path: Path, producer: Producer
) -> None:
    import acceptance.apps.bulky  # noqa: F401  (registers its task)

    worker = cluster.worker("acceptance.apps.bulky", queues="jobs", environ=QUICK, extra=LEAN)
    wait_for_nodes(producer.affinity, 1)
    worker.wait_ready()
    parent = psutil.Process(worker.pid)

    def has_read() -> int:
        return int(parent.io_counters().read_chars)

    before = has_read()
    producer.send("bulky", task="bulky")
    wait_for_ends(history_path, 1)
    child = psutil.Process(runs(history_path)[0].pid)
    wait_until(lambda: has_read() > before + 5_000_000, what="the reading of its result")
    child.suspend()
    assert has_read() < before + 150_000_000, "all of it was read: raise its size"
    server.client().client_kill_filter(_type="normal", skipme=True)
    worker.wait_for_log("Connection to broker lost")
    wait_until(lambda: worker.log_text().count("Serving 'jobs'") == 2, what="the reconnect")
    child.resume()

    producer.send("after")

    wait_for_ends(history_path, 2, 40)
    History.load(history_path).assert_lawful()
