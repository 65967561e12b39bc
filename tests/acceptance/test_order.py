"""Order and exclusion: what one tag may count on, however many nodes and processes there are."""

from __future__ import annotations

import json
import random
import threading
import time
from collections import Counter
from datetime import datetime, timedelta, timezone
from itertools import pairwise
from pathlib import Path

import pytest
from redis import Redis

from acceptance.support import APP, LEAN, QUICK, Producer, leading, per_second, start
from celery_affinity.embedded import Server
from harness import Cluster, allowed, wait_for_ends
from history import History, Run
from pools import long

pytestmark = pytest.mark.acceptance

TAGS, BURSTS, BURST = 30, 20, 5


@pytest.mark.parametrize("pool, concurrency", [("prefork", 2), ("threads", 2), pytest.param("solo", 1, marks=long), pytest.param("gevent", 4, marks=long)])
def test_one_queue_one_worker_one_tag_runs_in_order(
    cluster: Cluster, history_path: Path, producer: Producer, pool: str, concurrency: int
) -> None:
    cluster.worker(
        APP, queues="jobs", pool=pool, concurrency=concurrency, extra=LEAN
    ).wait_ready()
    for _ in range(10):
        producer.send("only", BURST, ms=random.uniform(0, 4))

    wait_for_ends(history_path, producer.sent)
    history = History.load(history_path)
    history.assert_lawful()
    assert history.reruns() == 0


def test_thirty_tags_on_three_nodes_lose_double_overlap_and_reorder_nothing(
    cluster: Cluster, history_path: Path, producer: Producer
) -> None:
    start(cluster, "w1", "w2", "w3")
    cluster.wait_ready()
    randomness = random.Random(2)
    tags = [f"tag-{number}" for number in range(TAGS)]
    for _ in range(BURSTS):
        for tag in randomness.sample(tags, TAGS):
            producer.send(tag, BURST, ms=randomness.uniform(0, 6))

    wait_for_ends(history_path, TAGS * BURSTS * BURST)
    history = History.load(history_path)
    history.assert_lawful()  # also: each lease in one process of one node
    assert history.reruns() == 0
    switches = history.owner_switches("worker")
    moved = [
        (before, after) for of_tag in history.by_tag().values() for before, after in pairwise(of_tag)
        if before.worker != after.worker and before.epoch == after.epoch
    ]
    assert not moved, "owner switches happen only between leases"
    lengths = list(history.lease_lengths().values())
    counts = Counter(run.worker for run in history.runs)
    print(
        f"{len(history.runs)} tasks, {per_second(history):.0f}/s, {len(lengths)} leases of "
        f"{sum(lengths) / len(lengths):.1f} on average (max {max(lengths)}); owner switches a tag "
        f"{min(switches.values())}-{max(switches.values())}, tasks a node {dict(counts)}"
    )


def test_a_single_worker_schedules_for_itself(
    cluster: Cluster, history_path: Path, producer: Producer
) -> None:
    worker = cluster.worker(APP, queues="jobs", concurrency=2, extra=LEAN)
    for _ in range(4):
        producer.send_each((f"tag-{number}" for number in range(10)), BURST)

    wait_for_ends(history_path, producer.sent)
    History.load(history_path).assert_lawful()
    assert leading(producer.affinity, [worker]) is worker


@pytest.mark.parametrize("slot_is_process", [True, False])
def test_all_tasks_of_a_lease_run_in_one_process(
    cluster: Cluster, history_path: Path, producer: Producer, slot_is_process: bool
) -> None:
    producer.send_each([f"tag-{number}" for number in range(8)] * 5, 10, ms=1)
    cluster.worker(
        APP, queues="jobs", concurrency=4, extra=LEAN,
        environ={"AFFINITY_SLOT_IS_PROCESS": str(slot_is_process).lower()},
    )

    wait_for_ends(history_path, producer.sent)
    history = History.load(history_path)
    history.assert_lawful(lease_within="process" if slot_is_process else "worker")
    share = main_process_share(history)
    print(f"slot_is_process={slot_is_process}: {share:.1%} ran in their lease's main process")
    # By chance one of four processes gets a quarter; the stock pool reuses the last one often.
    assert share == 1 if slot_is_process else share < 1


def main_process_share(history: History) -> float:
    """Share of tasks that ran in the process that ran most of their lease."""
    leases: dict[tuple[str, int | None], Counter[int]] = {}
    for run in history.runs:
        leases.setdefault((run.tag, run.epoch), Counter())[run.pid] += 1
    return sum(max(pids.values()) for pids in leases.values()) / len(history.runs)


class Starts:
    """The entries in the order in which their gates opened: what Redis itself saw."""

    def __init__(self, url: str) -> None:
        self.entries: list[int] = []
        self._client = Redis.from_url(url, socket_timeout=None)
        self._monitor = self._client.monitor()
        self._monitor.__enter__()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        script: list[str] = []
        while True:
            try:
                seen = self._monitor.next_command()
            except Exception:
                return  # the server has gone
            words = seen["command"].split(" ")
            if seen["client_type"] != "lua":
                script = words
            elif words[0].upper() == "HSET" and words[2:5:2] == ["k1", "began"]:
                # EVALSHA sha 1 prefix incarnation slot entry ...: this one may start
                self.entries.append(int(script[6]))


def test_a_tag_with_concurrency_three_never_exceeds_it_and_starts_in_order(
    cluster: Cluster, server: Server, history_path: Path, producer: Producer
) -> None:
    environ = {**QUICK, "AFFINITY_TEST_QUEUE": json.dumps({"tag_concurrency": 3})}
    opened = Starts(server.url())
    for name in ("w1", "w2"):
        cluster.worker(APP, name, queues="jobs", concurrency=2, extra=LEAN, environ=environ)
    cluster.wait_ready()
    producer.send("wide", 80, ms=20)

    wait_for_ends(history_path, 80)
    history = History.load(history_path)
    # A start is recorded after its gate opened: the order of the gates is what is promised.
    found = [v for v in history.violations(concurrency=3) if v.kind != "order"]
    assert not found, found
    peak = most_at_once(history.runs)
    print(f"at once: {peak}; {per_second(history):.0f} tasks of 20 ms a second")
    assert 1 < peak <= 3
    assert len(opened.entries) == 80
    assert opened.entries == sorted(opened.entries)


def most_at_once(found: list[Run]) -> int:
    """The most runs that overlap."""
    edges = sorted(edge for run in found for edge in ((run.start, 1), (run.end or run.start, -1)))
    now = most = 0
    for _, change in edges:
        now += change
        most = max(most, now)
    return most


def test_priorities_reach_the_ledger_most_urgent_first(
    cluster: Cluster, history_path: Path, producer: Producer
) -> None:
    for priority in range(9, -1, -1):
        producer.send(f"p{priority}", priority=priority)
    cluster.worker(APP, queues="jobs", concurrency=1, extra=LEAN)

    wait_for_ends(history_path, 10)
    history = History.load(history_path)
    history.assert_lawful()
    # Redis has four lists for ten priorities (0 is the most urgent): 0-2, 3-5, 6-8, 9.
    steps = [int(run.tag[1:]) // 3 for run in history.runs]
    assert steps == sorted(steps), [run.tag for run in history.runs]


def test_tasks_with_a_due_time_run_not_before_it_and_soon_after(
    cluster: Cluster, history_path: Path, producer: Producer
) -> None:
    cluster.worker(APP, queues="jobs", concurrency=2, extra=LEAN).wait_ready()
    offset = time.monotonic() - time.time()
    east = timezone(timedelta(hours=5, minutes=30))
    due: dict[str, float] = {}
    for number, seconds in enumerate((2.0, 0.7, 1.5, 0.3)):
        tag = f"later-{number}"
        due[tag] = time.monotonic() + seconds
        if number % 2:
            producer.send(tag, countdown=seconds)
        else:
            producer.send(tag, eta=datetime.fromtimestamp(due[tag] - offset, east))
    producer.send("later-1")  # what is not due holds up nobody

    wait_for_ends(history_path, producer.sent)
    soon = allowed(1)
    history = History.load(history_path)
    late = {
        run.tag: run.start / 1e9 - due[run.tag]
        for run in history.runs if (run.tag, run.seq) != ("later-1", 1)
    }
    print("late by", {tag: f"{seconds * 1000:.0f} ms" for tag, seconds in late.items()})
    assert all(-0.002 <= seconds < soon for seconds in late.values()), late
    assert history.by_tag()["later-1"][0].seq == 1
