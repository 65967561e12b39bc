"""What the acceptance laws share: quick settings, a producer that records, looks at the system."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from celery import Celery
from redis import Redis

from acceptance.apps.affinity_app import make_app
from celery_affinity import Affinity
from celery_affinity.types import SlotRecord, WorkerRecord
from harness import Cluster, LineCounter, Node, wait_until
from history import History, Run, record

APP = "acceptance.apps.affinity_app"
#: Where a law is not about the defaults.
QUICK = {
    "AFFINITY_HEARTBEAT_INTERVAL": "0.5",
    "AFFINITY_HEARTBEAT_TIMEOUT": "2",
    "AFFINITY_LEADER_TTL": "2",
}
HEARTBEAT_TIMEOUT_SECONDS = LEADER_TTL_SECONDS = 2.0
WORKER_ONLY = {"AFFINITY_ROLE": "worker"}
#: A worker that starts quickly.
LEAN = ("--without-gossip", "--without-mingle")


class Producer:
    """Sends tasks of the test app, and records them in the order in which it does."""

    def __init__(self, broker_url: str) -> None:
        self.app: Celery
        self.affinity: Affinity
        self.app, self.affinity = make_app(broker_url)
        self._numbers: dict[str, int] = {}

    def send(self, tag: str, count: int = 1, ms: float = 0, task: str = "work", **options: Any) -> list[Any]:
        """Send the next `count` tasks of a tag; their results."""
        results = []
        with self.app.producer_pool.acquire(block=True) as producer:
            for _ in range(count):
                seq = self._numbers.get(tag, 0)
                self._numbers[tag] = seq + 1
                record("submit", tag=tag, seq=seq)
                results.append(
                    self.app.tasks[f"jobs.{task}"].apply_async(
                        (tag, seq, ms), producer=producer, **options
                    )
                )
        return results

    def send_each(self, tags: Iterable[str], count: int = 1, ms: float = 0) -> None:
        """Send the next `count` tasks of each tag, burst by burst."""
        for tag in tags:
            self.send(tag, count, ms)

    @property
    def sent(self) -> int:
        """Tasks sent so far."""
        return sum(self._numbers.values())


class EventLog:
    """Celery's events of a cluster while the context is open."""

    def __init__(self, app: Celery) -> None:
        self.events: list[dict[str, Any]] = []
        self._app = app
        self._thread = threading.Thread(target=self._capture, daemon=True)
        self._ready = threading.Event()
        self._stopping = False

    def __enter__(self) -> EventLog:
        self._thread.start()
        assert self._ready.wait(10)
        return self

    def __exit__(self, *exception: object) -> None:
        self._stopping = True
        self._thread.join(10)

    def of(self, task_id: str) -> list[str]:
        """The types of a task's events, as they came."""
        return [event["type"] for event in self.events if event.get("uuid") == task_id]

    def _capture(self) -> None:
        with self._app.connection_for_read() as connection:
            receiver = self._app.events.Receiver(connection, handlers={"*": self.events.append})
            with receiver.consumer_context() as (own, _, _):
                self._ready.set()
                while not self._stopping:
                    try:
                        own.drain_events(timeout=0.2)
                    except TimeoutError:
                        pass


def runs(history_path: Path) -> list[Run]:
    """What has started so far, in that order."""
    return History.load(history_path).runs


def starts_are(history_path: Path, count: int) -> Callable[[], bool]:
    """Whether so many tasks have started."""
    starts = LineCounter(history_path, '"event":"start"')
    return lambda: starts() >= count


def wait_for_run(
    history_path: Path, wanted: Callable[[Run], bool], timeout: float = 20.0, what: str = "a run"
) -> Run:
    """Wait until a run of that kind has started; the first."""
    return wait_until(
        lambda: next((run for run in runs(history_path) if wanted(run)), None), timeout, what
    )  # type: ignore[return-value]


def wait_for_nodes(affinity: Affinity, count: int, timeout: float = 40.0) -> None:
    """Wait until so many workers are registered."""
    wait_until(lambda: len(affinity.workers()) == count, timeout, f"{count} registered workers")


def finished(history_path: Path, timeout: float = 30.0) -> History:
    """Wait until all that was submitted is done, and judge it; processes were killed."""

    def losses() -> list[str]:
        found = History.load(history_path).violations(allow_rerun=True)
        return [str(violation) for violation in found if violation.kind == "loss"]

    wait_until(lambda: not losses(), timeout, "the end of all tasks")
    history = History.load(history_path)
    history.assert_lawful(allow_rerun=True)
    return history


def leading(affinity: Affinity, nodes: Sequence[Node]) -> Node:
    """Wait for a leader that runs; which of the nodes it is."""

    def found() -> Node | None:
        leader = affinity.leader("jobs")
        pid = leader.leader.split("/")[1] if leader else None
        return next((node for node in nodes if str(node.pid) == pid), None)

    return wait_until(found, what="a leader")


def slots(affinity: Affinity) -> list[SlotRecord]:
    """All slots of all workers."""
    return [slot for worker in affinity.workers() for slot in worker.slots]


def held_tags(worker: WorkerRecord) -> list[str]:
    """The tags that a worker's slots hold."""
    return [slot.current_identify_tag for slot in worker.slots if slot.current_identify_tag]


def keys_with(client: Redis, text: str, *, but: Sequence[str] = ()) -> list[str]:
    """Keys that hold the text in their name or anywhere in their value, except those of a name."""
    return [
        key.decode() for key in client.keys("*")
        if not any(key.decode().endswith(name) for name in but)
        and (text in key.decode() or text.encode() in _content(client, key))
    ]


def _content(client: Any, key: bytes) -> bytes:
    kind = client.type(key).decode()
    if kind == "string":
        return client.get(key) or b""
    reads: dict[str, Callable[[], Any]] = {
        "hash": lambda: client.hgetall(key).items(),
        "list": lambda: client.lrange(key, 0, -1),
        "set": lambda: client.smembers(key),
        "zset": lambda: client.zrange(key, 0, -1),
    }
    parts = reads[kind]() if kind in reads else []
    return b"\n".join(b"\t".join(part) if isinstance(part, tuple) else part for part in parts)


def per_second(history: History) -> float:
    """Tasks ended in a second, from the first start to the last end."""
    ends = [run.end for run in history.runs if run.end is not None]
    return len(ends) / ((max(ends) - history.runs[0].start) / 1e9)


def start(cluster: Cluster, *names: str, concurrency: int = 2, beat: bool = True) -> list[Node]:
    """Start workers, and a beat that schedules for them unless they do it themselves."""
    role = WORKER_ONLY if beat else {}
    workers = [
        cluster.worker(
            APP, name, queues="jobs", concurrency=concurrency, environ={**QUICK, **role}, extra=LEAN
        )
        for name in names
    ]
    if beat:
        cluster.beat(APP, environ=QUICK)
    return workers


def start_under_a_beat(cluster: Cluster, producer: Producer, environ: Mapping[str, str]) -> None:
    """Two workers that schedule nothing, and a beat that leads."""
    for name in ("w1", "w2"):
        cluster.worker(
            APP, name, queues="jobs", concurrency=2, environ={**environ, **WORKER_ONLY}, extra=LEAN
        )
    cluster.beat(APP, environ=environ)
    wait_for_nodes(producer.affinity, 2)
    wait_until(lambda: producer.affinity.leader("jobs"), what="a leader")


def assert_nobody_was_given_up(cluster: Cluster) -> None:
    for node in cluster.nodes:
        assert "is lost (no heartbeat)" not in node.log_text()
        assert "registers anew" not in node.log_text()
