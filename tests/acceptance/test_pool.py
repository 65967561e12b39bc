"""A slot is a process: where the tasks of a lease run on prefork, and what waiting for it costs."""

from __future__ import annotations

import json
import os
import signal
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import psutil
import pytest

from acceptance.apps import affinity_app
from acceptance.apps.affinity_app import make_app, work
from harness import Cluster, LineCounter, wait_for_ends, wait_until
from history import History

pytestmark = pytest.mark.acceptance

APP = "acceptance.apps.affinity_app"
BATCH = 10
#: How long the parent is watched, and its CPU of that: 1 % (the clock counts in 10 ms).
WATCHED_SECONDS = 3.0
CPU_SHARE = 0.01


def starts(history_path: Path) -> list[dict[str, Any]]:
    """The start events, with the fields that `History` does not keep."""
    lines = history_path.read_text().splitlines() if history_path.exists() else []
    events = [json.loads(line) for line in lines]
    return sorted(
        (event for event in events if event["event"] == "start"), key=lambda event: event["t"]
    )


def assert_slots_are_processes(history_path: Path, slots: int) -> None:
    """Every task ran in the process of its slot, and every lease in one slot."""
    leases: dict[tuple[str, int], set[int]] = defaultdict(set)
    for event in starts(history_path):
        assert event["process_index"] == event["slot"], event
        leases[event["tag"], event["epoch"]].add(event["slot"])
    assert all(len(used) == 1 for used in leases.values()), dict(leases)
    assert {slot for used in leases.values() for slot in used} <= set(range(slots))


def cpu_seconds(pid: int) -> float:
    """CPU that a process has used."""
    times = psutil.Process(pid).cpu_times()
    return float(times.user + times.system)


def test_all_tasks_of_a_lease_run_in_one_process(cluster: Cluster, history_path: Path) -> None:
    make_app(cluster.broker_url)
    sent = [(f"tag-{tag}", seq) for seq in range(40) for tag in range(8)]
    for tag, seq in sent:
        work.delay(tag, seq)
    cluster.worker(APP, queues="jobs", concurrency=4)

    wait_for_ends(history_path, len(sent))
    history = History.load(history_path)
    history.assert_lawful(sent, batch_limit=None, lease_within="process")
    assert_slots_are_processes(history_path, 4)
    # The slots share the work: nobody waits for a process while another one is free.
    assert len({run.pid for run in history.runs}) == 4


def test_the_parent_sleeps_while_a_job_waits_for_its_busy_process(
    cluster: Cluster, history_path: Path
) -> None:
    _, affinity = make_app(cluster.broker_url)
    node = cluster.worker(APP, queues="jobs", concurrency=2).wait_ready()
    work.delay("busy", 0, ms=5000)
    work.delay("busy", 1)
    wait_until(lambda: starts(history_path), what="the long task's start")

    def second_waits() -> bool:
        return any(slot.current_batch_size == 2 for slot in affinity.workers()[0].slots)

    wait_until(second_waits, what="the second message of the lease")
    time.sleep(0.5)
    before = cpu_seconds(node.pid)
    time.sleep(WATCHED_SECONDS)
    used = cpu_seconds(node.pid) - before

    assert len(starts(history_path)) == 1, "the long task has to run all the time"
    assert used <= WATCHED_SECONDS * CPU_SHARE, f"{used:.2f} s of {WATCHED_SECONDS:g} s"
    wait_for_ends(history_path, 2)
    History.load(history_path).assert_lawful([("busy", 0), ("busy", 1)], lease_within="process")


@pytest.mark.proves(
    "45: max_tasks_per_child",
    "the new process has the slot and its lease",
)
def test_a_replaced_child_keeps_its_slot(cluster: Cluster, history_path: Path) -> None:
    make_app(cluster.broker_url)
    sent = [(f"tag-{tag}", seq) for seq in range(14) for tag in range(3)]
    for tag, seq in sent:
        work.delay(tag, seq, ms=2)
    cluster.worker(APP, queues="jobs", concurrency=2, extra=("--max-tasks-per-child", "3"))

    wait_for_ends(history_path, len(sent))
    history = History.load(history_path)
    history.assert_lawful(sent, lease_within="worker")
    assert_slots_are_processes(history_path, 2)
    per_process = defaultdict(int)
    for run in history.runs:
        per_process[run.pid] += 1
    assert max(per_process.values()) <= 3, dict(per_process)
    # Leases of up to ten tasks went on over several processes of their slot.
    assert max(len(places) for places in history.lease_processes("process").values()) >= 2


@pytest.mark.proves(
    "2: a pool process is killed in a task",
    "its slot goes on with the tag, in a new process",
)
def test_a_killed_childs_slot_goes_on_with_its_tag(cluster: Cluster, history_path: Path) -> None:
    make_app(cluster.broker_url)
    sent = [("hot", seq) for seq in range(8)]
    cluster.worker(APP, queues="jobs", concurrency=2).wait_ready()
    for tag, seq in sent:
        work.delay(tag, seq, ms=300)
    ends = LineCounter(history_path, '"event":"end"')
    wait_until(lambda: ends() == 2 and len(starts(history_path)) == 3, what="the third task")
    victim = starts(history_path)[-1]

    os.kill(victim["pid"], signal.SIGKILL)

    wait_for_ends(history_path, len(sent))
    history = History.load(history_path)
    history.assert_lawful(sent, allow_rerun=True, lease_within="worker")
    assert_slots_are_processes(history_path, 2)
    again = next(run for run in history.runs if run.attempt == 2)
    assert again.seq == victim["seq"]
    later = [event for event in starts(history_path) if event["t"] > victim["t"]]
    assert {event["slot"] for event in later} == {victim["slot"]}
    assert victim["pid"] not in {event["pid"] for event in later}


@pytest.mark.proves(
    "2: a pool process is killed in a task, 8 times",
    "noticed within 3 s each time",
)
def test_every_killed_child_is_noticed_at_once(cluster: Cluster, history_path: Path) -> None:
    """The stock pool may notice only by its timer, up to 5 s later."""
    make_app(cluster.broker_url)
    cluster.worker(
        APP, queues="jobs", concurrency=2, environ={"AFFINITY_TEST_QUEUE": '{"max_deliveries": 99}'}
    )
    affinity_app.long.delay("tag", 0, 60_000)
    delays = []
    for number in range(8):
        starts_are = LineCounter(history_path, '"event":"start"')
        wait_until(lambda: starts_are() > number, what=f"start {number + 1}")  # noqa: B023
        killed_at = time.monotonic_ns()
        os.kill(starts(history_path)[-1]["pid"], signal.SIGKILL)
        wait_until(lambda: starts_are() > number + 1, what="the next start")  # noqa: B023
        delays.append((starts(history_path)[-1]["t"] - killed_at) / 1e9)
    print("seconds from kill to start:", [round(delay, 2) for delay in delays])
    assert max(delays) < 3, delays
