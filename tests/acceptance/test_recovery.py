"""Workers and leaders that die: what they held runs elsewhere, in order, and soon."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from redis import Redis

from acceptance.support import (
    APP,
    HEARTBEAT_TIMEOUT_SECONDS,
    LEADER_TTL_SECONDS,
    LEAN,
    QUICK,
    WORKER_ONLY,
    EventLog,
    Producer,
    finished,
    held_tags,
    leading,
    runs,
    start,
    starts_are,
    wait_for_nodes,
    wait_for_run,
)
from celery_affinity.embedded import Server
from celery_affinity.types import WorkerRecord
from harness import RESULTS_VARIABLE, Cluster, Node, allowed, wait_for_ends, wait_until
from history import History, Run

pytestmark = pytest.mark.acceptance

TAGS = [f"tag-{number}" for number in range(8)]


def first_starts(found: list[Run], after: float, wanted: Callable[[Run], bool]) -> dict[str, float]:
    """Seconds from a moment to each tag's first wanted start after it."""
    firsts: dict[str, float] = {}
    for run in found:
        if run.start / 1e9 > after and wanted(run):
            firsts.setdefault(run.tag, run.start / 1e9 - after)
    return firsts


def record_of(producer: Producer, node: Node) -> WorkerRecord:
    return next(found for found in producer.affinity.workers() if found.name == node.name)


@pytest.mark.proves(
    "4: a busy worker is killed",
    "its tags run elsewhere within heartbeat_timeout + 1 s, in order; at most one task of each slot runs twice",
)
def test_a_killed_workers_tags_run_elsewhere_within_the_heartbeat_timeout(
    cluster: Cluster, history_path: Path, producer: Producer
) -> None:
    victim, _ = start(cluster, "w1", "w2")
    wait_for_nodes(producer.affinity, 2)
    producer.send_each(TAGS * 2, 10, ms=30)
    wait_until(starts_are(history_path, 40), what="40 starts")
    held = wait_until(lambda: held_tags(record_of(producer, victim)), what="tags of the victim")

    killed = time.monotonic()
    victim.kill9()

    history = finished(history_path)
    elsewhere = first_starts(history.runs, killed, lambda run: run.worker != victim.name)
    # A tag may have run its last task between the look at the slots and the kill.
    late = allowed(1)
    after = {tag: round(elsewhere[tag], 2) for tag in held if tag in elsewhere}
    print(f"ran elsewhere after {after} s; {history.reruns()} reruns")
    assert after
    assert max(after.values()) <= HEARTBEAT_TIMEOUT_SECONDS + late
    assert history.reruns() <= 2, "a task more than once, for each slot of the victim"


@pytest.mark.proves(
    "6: the scheduling leader is killed or stopped",
    "another one dispatches within leader_ttl + 1 s; after a stop within 1 s",
)
@pytest.mark.parametrize("how, ceiling", [("kill9", LEADER_TTL_SECONDS), ("term", 0.0)], ids=["kill9-3.0", "term-1.0"])
def test_a_leader_that_goes_is_replaced(
    cluster: Cluster, history_path: Path, producer: Producer, how: str, ceiling: float
) -> None:
    """Killed: within its time to live. Stopped: at once, however long that is."""
    cluster.worker(APP, queues="jobs", concurrency=2, environ={**QUICK, **WORKER_ONLY}, extra=LEAN)
    environ = {**QUICK, "AFFINITY_LEADER_TTL": str(ceiling or 30)}
    beats = [cluster.beat(APP, name, environ=environ) for name in ("beat-1", "beat-2")]
    wait_for_nodes(producer.affinity, 1)
    leader = leading(producer.affinity, beats)
    for beat in beats:
        beat.wait_ready()
    producer.send_each(TAGS)
    wait_for_ends(history_path, len(TAGS))

    gone = time.monotonic()
    getattr(leader, how)()
    leader.wait()  # until then it may still dispatch
    ended = time.monotonic() - gone
    producer.send_each(TAGS)

    wait_for_ends(history_path, 2 * len(TAGS))
    ceiling += allowed(1)
    history = History.load(history_path)
    history.assert_lawful()
    seconds = min(first_starts(history.runs, gone, lambda run: run.seq == 1).values())
    print(f"{how}: it ended after {ended:.2f} s, dispatch {seconds:.2f} s after the signal")
    assert seconds <= ceiling
    assert leading(producer.affinity, beats) is not leader


@pytest.mark.proves(
    "4, 6: of two workers that may both schedule one is killed",
    "the other goes on; a new tag starts within leader_ttl + 1 s",
)
@pytest.mark.parametrize("victim", ["the leader", "the other"])
def test_with_role_both_whichever_dies_the_other_goes_on(
    cluster: Cluster, history_path: Path, producer: Producer, victim: str
) -> None:
    nodes = start(cluster, "w1", "w2", beat=False)
    wait_for_nodes(producer.affinity, 2)
    leader = leading(producer.affinity, nodes)
    dies = next(node for node in nodes if (node is leader) == (victim == "the leader"))
    producer.send_each(TAGS * 2, 5, ms=30)
    wait_until(starts_are(history_path, 20), what="20 starts")

    killed = time.monotonic()
    dies.kill9()
    producer.send_each(["new"], 2)

    history = finished(history_path)
    late = allowed(1)
    new = first_starts(history.runs, killed, lambda run: run.tag == "new")["new"]
    print(f"{victim} died: a new tag started {new:.2f} s later, {history.reruns()} reruns")
    assert new <= LEADER_TTL_SECONDS + late
    assert history.reruns() <= 2


@pytest.mark.proves(
    "42: warm stop",
    "what has not started goes back to the head of its tags; nothing runs twice",
)
def test_a_warm_stop_gives_back_what_it_had_not_started(
    cluster: Cluster, history_path: Path, producer: Producer
) -> None:
    # The default heartbeat: nothing may depend on a rescue.
    stopped, other = (
        cluster.worker(APP, name, queues="jobs", concurrency=2, environ=WORKER_ONLY, extra=LEAN)
        for name in ("w1", "w2")
    )
    cluster.beat(APP)
    wait_for_nodes(producer.affinity, 2)
    producer.send_each(TAGS * 2, 10, ms=20)
    wait_until(starts_are(history_path, 40), what="40 starts")
    held = wait_until(lambda: held_tags(record_of(producer, stopped)), what="tags to give back")

    term = time.monotonic()
    stopped.term()
    assert stopped.wait() == 0
    took = time.monotonic() - term

    wait_for_ends(history_path, producer.sent)
    history = History.load(history_path)
    history.assert_lawful()
    assert history.reruns() == 0
    elsewhere = first_starts(history.runs, term, lambda run: run.worker == other.name)
    # (A tag whose last task was running at the signal has nothing left to run elsewhere.)
    waits = {tag: round(elsewhere[tag], 2) for tag in held if tag in elsewhere}
    print(f"the stop took {took:.2f} s; its tags ran elsewhere after {waits} s")
    log = stopped.log_text()
    assert "went back to the head of their tags" in log
    assert log.count("Left the ledger; 0 tasks given back.") == 1, "all was given back before"
    assert not producer.affinity.workers()[1:]


@pytest.fixture
def redis(server: Server) -> Redis:
    return server.client()


@pytest.fixture
def in_the_pipe(cluster: Cluster, producer: Producer, history_path: Path) -> Iterator[Node]:
    """A worker with a job in the pipe of its pool process, which is stopped and has not read it."""
    worker = cluster.worker(APP, queues="jobs", environ=QUICK, extra=(*LEAN, "-l", "DEBUG"))
    wait_for_nodes(producer.affinity, 1)
    producer.send("first")  # the process is up
    wait_for_ends(history_path, 1)
    wait_until(lambda: producer.affinity.stats("jobs").settled == 1, what="its settle")
    inspect = producer.app.control.inspect([worker.name])
    wait_until(lambda: inspect.active() == {worker.name: []}, what="its end in the parent")
    (child,) = worker.children()
    os.kill(child, signal.SIGSTOP)
    (sent,) = producer.send("tag", task="long", ms=3000)
    worker.wait_for_log(f"{sent.id}] received")
    yield worker
    with contextlib.suppress(ProcessLookupError):
        os.kill(child, signal.SIGCONT)


@pytest.mark.proves(
    "42: warm stop while a job is in a process' pipe",
    "it does not hang; the job stays in the ledger",
)
def test_a_stop_that_strikes_a_job_in_the_pipe_does_not_hang(
    in_the_pipe: Node, producer: Producer
) -> None:
    (child,) = in_the_pipe.children()
    in_the_pipe.term()
    in_the_pipe.wait_for_log("Stopping Pool")  # it has given up its consumer by then
    os.kill(child, signal.SIGCONT)
    assert in_the_pipe.wait() == 0
    stats = producer.affinity.stats("jobs")
    assert (stats.entries, stats.settled) == (1, 1)


@pytest.mark.proves(
    "42: cold stop while a job is in a process' pipe",
    "the job runs on another worker",
)
def test_a_cold_stop_that_strikes_a_job_in_the_pipe_does_not_lose_it(
    in_the_pipe: Node, producer: Producer, cluster: Cluster, history_path: Path
) -> None:
    (child,) = in_the_pipe.children()
    in_the_pipe.quit()
    in_the_pipe.wait_for_log("Hitting Ctrl+C again")
    os.kill(child, signal.SIGCONT)
    in_the_pipe.wait(40)
    cluster.worker(APP, "w2", queues="jobs", environ=QUICK, extra=LEAN)
    finished(history_path)


@pytest.mark.proves(
    "25: connections are killed while a job is in a process' pipe",
    "the job runs once",
)
def test_a_job_that_was_in_the_pipe_when_the_connection_was_lost_runs_once(
    in_the_pipe: Node, cluster: Cluster, history_path: Path, producer: Producer, redis: Redis
) -> None:
    cluster.worker(APP, "w2", queues="jobs", environ=QUICK, extra=LEAN)
    wait_for_nodes(producer.affinity, 2)
    (child,) = in_the_pipe.children()
    redis.client_kill_filter(_type="normal", skipme=True)
    in_the_pipe.wait_for_log("Connection to broker lost")
    wait_until(lambda: in_the_pipe.log_text().count("Serving 'jobs'") == 2, what="the reconnect")
    os.kill(child, signal.SIGCONT)
    wait_for_ends(history_path, 2)
    wait_until(lambda: producer.affinity.stats("jobs").entries == 0, what="its settle")
    History.load(history_path).assert_lawful()


@pytest.mark.proves(
    "42: cold stop",
    "what ran runs again, in order; nothing is lost",
)
def test_a_cold_stop_loses_nothing(
    cluster: Cluster, history_path: Path, producer: Producer
) -> None:
    # The default heartbeat: nothing may depend on a rescue.
    stopped, other = (
        cluster.worker(APP, name, queues="jobs", concurrency=2, environ=WORKER_ONLY, extra=LEAN)
        for name in ("w1", "w2")
    )
    cluster.beat(APP)
    wait_for_nodes(producer.affinity, 2)
    producer.send_each(TAGS * 2, 2, ms=400)
    wait_until(starts_are(history_path, 5), what="5 starts")

    quit_at = time.monotonic()
    stopped.quit()
    stopped.wait()
    took = time.monotonic() - quit_at

    history = finished(history_path)
    again = [run for run in history.runs if run.attempt and run.attempt > 1]
    print(f"the stop took {took:.2f} s; {history.reruns()} reruns, {len(again)} with attempt > 1")
    assert {run.worker for run in again} <= {other.name}
    assert history.reruns() <= 2


@pytest.mark.proves(
    "42: cold stop while a result is read",
    "it does not hang",
)
def test_a_cold_stop_that_strikes_the_reading_of_a_result_does_not_hang(
    cluster: Cluster, history_path: Path, producer: Producer
) -> None:
    import acceptance.apps.outcomes  # noqa: F401  (registers its tasks)

    worker = cluster.worker("acceptance.apps.outcomes", queues="jobs", concurrency=2, extra=LEAN)
    wait_for_nodes(producer.affinity, 1)

    producer.send("tag", task="striking")

    worker.wait()
    assert "Cold shutdown" in worker.log_text()
    finished(history_path)


@pytest.mark.proves(
    "2: a pool process is killed in a task",
    "the task runs again at the head of its tag; no failure is seen, in no event either",
)
def test_a_killed_child_gives_its_task_back(
    cluster: Cluster, history_path: Path, producer: Producer
) -> None:
    results = {RESULTS_VARIABLE: "1"}
    worker = cluster.worker(
        APP, queues="jobs", concurrency=2, environ={**QUICK, **results}, extra=(*LEAN, "-E")
    )
    wait_for_nodes(producer.affinity, 1)
    with EventLog(producer.app) as log:
        producer.send("tag", ms=100)
        (second,) = producer.send("tag", ms=1300)  # longer than two heartbeats
        third, last = producer.send("tag", 2, ms=100)
        victim = wait_for_run(history_path, lambda run: run.seq == 1)

        os.kill(victim.pid, signal.SIGKILL)

        again = wait_for_run(history_path, lambda run: run.seq == 1 and run.attempt == 2)
        wait_for_ends(history_path, 4)
        wait_until(lambda: "task-succeeded" in log.of(last.id), what="the success event")
    history = History.load(history_path)
    history.assert_lawful(allow_rerun=True, lease_within="worker")
    assert [(run.seq, run.attempt) for run in history.runs] == [(0, 1), (1, 1), (1, 2), (2, 1), (3, 1)]
    print(f"attempt 2 started {(again.start - victim.start) / 1e9:.2f} s after attempt 1")
    assert log.of(second.id).count("task-succeeded") == 1, log.of(second.id)
    assert "task-failed" not in log.of(second.id), log.of(second.id)
    for behind in (third, last):
        # Neither the copies nor their refusals are seen.
        assert log.of(behind.id) == ["task-received", "task-started", "task-succeeded"]
    assert "WorkerLostError" not in worker.log_text().replace("is gone (", "")


@pytest.mark.proves(
    "11: a worker with all its processes is frozen past its lease",
    "its tags run elsewhere; it registers anew; what it ran may overlap with its second run (declared limit), nothing else",
)
def test_a_frozen_worker_registers_anew_and_loses_nothing(
    cluster: Cluster, history_path: Path, producer: Producer
) -> None:
    frozen, _ = start(cluster, "w1", "w2")
    wait_for_nodes(producer.affinity, 2)
    producer.send_each(TAGS, 12, ms=50)
    wait_until(starts_are(history_path, 10), what="10 starts")
    frozen_at = time.monotonic()
    frozen.stop_process(tree=True)
    wait_until(lambda: len(producer.affinity.workers()) == 1, 10, "the rescue")
    rescued_at, rescued_epoch = time.monotonic(), time.time() * 1e6  # epochs are times
    wait_until(done_are(history_path, 12), 30, "the end of all tasks, elsewhere")
    frozen.cont(tree=True)

    wait_for_nodes(producer.affinity, 2, timeout=5)
    assert "registers anew" in frozen.log_text()
    producer.send_each(TAGS, 2, ms=50)
    wait_until(done_are(history_path, 14), 30, "the end of the rest")
    history = History.load(history_path)
    # Declared: what ran in the frozen worker may overlap with its second run. Nothing else may.
    cut = {
        id(run)
        for run in history.runs
        if is_cut(run, frozen, rescued_epoch, rescued_at, history)
    }
    assert len(cut) <= 2, "one task for each slot"
    rest = History([run for run in history.runs if id(run) not in cut], history.submits)
    rest.assert_lawful(allow_rerun=False)
    print(f"rescued after {rescued_at - frozen_at:.2f} s; {len(cut)} tasks ran twice")
    assert history.reruns() == len(cut)
    anew = [run for run in history.runs if run.worker == frozen.name and run.start / 1e9 > rescued_at]
    assert anew, "it works again"


def done_are(history_path: Path, count: int) -> Callable[[], bool]:
    """Whether the first `count` tasks of each tag are done."""
    wanted = {(tag, seq) for tag in TAGS for seq in range(count)}
    return lambda: wanted <= {(run.tag, run.seq) for run in runs(history_path) if run.is_done}


def is_cut(run: Run, frozen: Node, rescued_epoch: float, rescued_at: float, history: History) -> bool:
    """Whether the freeze caught this run of a lease from before: in its task, or behind that, before
    its end was told. Then it ended late, or it has ended and its task ran again.
    """
    if run.worker != frozen.name or (run.epoch or 0) >= rescued_epoch:
        return False
    late = not run.end or run.end / 1e9 > rescued_at
    return late or any(
        (again.tag, again.seq) == (run.tag, run.seq) and (again.epoch or 0) >= (run.epoch or 0)
        for again in history.runs
        if again is not run
    )
