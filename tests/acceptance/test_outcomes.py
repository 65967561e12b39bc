"""Every end of a task settles it exactly once, on every pool, and its tag goes on.

One worker for each pool; all outcomes happen in it side by side, each with a tag of its own. Of
each the law is: the backend says what is told below, no task or hook of the tag overlaps with
another one of it, and a later task of the tag runs. Of all together: the ledger has counted each
entry once, and keeps nothing.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import combinations
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from celery import __version__ as celery_version
from celery import states
from celery.result import AsyncResult

from acceptance.apps.outcomes import BACKEND_VARIABLE, CGROUP_VARIABLE, HOOK, keep_results
from acceptance.support import LEAN, QUICK, Producer, wait_for_nodes
from celery_affinity.embedded import Server, start_server
from harness import RESULTS_VARIABLE, Cluster, wait_until
from history import History, Run, record
from pools import POOLS, long

pytestmark = pytest.mark.acceptance

OUTCOMES = "acceptance.apps.outcomes"
#: pool -> its size.
CONCURRENCY = {"prefork": 4, "threads": 4, "solo": 1, "gevent": 8}
MAX_DELIVERIES = 2
CGROUPS = Path("/sys/fs/cgroup/memory")
CGROUP_BYTES = 300 << 20

#: Waits: yields what has to come true before it goes on.
Script = Iterator[Callable[[], object]]


class Tag:
    """What one outcome does with its tag, and what it sees of it."""

    def __init__(self, name: str, pool: str, producer: Producer) -> None:
        self.name, self.pool = name, pool
        self.runs: list[Run] = []
        #: Entries that are to be counted as settled, and as dead letters.
        self.settles = self.dead = 0
        self._producer = producer
        self._sent = 0

    def send(
        self, how: str = "", ms: float = 0, after_ms: float = 0, *, again: int = 0, dead: int = 0,
        **options: Any,
    ) -> AsyncResult:
        """Send its next task.

        Arguments:
            again: How often it becomes another entry: a retry, a requeue.
            dead: Whether it is to become a dead letter.
        """
        seq, self._sent = self._sent, self._sent + 1
        self.settles += 1 + again - dead
        self.dead += dead
        record("submit", tag=self.name, seq=seq)
        return self._producer.app.tasks["jobs.ending"].apply_async(
            (self.name, seq, how, ms, after_ms), **options
        )

    def send_raw(self, **changes: Any) -> AsyncResult:
        """Send a message as another client might, which is to become a dead letter."""
        self.dead += 1
        task_id = str(uuid4())
        message = {
            "body": "W1tdLCB7fSwge31d", "content-encoding": "utf-8",  # [[], {}, {}]
            "content-type": "application/json",
            "headers": {"id": task_id, "task": "jobs.ending", "identify_tag": self.name},
            "properties": {
                "body_encoding": "base64", "delivery_info": {"exchange": "", "routing_key": "jobs"},
                "delivery_tag": str(uuid4()),
            },
        }
        message["headers"].update(changes.pop("headers", {}))
        with self._producer.app.connection_for_write() as connection:
            connection.default_channel.client.lpush("jobs", json.dumps({**message, **changes}))
        return AsyncResult(task_id, app=self._producer.app)

    def starts(self, seq: int) -> int:
        """How often its task of that number has started."""
        return sum(run.seq == seq for run in self.runs)

    def order(self) -> list[int]:
        """The numbers of its tasks, as they started."""
        return [run.seq for run in self.runs if run.seq != HOOK]


#: name -> its script, and what happens by pool.
_outcomes: dict[str, tuple[Callable[[Tag], Script], dict[str, str]]] = {}
IGNORED = "this pool cannot: the task runs to its own end, SUCCESS"


def outcome(name: str, everywhere: str = "", **pools: str) -> Callable[..., None]:
    """Declare what comes of an outcome, on all pools or by pool."""

    def declare(script: Callable[[Tag], Script]) -> None:
        _outcomes[name] = script, pools or dict.fromkeys(CONCURRENCY, everywhere)

    return declare


def ends(result: AsyncResult, state: str) -> Callable[[], object]:
    """Whether the backend has this state of it; another end fails at once."""

    def is_so() -> bool:
        seen = result.app.AsyncResult(result.id).state
        assert seen == state or seen in states.UNREADY_STATES, f"{seen}, not {state}"
        return bool(seen == state)

    return is_so


def stored(result: AsyncResult) -> Any:
    """What the backend has of it."""
    return result.app.AsyncResult(result.id).result


# How a task ends by itself


@outcome("success", "SUCCESS is stored; one run")
def _(tag: Tag) -> Script:
    result = tag.send()
    yield ends(result, states.SUCCESS)
    assert tag.order() == [0]


@outcome("failure", "FAILURE is stored; one run")
def _(tag: Tag) -> Script:
    result = tag.send("failure")
    yield ends(result, states.FAILURE)
    assert tag.order() == [0] and isinstance(stored(result), ValueError)


@outcome("failure with an error that cannot be pickled", "FAILURE is stored; one run")
def _(tag: Tag) -> Script:
    result = tag.send("unpicklable error")
    yield ends(result, states.FAILURE)
    assert tag.order() == [0]


@outcome("result that cannot be encoded", "FAILURE is stored (EncodeError); one run")
def _(tag: Tag) -> Script:
    result = tag.send("unencodable")
    yield ends(result, states.FAILURE)
    assert tag.order() == [0] and "EncodeError" in repr(stored(result))


@outcome("46: Ignore", "no state is stored; one run")
def _(tag: Tag) -> Script:
    result, after = tag.send("ignore"), tag.send()
    yield ends(after, states.SUCCESS)
    assert tag.order() == [0, 1] and result.state == states.PENDING


@outcome("46: Reject", "FAILURE is stored (Celery before 5.7: no state); one run")
def _(tag: Tag) -> Script:
    result, after = tag.send("reject"), tag.send()
    yield ends(after, states.SUCCESS)
    if celery_version >= "5.7":
        yield ends(result, states.FAILURE)
    assert tag.order() == [0, 1]


@outcome("46: Reject with requeue", "it runs again; then SUCCESS")
def _(tag: Tag) -> Script:
    result, after = tag.send("requeue", 200, again=1), tag.send()
    yield ends(result, states.SUCCESS)
    yield ends(after, states.SUCCESS)
    assert sorted(tag.order()) == [0, 0, 1]


@outcome("46: retry", "it runs again; then SUCCESS")
def _(tag: Tag) -> Script:
    result, after = tag.send("retry", 200, again=1), tag.send()
    yield ends(result, states.SUCCESS)
    yield ends(after, states.SUCCESS)
    assert sorted(tag.order()) == [0, 0, 1]


@outcome("46: retries that are used up", "FAILURE is stored with the error that was given")
def _(tag: Tag) -> Script:
    result = tag.send("retries", again=1)
    yield ends(result, states.FAILURE)
    assert tag.order() == [0, 0] and isinstance(stored(result), LookupError)


# What does not run


@outcome("expired before its dispatch", "REVOKED is stored; it never runs")
def _(tag: Tag) -> Script:
    tag.send("", 600), tag.send("", 100)
    result, after = tag.send(expires=0.3), tag.send()
    yield ends(result, states.REVOKED)
    yield ends(after, states.SUCCESS)
    assert tag.order() == [0, 1, 3]


@outcome("expired after its dispatch", prefork="REVOKED is stored; it never runs")
def _(tag: Tag) -> Script:
    tag.send("", 800)
    yield lambda: tag.starts(0)
    result, after = tag.send(expires=0.4), tag.send()
    yield ends(result, states.REVOKED)
    yield ends(after, states.SUCCESS)
    assert tag.order() == [0, 2]


@outcome("47: revoked while it waits", "REVOKED is stored; it never runs")
def _(tag: Tag) -> Script:
    tag.send("", 600), tag.send("", 100)
    result, after = tag.send(), tag.send()
    result.revoke()
    yield ends(result, states.REVOKED)
    yield ends(after, states.SUCCESS)
    assert tag.order() == [0, 1, 3]


@outcome("47: revoked after its dispatch", prefork="REVOKED is stored; it never runs")
def _(tag: Tag) -> Script:
    tag.send("", 800)
    result, after = tag.send(), tag.send()
    yield lambda: tag.starts(0)
    result.revoke()
    yield ends(result, states.REVOKED)
    yield ends(after, states.SUCCESS)
    assert tag.order() == [0, 2]


@outcome("unknown task", "buried; FAILURE is stored (NotRegistered)")
def _(tag: Tag) -> Script:
    result = tag.send_raw(headers={"task": "jobs.nobody_knows"})
    yield ends(result, states.FAILURE)


@outcome("undecodable body", "buried; FAILURE is stored (BuriedError)")
def _(tag: Tag) -> Script:
    result = tag.send_raw(body="e3t7")  # {{{
    yield ends(result, states.FAILURE)


@outcome("malformed message", "buried; FAILURE is stored (BuriedError)")
def _(tag: Tag) -> Script:
    result = tag.send_raw(headers={"timelimit": "x"})
    yield ends(result, states.FAILURE)


# What ends it from outside


@outcome("47: revoked while it runs", "it runs to its own end, SUCCESS")
def _(tag: Tag) -> Script:
    result, after = tag.send("", 500), tag.send()
    yield lambda: tag.starts(0)
    result.revoke()
    yield ends(after, states.SUCCESS)
    yield ends(result, states.SUCCESS)
    assert tag.order() == [0, 1]


def terminated(tag: Tag, signal: str, after_ms: float) -> Script:
    ends_it = tag.pool in ("prefork", "gevent")
    result = tag.send("", 30_000 if ends_it else 700, after_ms)
    after = tag.send()
    yield lambda: tag.starts(0)
    result.revoke(terminate=True, signal=signal)
    yield ends(result, states.REVOKED if ends_it else states.SUCCESS)
    yield ends(after, states.SUCCESS)
    if signal == "SIGTERM":
        yield lambda: all(run.end for run in tag.runs)  # an overlap is seen only then
    assert tag.order() == [0, 1]


@outcome(
    "46: terminated with TERM, it cleans up for 0.5 s", threads=IGNORED, solo=IGNORED,
    prefork="REVOKED is stored; the tag goes on when its process is gone",
    gevent="REVOKED is stored; the tag goes on when its greenlet is over",
)
def _(tag: Tag) -> Script:
    yield from terminated(tag, "SIGTERM", after_ms=500)


@outcome("46: terminated with KILL", prefork="REVOKED is stored; the tag goes on when its process is gone")
def _(tag: Tag) -> Script:
    yield from terminated(tag, "SIGKILL", after_ms=0)


@outcome(
    "soft time limit", threads=IGNORED, solo=IGNORED, gevent=IGNORED,
    prefork="SoftTimeLimitExceeded is raised in the task",
)
def _(tag: Tag) -> Script:
    notices = tag.pool == "prefork"
    result = tag.send("", 30_000 if notices else 600, soft_time_limit=0.3)
    yield ends(result, states.SUCCESS)
    assert stored(result) == ("limited" if notices else "done") and tag.order() == [0]


@outcome(
    "46: hard time limit", threads=IGNORED, solo=IGNORED,
    prefork="FAILURE is stored (TimeLimitExceeded); the tag goes on when its process is gone",
    gevent="FAILURE is stored (TimeLimitExceeded); the tag goes on when its greenlet is over",
)
def _(tag: Tag) -> Script:
    ends_it = tag.pool in ("prefork", "gevent")
    result = tag.send("", 30_000 if ends_it else 600, time_limit=0.3)
    after = tag.send()
    yield ends(result, states.FAILURE if ends_it else states.SUCCESS)
    yield ends(after, states.SUCCESS)
    assert tag.order() == [0, 1]


# What ends its process


@outcome("SystemExit, once", "no FAILURE is stored; it runs again at the head of its tag; SUCCESS")
def _(tag: Tag) -> Script:
    result, after = tag.send("exit once"), tag.send()
    yield ends(result, states.SUCCESS)
    yield ends(after, states.SUCCESS)
    assert tag.order() == [0, 0, 1]


@outcome("SystemExit, each time", f"buried after {MAX_DELIVERIES} starts; FAILURE is stored")
def _(tag: Tag) -> Script:
    result, after = tag.send("exit", dead=1), tag.send()
    yield ends(result, states.FAILURE)
    yield ends(after, states.SUCCESS)
    assert tag.order() == [0, 0, 1]


def lost_once(tag: Tag, how: str) -> Script:
    result, after = tag.send(how), tag.send()
    yield ends(result, states.SUCCESS)
    yield ends(after, states.SUCCESS)
    assert tag.order() == [0, 0, 1]
    assert [run.attempt for run in tag.runs if run.seq == 0] == [1, 2]


AGAIN = "no FAILURE is stored; it runs again at the head of its tag; SUCCESS"


@outcome("2: a pool process is killed in a task", prefork=AGAIN)
def _(tag: Tag) -> Script:
    yield from lost_once(tag, "kill once")


@outcome("2: a pool process is killed in a task, each time", prefork=f"buried after {MAX_DELIVERIES} starts; FAILURE is stored")
def _(tag: Tag) -> Script:
    result, after = tag.send("kill", dead=1), tag.send()
    yield ends(result, states.FAILURE)
    yield ends(after, states.SUCCESS)
    assert tag.order() == [0, 0, 1] and "WorkerLostError" in repr(stored(result))


@outcome("3: a pool process is out of memory", prefork=AGAIN)
def _(tag: Tag) -> Script:
    yield from lost_once(tag, "out of memory once")


@outcome("2: a pool process leaves (os._exit)", prefork=AGAIN)
def _(tag: Tag) -> Script:
    yield from lost_once(tag, "_exit once")


@contextmanager
def memory_cgroup() -> Iterator[str]:
    """A memory cgroup with a low limit; '' where none can be made: a task then kills itself."""
    path = CGROUPS / f"affinity-{uuid4().hex[:8]}"
    try:
        path.mkdir()
    except OSError:
        yield ""
        return
    try:
        (path / "memory.limit_in_bytes").write_text(str(CGROUP_BYTES))
        yield str(path)
    finally:
        path.rmdir()


@pytest.fixture
def cgroup() -> Iterator[str]:
    with memory_cgroup() as path:
        yield path


@pytest.fixture
def producer(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> Producer:
    monkeypatch.setenv(RESULTS_VARIABLE, "1")
    cluster.environ[RESULTS_VARIABLE] = "1"
    return Producer(cluster.broker_url)


def proofs(pool: str) -> list[pytest.MarkDecorator]:
    return [
        pytest.mark.proves(name if name[0].isdigit() else f"outcome: {name}", pools[pool])
        for name, (_, pools) in _outcomes.items() if pool in pools
    ] + [long] * (pool in ("solo", "gevent"))


@pytest.mark.parametrize("pool", [pytest.param(pool, marks=proofs(pool)) for pool in CONCURRENCY])
def test_every_end_of_a_task_settles_it_once_and_its_tag_goes_on(
    cgroup: str, cluster: Cluster, history_path: Path, producer: Producer, pool: str
) -> None:
    environ = {
        **QUICK, CGROUP_VARIABLE: cgroup,
        "AFFINITY_TEST_QUEUE": json.dumps({"max_deliveries": MAX_DELIVERIES}),
    }
    node = cluster.worker(
        OUTCOMES, queues="jobs", concurrency=CONCURRENCY[pool], pool=pool, environ=environ, extra=LEAN
    )
    wait_for_nodes(producer.affinity, 1)
    tags = {name: Tag(name, pool, producer) for name, (_, pools) in _outcomes.items() if pool in pools}
    found = play({name: and_goes_on(_outcomes[name][0], tag) for name, tag in tags.items()},
                 tags, history_path)
    assert not found, "\n".join(f"{name}: {error}" for name, error in found.items())

    settled, dead = (sum(getattr(tag, what) for tag in tags.values()) for what in ("settles", "dead"))
    wait_until(lambda: producer.affinity.stats("jobs").entries == 0, what="an empty ledger")
    stats = producer.affinity.stats("jobs")
    assert (stats.settled, stats.dead) == (settled, dead), "each entry is counted once"
    assert node.alive
    wait_until(lambda: producer.affinity.stats("jobs").idle_slots == CONCURRENCY[pool], what="free slots")
    look(tags, history_path)
    for tag in tags.values():
        assert not beside_each_other(tag.runs), tag.name
    inspect = producer.app.control.inspect([node.name], timeout=5)
    assert inspect.stats()[node.name]["affinity"]["held"] == [], "the node has forgotten them all"


def and_goes_on(script: Callable[[Tag], Script], tag: Tag) -> Script:
    yield from script(tag)
    later = tag.send()
    yield ends(later, states.SUCCESS)


def play(
    scripts: dict[str, Script], tags: dict[str, Tag], history_path: Path, timeout: float = 40.0
) -> dict[str, str]:
    """Play all side by side; what went wrong, by name."""
    found: dict[str, str] = {}
    waiting: dict[str, Callable[[], object]] = {}
    deadline = time.monotonic() + timeout
    running = dict.fromkeys(scripts)
    while running:
        look(tags, history_path)
        for name in list(running):
            try:
                if name in waiting and not waiting[name]():
                    assert time.monotonic() < deadline, "waited in vain"
                    continue
                look({name: tags[name]}, history_path)  # as it is after what was waited for
                waiting[name] = next(scripts[name])
            except StopIteration:
                del running[name]
            except AssertionError as error:
                del running[name]
                found[name] = f"{error} ({tags[name].order()})"
        time.sleep(0.02)
    return found


def look(tags: dict[str, Tag], history_path: Path) -> None:
    """Let tags see what has run."""
    by_tag = History.load(history_path).by_tag()
    for tag in tags.values():
        tag.runs = by_tag.get(tag.name, [])


def beside_each_other(runs: list[Run]) -> list[str]:
    """Runs and hooks of different tasks that overlap; one without an end was killed.

    Those of one task may: Celery calls `on_failure` in the worker's parent once a time limit is
    over, while the process still cleans up.
    """
    return [
        f"{b} of {b.task_id} started before the end of {a} of {a.task_id}"
        for a, b in combinations(runs, 2) if a.end and a.end > b.start and a.task_id != b.task_id
    ]


@pytest.mark.parametrize("slot_is_process", [True, False])
def test_a_tag_waits_for_a_terminated_process_that_takes_its_time(
    cluster: Cluster, history_path: Path, producer: Producer, slot_is_process: bool
) -> None:
    """Also where another process could take the tag's next task, and longer than two heartbeats."""
    environ = {**QUICK, "AFFINITY_SLOT_IS_PROCESS": str(int(slot_is_process))}
    cluster.worker(OUTCOMES, queues="jobs", concurrency=2, environ=environ, extra=LEAN)
    wait_for_nodes(producer.affinity, 1)
    tags = {"": Tag("tag", "prefork", producer)}
    found = play({"": terminated(tags[""], "SIGTERM", after_ms=2500)}, tags, history_path)
    assert not found
    assert not beside_each_other(tags[""].runs)


def test_a_tag_waits_for_a_terminated_greenlet_that_takes_its_time(
    cluster: Cluster, history_path: Path, producer: Producer
) -> None:
    cluster.worker(OUTCOMES, queues="jobs", concurrency=2, environ=QUICK, extra=LEAN, pool="gevent")
    wait_for_nodes(producer.affinity, 1)
    tags = {"": Tag("tag", "gevent", producer)}
    assert not play({"": terminated(tags[""], "SIGTERM", after_ms=2500)}, tags, history_path)
    assert not beside_each_other(tags[""].runs)


@pytest.mark.proves(
    "outcome: MemoryError",
    "FAILURE is stored; then Celery ends the worker, and what it held runs on another one",
)
def test_a_memory_error_is_a_failure_and_what_its_worker_held_runs_elsewhere(
    cluster: Cluster, history_path: Path, producer: Producer
) -> None:
    ended = cluster.worker(OUTCOMES, queues="jobs", environ=QUICK, extra=LEAN)
    wait_for_nodes(producer.affinity, 1)
    tag = Tag("much", "prefork", producer)
    failed, behind = tag.send("memory error", 300), tag.send()
    wait_until(ends(failed, states.FAILURE), what="its failure")
    ended.wait()
    cluster.worker(OUTCOMES, "w2", queues="jobs", environ=QUICK, extra=LEAN)
    wait_until(ends(behind, states.SUCCESS), 60, "the next one's end")
    wait_until(lambda: producer.affinity.stats("jobs").entries == 0, what="an empty ledger")
    look({"": tag}, history_path)
    assert tag.order()[0] == 0 and set(tag.order()[1:]) == {1}
    stats = producer.affinity.stats("jobs")
    assert (stats.settled, stats.dead) == (2, 0)


# While the result backend is down


@pytest.fixture
def results(server_binary: Path, cluster: Cluster) -> Iterator[Server]:
    """A server for results alone."""
    with start_server(aof=True) as running:
        cluster.environ[BACKEND_VARIABLE] = running.url()
        yield running


def end_without(
    results: Server, cluster: Cluster, history_path: Path, pool: str, how: str = "", **queue: Any
) -> tuple[Producer, Tag, list[AsyncResult]]:
    """Have a task end while the results' server is down, with another one of its tag behind it."""
    producer = Producer(cluster.broker_url)
    keep_results(producer.app, results.url())
    environ = {**QUICK, "AFFINITY_TEST_QUEUE": json.dumps(queue)}
    cluster.worker(
        OUTCOMES, queues="jobs", concurrency=CONCURRENCY[pool], pool=pool, environ=environ, extra=LEAN
    )
    wait_for_nodes(producer.affinity, 1)
    tag = Tag("down", pool, producer)
    sent = [tag.send(how, 500), tag.send("", 500)]
    wait_until(lambda: History.load(history_path).runs, what="the start")
    results.kill()
    return producer, tag, sent


@pytest.mark.proves(
    "48: result backend down when a task ends",
    "settled once, not run again; FAILURE is stored if the backend is back in time, else no state; the tag goes on",
)
@pytest.mark.parametrize("pool", POOLS)
def test_a_task_whose_result_cannot_be_stored_settles_once_and_its_tag_goes_on(
    results: Server, cluster: Cluster, history_path: Path, pool: str
) -> None:
    producer, tag, (lost, _) = end_without(results, cluster, history_path, pool)
    wait_until(lambda: producer.affinity.stats("jobs").entries == 0, what="an empty ledger")
    results.start()
    wait_until(ends(tag.send(), states.SUCCESS), what="the next one's end")
    assert lost.app.AsyncResult(lost.id).state in (states.PENDING, states.FAILURE)
    wait_until(lambda: producer.affinity.stats("jobs").settled == 3, what="three settles")
    look({"": tag}, history_path)
    assert tag.order() == [0, 1, 2] and not beside_each_other(tag.runs)
    (stats,) = producer.app.control.inspect(timeout=5).stats().values()
    assert stats["affinity"]["held"] == [], "the node has forgotten them"


@pytest.mark.proves(
    "48: result backend down when a task ends, on_failure block",
    "it has failed: buried with its reason, and its tag is blocked",
)
@pytest.mark.parametrize("pool", ["prefork", "threads"])
def test_a_task_whose_result_cannot_be_stored_blocks_its_tag(
    results: Server, cluster: Cluster, history_path: Path, pool: str
) -> None:
    producer, tag, _ = end_without(results, cluster, history_path, pool, on_failure="block")
    wait_until(lambda: producer.affinity.dead_letters("jobs"), what="the burial")
    (letter,) = producer.affinity.dead_letters("jobs")
    assert "Error" in letter.reason and "Traceback" in letter.traceback
    results.start()
    producer.affinity.purge_dead("jobs", [letter.entry])
    wait_until(ends(tag.send(), states.SUCCESS), what="the next one's end")
    look({"": tag}, history_path)
    assert tag.order() == [0, 1, 2]


def test_a_retry_that_could_not_be_stored_is_no_failure(
    results: Server, cluster: Cluster, history_path: Path
) -> None:
    producer, tag, _ = end_without(
        results, cluster, history_path, "prefork", how="retry", on_failure="block"
    )
    wait_until(lambda: producer.affinity.stats("jobs").settled, what="its end")
    results.start()
    wait_until(lambda: producer.affinity.stats("jobs").settled == 3, what="the end of all")
    look({"": tag}, history_path)
    assert sorted(tag.order()) == [0, 0, 1]
    assert producer.affinity.dead_letters("jobs") == []
