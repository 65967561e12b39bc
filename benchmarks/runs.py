"""One run of one contestant: its workers on a queue that was published before they start."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from redis import Redis

from benchmarks.processes import Nodes, Publisher
from benchmarks.records import RECORDS_VARIABLE, SIZE, Record, load
from benchmarks.scripted import Counts
from celery_affinity.embedded import Server

__all__ = ("NAMES", "Arena", "Bench", "Pool", "Run", "Task", "ratios", "rate_between")

#: As the tables name the contestants.
NAMES = {
    "affinity": "affinity",
    "plain": "plain Celery",
    "acks_late": "plain, `acks_late`",
    "hashed": "a queue per worker, hashed",
    "lock": "a lock per tag",
}
#: One run is given up after so long.
RUN_SECONDS = 60.0
#: The database in which published queues are kept, to be copied for each run.
_TEMPLATES = 9
_POLL_SECONDS = 0.005

#: Tag, number, seconds that it takes, seconds that its tag takes to set up.
Task = tuple[str, int, float, float]


@dataclass(frozen=True)
class Pool:
    """The workers of a run."""

    nodes: int
    concurrency: int
    kind: str = "prefork"

    def __str__(self) -> str:
        how = "" if self.kind == "prefork" else f" -P {self.kind}"
        return f"{self.nodes} x -c {self.concurrency}{how}"

    def of(self, contestant: str) -> Pool:
        """Hashing needs a worker, with one process, for each queue."""
        return Pool(self.nodes * self.concurrency, 1) if contestant == "hashed" else self


@dataclass
class Run:
    """What one run showed."""

    records: list[Record]
    #: Of the whole run, the workers' start included.
    redis: Counts
    #: CPU seconds of parents and of pool processes, and tasks, between 10 % and 90 %.
    parent_cpu: float
    child_cpu: float
    counted: int


class Bench:
    """A running contestant: its nodes, and the file in which tasks write what they did."""

    def __init__(self, nodes: Nodes, records: Path, client: Redis) -> None:
        self.nodes = nodes
        self.records = records
        self.client = client

    def done(self) -> int:
        """Tasks that have ended."""
        return self.records.stat().st_size // SIZE if self.records.exists() else 0

    def wait(self, count: int, window: float | None = None) -> int:
        """Until so many tasks are done, or a while after the first; how many were."""
        deadline = time.monotonic() + RUN_SECONDS
        until = None
        while (done := self.done()) < count:
            now = time.monotonic()
            if window is not None and done and until is None:
                until = now + window
            if until is not None and now > until:
                break
            if now > deadline:
                raise TimeoutError(
                    f"{done} of {count} tasks in {RUN_SECONDS:g} s\n{self.nodes.logs()}"
                )
            self.nodes.check()
            time.sleep(_POLL_SECONDS)
        return done


class Arena:
    """Runs contestants on one server.

    Arguments:
        broker: URL of another broker than the server.

    Does not: decide whose turn it is.
    """

    def __init__(self, server: Server, broker: str | None = None) -> None:
        self._server = server
        self._broker = broker or server.url()
        self._publishers: dict[str, Publisher] = {}
        self._published: dict[tuple[str, str, int], list[str]] = {}

    def __enter__(self) -> Arena:
        return self

    def __exit__(self, *_: object) -> None:
        for publisher in self._publishers.values():
            publisher.close()

    def publisher(self, contestant: str) -> Publisher:
        """The process that publishes for a contestant: messages of three are alike."""
        kind = "plain" if contestant in ("acks_late", "lock") else contestant
        if kind not in self._publishers:
            self._publishers[kind] = Publisher(kind, self._broker)
        return self._publishers[kind]

    @contextmanager
    def started(
        self,
        contestant: str,
        pool: Pool,
        name: str = "",
        tasks: Sequence[Task] = (),
        beat: bool = False,
    ) -> Iterator[Bench]:
        """Workers on a queue that holds these tasks, which `name` names, published but once."""
        pool = pool.of(contestant)
        self._publish(contestant, pool, name, tasks)
        with (
            TemporaryDirectory(prefix="affinity-bench-") as directory,
            self._server.client() as client,
        ):
            records = Path(directory) / "records"
            environ = {
                "BENCH_CONTESTANT": contestant,
                "BENCH_BROKER": self._broker,
                RECORDS_VARIABLE: str(records),
            }
            with Nodes(environ, Path(directory)) as nodes:
                if beat:
                    nodes.beat()
                for number in range(pool.nodes):
                    queue = f"bench-{number}" if contestant == "hashed" else "bench"
                    role = "worker" if beat else None
                    nodes.worker(f"w{number + 1}", queue, pool.kind, pool.concurrency, role)
                yield Bench(nodes, records, client)

    def run(
        self,
        contestant: str,
        pool: Pool,
        name: str,
        tasks: Sequence[Task],
        window: float | None = None,
    ) -> Run:
        """From the workers' start until all tasks are done, or a while after the first."""
        with self.started(contestant, pool, name, tasks) as bench:
            before = Counts.look(bench.client)
            samples = []
            for share in (0.1, 0.9, 1.0):
                done = bench.wait(int(len(tasks) * share), window)
                samples.append((done, *bench.nodes.cpu()))
            redis = Counts.look(bench.client).since(before)
            records = load(bench.records)
        low, high = samples[0], samples[1]
        return Run(records, redis, high[1] - low[1], high[2] - low[2], high[0] - low[0])

    def _publish(self, contestant: str, pool: Pool, name: str, tasks: Sequence[Task]) -> None:
        publisher = self.publisher(contestant)
        kind = "plain" if contestant in ("acks_late", "lock") else contestant
        queues = pool.nodes if contestant == "hashed" else 1
        with self._server.client() as client, self._server.client(_TEMPLATES) as templates:
            client.flushdb()
            key = (kind, name, queues)
            if key not in self._published:
                publisher.order("preload", tasks=tasks, queues=queues)
                publisher.answer()
                names = [found.decode() for found in client.scan_iter("bench*")]
                waiting = sum(client.llen(queue) for queue in names)
                if waiting != len(tasks):
                    raise RuntimeError(f"{waiting} of {len(tasks)} tasks were published")
                for queue in names:
                    client.copy(queue, f"{key}:{queue}", destination_db=_TEMPLATES)
                self._published[key] = names
                client.flushdb()
            for queue in self._published[key]:
                templates.copy(f"{key}:{queue}", queue, destination_db=0)


def rate_between(records: Sequence[Record], nodes: int) -> float:
    """Tasks a second from 10 % to 90 % of them, and not before every node took part."""
    first = max(len(records) // 10, _all_take_part(records, nodes))
    last = len(records) * 9 // 10
    return (last - first) / (records[last].began - records[first].began) * 1e9


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """Pair by pair."""
    return [one / other for one, other in zip(ours, theirs, strict=True)]


def middle(values: Sequence[float]) -> float:
    """The median."""
    return median(values)


def _all_take_part(records: Sequence[Record], nodes: int) -> int:
    """Index of the first record after which every node has begun."""
    seen: set[int] = set()
    for index, record in enumerate(records):
        seen.add(record.parent)
        if len(seen) == nodes:
            return index
    raise RuntimeError(f"only {len(seen)} of {nodes} workers ran a task")


def turns(contestants: Sequence[str], number: int) -> list[str]:
    """Whose turn it is, one after the other; who goes first changes with each round."""
    at = number % len(contestants)
    order = [*contestants[at:], *contestants[:at]]
    return order if number % 2 == 0 else order[::-1]


def shown(run: dict[str, Any]) -> str:
    """A run in one line."""
    return "  ".join(
        f"{name} {value:,.2f}" if isinstance(value, float) else f"{name} {value}"
        for name, value in run.items()
    )
