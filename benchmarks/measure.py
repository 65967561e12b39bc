"""One run of one contestant: drain a preloaded queue, or wait for single tasks."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from redis import Redis

from benchmarks.processes import Nodes, run_python
from benchmarks.records import (
    RECORDS_VARIABLE,
    SIZE,
    Record,
    busiest_process_share,
    lease_share,
    load,
)
from celery_affinity.embedded import Server

__all__ = ("Case", "Drain", "drain", "latency", "preload")

TAGS = 20
#: One run is given up after so long.
RUN_SECONDS = 60.0
#: The database in which published queues are kept, to be copied for each run.
_TEMPLATES = 9
_POLL_SECONDS = 0.01


@dataclass(frozen=True)
class Case:
    """What is drained, and by which workers."""

    name: str
    workers: int
    concurrency: int
    task_seconds: float
    tasks: int

    @property
    def nodes(self) -> str:
        """The workers, as the table names them."""
        return f"{self.workers} x -c {self.concurrency}"


@dataclass
class Drain:
    """What one run showed: rate and worker CPU from 10 % to 90 % of the tasks, Redis over all."""

    rate: float
    whole_rate: float
    redis_commands: float
    redis_cpu_us: float
    parent_cpu_us: float
    child_cpu_us: float
    process_share: float
    lease_share: float
    commands: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class _Sample:
    done: int
    cpu: tuple[float, float]


def preload(server: Server, contestant: str, case: Case) -> None:
    """Publish a case's tasks once, and keep them for its runs."""
    with server.client() as client:
        client.flushdb()
        run_python(
            [
                "-m",
                "benchmarks.submit",
                contestant,
                "preload",
                str(case.tasks),
                str(TAGS),
                str(case.task_seconds),
            ],
            {"BENCH_BROKER": server.url()},
            RUN_SECONDS,
        )
        if client.llen("bench") != case.tasks:
            raise RuntimeError(f"{client.llen('bench')} of {case.tasks} tasks were published")
        client.copy("bench", _template(contestant, case), destination_db=_TEMPLATES)
        client.flushdb()


def drain(server: Server, contestant: str, case: Case) -> Drain:
    """Start workers on a full queue and measure until it is done."""
    with _fresh(server) as (directory, records, environ, client):
        with server.client(_TEMPLATES) as templates:
            templates.copy(_template(contestant, case), "bench", destination_db=0)
        before = _redis(client)
        with Nodes(environ, directory) as nodes:
            for number in range(case.workers):
                nodes.worker(f"benchmarks.{contestant}_app", f"w{number + 1}", case.concurrency)
            low, high = _watch(nodes, records, case.tasks)
            after = _redis(client)
        return _judge(case, load(records), low, high, before, after)


def latency(server: Server, contestant: str, beat: bool, samples: int) -> list[float]:
    """Start latencies in ms of single tasks on one idle worker with four processes."""
    with (
        _fresh(server) as (directory, _, environ, _),
        Nodes(environ, directory) as nodes,
    ):
        app = f"benchmarks.{contestant}_app"
        if beat:
            nodes.set_environ(AFFINITY_ROLE="scheduler")
            nodes.start(
                "beat", ["-A", app, "beat", "-S", "affinity", "-s", "schedule", "--pidfile="]
            )
            nodes.set_environ(AFFINITY_ROLE="worker")
        nodes.worker(app, "w1", 4)
        output = run_python(
            ["-m", "benchmarks.submit", contestant, "latency", str(samples), str(TAGS)],
            environ,
            RUN_SECONDS,
        )
        nodes.check()
        found: list[float] = json.loads(output)
        return found


def as_json(found: Drain, records: int = 12) -> dict[str, Any]:
    """A run for the raw file, with its most frequent commands."""
    whole = asdict(found)
    most = sorted(found.commands.items(), key=lambda item: -item[1])[:records]
    return {**whole, "commands": {name: round(per_task, 3) for name, per_task in most}}


@contextmanager
def _fresh(server: Server) -> Iterator[tuple[Path, Path, dict[str, str], Redis]]:
    with TemporaryDirectory(prefix="affinity-bench-") as name, server.client() as client:
        client.flushdb()
        directory = Path(name)
        records = directory / "records"
        yield (
            directory,
            records,
            {"BENCH_BROKER": server.url(), RECORDS_VARIABLE: str(records)},
            client,
        )


def _template(contestant: str, case: Case) -> str:
    return f"{contestant}:{case.tasks}:{case.task_seconds:g}"


def _watch(nodes: Nodes, records: Path, tasks: int) -> tuple[_Sample, _Sample]:
    """Wait for the end; samples of CPU at 10 % and at 90 % of the tasks."""
    samples: list[_Sample] = []
    deadline = time.monotonic() + RUN_SECONDS
    marks = [tasks * 0.1, tasks * 0.9, tasks]
    while len(samples) < len(marks):
        done = records.stat().st_size // SIZE if records.exists() else 0
        if done >= marks[len(samples)]:
            samples.append(_Sample(done, nodes.cpu()))
            continue
        nodes.check()
        if time.monotonic() > deadline:
            raise TimeoutError(f"{done} of {tasks} tasks in {RUN_SECONDS:g} s\n{nodes.all_logs()}")
        time.sleep(_POLL_SECONDS)
    return samples[0], samples[1]


def _judge(
    case: Case,
    records: list[Record],
    low: _Sample,
    high: _Sample,
    before: dict[str, float],
    after: dict[str, float],
) -> Drain:
    first = max(len(records) // 10, _all_take_part(records, case.workers))
    last = len(records) * 9 // 10
    middle = (records[last].time_ns - records[first].time_ns) / 1e9
    whole = (records[-1].time_ns - records[0].time_ns) / 1e9
    spent = {name: (after[name] - before.get(name, 0)) / case.tasks for name in after}
    cpu = spent.pop("cpu")
    between = high.done - low.done
    return Drain(
        rate=(last - first) / middle,
        whole_rate=(len(records) - 1) / whole,
        redis_commands=sum(spent.values()),
        redis_cpu_us=cpu * 1e6,
        parent_cpu_us=(high.cpu[0] - low.cpu[0]) / between * 1e6,
        child_cpu_us=(high.cpu[1] - low.cpu[1]) / between * 1e6,
        process_share=busiest_process_share(records),
        lease_share=lease_share(records),
        commands=spent,
    )


def _all_take_part(records: list[Record], workers: int) -> int:
    """Index of the first record after which every worker has begun."""
    seen: set[int] = set()
    for index, record in enumerate(records):
        seen.add(record.parent)
        if len(seen) == workers:
            return index
    raise RuntimeError(f"only {len(seen)} of {workers} workers ran a task")


def _redis(client: Redis) -> dict[str, float]:
    """Calls so far by command (those inside of scripts too), and "cpu" seconds of the server."""
    calls = {
        name.removeprefix("cmdstat_"): float(stats["calls"])
        for name, stats in client.info("commandstats").items()
    }
    cpu = client.info("cpu")
    return {**calls, "cpu": float(cpu["used_cpu_user"]) + float(cpu["used_cpu_sys"])}
