"""Periodic tasks: one beat sends them, no interval twice, none skipped.

SECONDS=60 python -m pytest tests/acceptance/test_periodic.py -k three_beat_kills
"""

from __future__ import annotations

import os
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
from redis import Redis

from acceptance.support import LEAN, QUICK, WORKER_ONLY, Producer, runs
from celery_affinity.embedded import Server
from celery_affinity.keys import Keys
from harness import Cluster, Node, wait_until

pytestmark = pytest.mark.acceptance

APP = "acceptance.apps.periodic"
KEYS = Keys("default")
STATE = Keys.beat_state("affinity_app")
SECOND = 1_000_000
#: How long the law of the kills goes on.
SECONDS = float(os.environ.get("SECONDS", "15"))


@pytest.fixture
def redis(server: Server) -> Redis:
    return server.client()


def dues(history_path: Path, tag: str = "tick") -> list[int]:
    """Due times of the runs so far, in the order of their starts."""
    return [run.seq for run in runs(history_path) if run.tag == tag] if history_path.exists() else []


def wait_for_dues(history_path: Path, count: int, tag: str = "tick") -> list[int]:
    wait_until(lambda: len(dues(history_path, tag)) >= count, 40 + count, f"{count} runs of {tag}")
    return dues(history_path, tag)


def sender(redis: Redis, beats: list[Node]) -> Node:
    """Wait for a beat that is elected; which of them it is."""
    pids = {str(beat.pid): beat for beat in beats if beat.alive}

    def elected() -> Node | None:
        fence = redis.get(KEYS.queue(STATE, "leader"))
        return pids.get(fence.decode().split("/")[1]) if fence else None

    return wait_until(elected, 40, "an elected beat")  # type: ignore[return-value]


def assert_each_second_once(found: list[int]) -> None:
    twice = [due for due, times in Counter(found).items() if times > 1]
    assert not twice, f"ran twice: {twice}"
    assert found == sorted(found)
    steps = Counter(later - earlier for earlier, later in pairwise(found))
    assert set(steps) == {SECOND}, f"steps in us: {steps}"


def start_worker(cluster: Cluster, role: dict[str, str] = WORKER_ONLY) -> Node:
    return cluster.worker(
        APP, queues="jobs,ordinary", concurrency=2, environ={**QUICK, **role}, extra=LEAN
    )


@pytest.mark.proves(
    "6: the beat that sends periodic tasks is killed, three times",
    "no interval is sent twice or skipped",
)
def test_no_interval_is_sent_twice_or_skipped_over_three_beat_kills(
    cluster: Cluster, history_path: Path, redis: Redis
) -> None:
    start_worker(cluster)
    beats = [cluster.beat(APP, f"beat{n}", environ=QUICK) for n in range(3)]
    first, *_ = wait_for_dues(history_path, 2)
    killed = []
    for kill in range(1, 4):
        until = first + kill * SECONDS / 4 * SECOND
        wait_until(lambda: dues(history_path)[-1] >= until, 40 + SECONDS)  # noqa: B023
        victim = sender(redis, beats)
        victim.kill9()
        killed.append(victim.name)
        at = time.time() * SECOND
        wait_until(lambda: dues(history_path)[-1] > at, 40, "runs after the kill")  # noqa: B023
        victim.start()
    wait_until(lambda: dues(history_path)[-1] >= first + SECONDS * SECOND, 40 + SECONDS)

    found = dues(history_path)
    ordinary = dues(history_path, "ordinary")
    print(
        f"{len(found)} runs over {(found[-1] - found[0]) / SECOND:g} s, killed {killed}; "
        f"ordinary queue: {len(ordinary)} runs of {len(set(ordinary))} due times"
    )
    assert_each_second_once(found)
    assert_each_second_once(sorted(set(ordinary)))
    late = [run.start for run in runs(history_path) if run.tag == "tick"]
    assert len(late) == len(found)
    assert len({run.task_id for run in runs(history_path) if run.tag == "tick"}) == len(found)


def test_a_worker_never_sends_periodic_tasks(
    cluster: Cluster, history_path: Path, redis: Redis
) -> None:
    worker = start_worker(cluster, role={"AFFINITY_ROLE": "both"})
    producer = Producer(cluster.broker_url)
    producer.send("clock", countdown=3)
    wait_until(lambda: any(run.tag == "clock" for run in runs(history_path)), 60)
    assert {run.tag for run in runs(history_path)} == {"clock"}
    assert redis.keys(KEYS.queue("*beat*", "*")) == []
    assert "Sending" not in worker.log_text()

    cluster.beat(APP, environ=QUICK)
    wait_for_dues(history_path, 2)


def test_last_runs_live_in_redis(
    cluster: Cluster, history_path: Path, redis: Redis, tmp_path: Path
) -> None:
    start_worker(cluster)
    beat = cluster.beat(APP, environ=QUICK)
    wait_for_dues(history_path, 2)
    beat.kill9()
    for file in tmp_path.glob("*schedule*"):
        file.unlink()
    seen = len(dues(history_path))
    beat.start()
    wait_for_dues(history_path, seen + 4)
    assert_each_second_once(dues(history_path))
    assert not list(tmp_path.glob("*schedule*")), "there is no file of last runs"


def test_a_beat_that_stops_hands_over_at_once(
    cluster: Cluster, history_path: Path, redis: Redis
) -> None:
    start_worker(cluster)
    slow = {**QUICK, "AFFINITY_LEADER_TTL": "60"}
    beats = [cluster.beat(APP, f"beat{n}", environ=slow) for n in range(2)]
    for beat in beats:
        beat.wait_ready()
    for _ in range(4):
        seen = len(dues(history_path))
        wait_for_dues(history_path, seen + 1)  # the moment at which it is sending others
        leaving = sender(redis, beats)
        leaving.term()
        assert leaving.wait() == 0
        stopped = time.time() * SECOND
        wait_until(lambda: dues(history_path)[-1] > stopped, 30, "runs after the stop")  # noqa: B023
        leaving.start()
        leaving.wait_ready()
    for beat in beats:  # the one that stands by, too
        beat.term()
    assert [beat.wait() for beat in beats] == [0, 0]
    assert_each_second_once(dues(history_path))
    assert_each_second_once(dues(history_path, "ordinary"))


@pytest.mark.proves(
    "9: the beat that sends periodic tasks is frozen and wakes up",
    "it sends nothing",
)
def test_a_frozen_beat_that_wakes_up_sends_nothing(
    cluster: Cluster, history_path: Path, redis: Redis
) -> None:
    start_worker(cluster)
    beats = [cluster.beat(APP, f"beat{n}", environ=QUICK) for n in range(2)]
    wait_for_dues(history_path, 2)
    frozen = sender(redis, beats)
    # Not between two steps of a run: an ordinary task may come twice then (periodic.md).
    seen = len(dues(history_path, "ordinary"))
    wait_until(lambda: len(dues(history_path, "ordinary")) > seen, what="a whole run")
    wait_until(lambda: not redis.exists(KEYS.queue(STATE, "unsent")), what="its note")
    frozen.stop_process()
    other = next(beat for beat in beats if beat is not frozen)
    assert sender(redis, [other]) is other
    count = len(wait_for_dues(history_path, len(dues(history_path)) + 2))
    frozen.cont()
    wait_for_dues(history_path, count + 4)
    assert sender(redis, beats) is other
    assert_each_second_once(dues(history_path))
    assert_each_second_once(dues(history_path, "ordinary"))


def test_an_entry_that_raises_does_not_stop_the_others(
    cluster: Cluster, history_path: Path, redis: Redis
) -> None:
    start_worker(cluster)
    beat = cluster.beat(APP, environ=QUICK)
    wait_for_dues(history_path, 3)
    wait_until(lambda: beat.log_text().count("Could not send periodic entry 'broken'") >= 2)
    wait_for_dues(history_path, 3, "ordinary")
    assert beat.alive
    assert not redis.hexists(KEYS.queue(STATE, "unsent"), "broken")


@pytest.mark.proves(
    "14: Redis is away while a beat runs",
    "it waits and catches up",
)
def test_a_beat_waits_for_redis_and_catches_up(
    cluster: Cluster, history_path: Path, server: Server
) -> None:
    server.client().config_set("appendonly", "yes")
    start_worker(cluster)
    beat = cluster.beat(APP, environ=QUICK)
    seen = len(wait_for_dues(history_path, 2))
    server.stop()
    gone = "Redis does not answer"
    wait_until(lambda: "periodic tasks wait" in beat.log_text(), 20, "the loss to be noted")
    server.start()
    wait_for_dues(history_path, seen + 4)
    assert_each_second_once(dues(history_path))
    lines = [line for line in beat.log_text().splitlines() if "periodic tasks" in line]
    assert [gone in line for line in lines if "Sending" not in line] == [True, False], lines


def test_embedded_beats_of_workers_send_each_run_once(
    cluster: Cluster, history_path: Path, redis: Redis
) -> None:
    # Nobody is to take over here, however long a beat waits for its CPU.
    environ = {**QUICK, "AFFINITY_LEADER_TTL": "30"}
    for name in ("w1", "w2"):
        schedule = str(cluster.directory / f"{name}.schedule")
        cluster.worker(
            APP, name, queues="jobs,ordinary", environ=environ,
            extra=(*LEAN, "-B", "--scheduler", "affinity", "-s", schedule),
        )
    wait_for_dues(history_path, 5)
    wait_for_dues(history_path, 5, "ordinary")
    assert_each_second_once(dues(history_path))
    assert_each_second_once(dues(history_path, "ordinary"))
