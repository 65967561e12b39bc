"""`python -m benchmarks.rabbitmq`: tasks a second on RabbitMQ, against plain Celery on it."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from statistics import median
from typing import Any

from kombu import Connection, Queue

from benchmarks.pages import Options, Section, main, spread, table
from benchmarks.runs import NAMES, Arena, Pool, Task, rate_between, ratios, shown, turns
from benchmarks.throughput import TAGS, Case
from celery_affinity.embedded import Server
from tests.rabbit import RabbitServer, start_rabbit

CONTESTANTS = ("affinity", "plain", "acks_late")
CASES = (
    Case("no-op", Pool(2, 1), 0, 3000, CONTESTANTS),
    Case("no-op", Pool(1, 4), 0, 3000, CONTESTANTS),
    Case("1 ms", Pool(1, 4), 0.001, 1000, CONTESTANTS),
    Case("10 ms", Pool(1, 4), 0.01, 400, CONTESTANTS),
)
QUICK_CASES = (Case("no-op", Pool(2, 1), 0, 300, CONTESTANTS),)
TYPES = ("classic", "quorum")

Found = dict[str, Any]


class RabbitArena(Arena):
    """Runs contestants on RabbitMQ, with a queue of one type; the ledger is on the server.

    Does not: keep what was published; each run has it published again.
    """

    def __init__(self, server: Server, rabbit: RabbitServer, queue_type: str) -> None:
        super().__init__(server, rabbit.new_virtual_host())
        self._environ = {"AFFINITY_REDIS_URL": server.url(), "BENCH_QUEUE_TYPE": queue_type}
        os.environ.update(self._environ)
        self._arguments = {"x-queue-type": "quorum"} if queue_type == "quorum" else None

    def _publish(self, contestant: str, pool: Pool, name: str, tasks: Sequence[Task]) -> None:
        os.environ.update(self._environ)
        publisher = self.publisher(contestant)
        with self._server.client() as client, Connection(self._broker) as connection:
            client.flushdb()
            # Emptied, not deleted: the publisher has declared it, and would not again.
            queue = Queue("bench", queue_arguments=self._arguments)(connection.default_channel)
            queue.queue_declare()
            queue.purge()
            publisher.order("preload", tasks=tasks, queues=1)
            publisher.answer()
            # Publishes are not confirmed: the last ones may be under way.
            deadline, waiting = time.monotonic() + 10, 0
            while waiting != len(tasks) and time.monotonic() < deadline:
                waiting = queue.queue_declare(passive=True).message_count
        if waiting != len(tasks):
            raise RuntimeError(f"{waiting} of {len(tasks)} tasks were published")


def measure(server: Server, options: Options) -> Section:
    """Every case on both types of queue, its contestants in turn."""
    results: dict[tuple[str, Case], dict[str, list[float]]] = {}
    with start_rabbit() as rabbit:
        for queue_type in TYPES:
            with RabbitArena(server, rabbit, queue_type) as arena:
                for case in QUICK_CASES if options.quick else CASES:
                    results[queue_type, case] = _rates(arena, queue_type, case, options.pairs)
        version = rabbit.version
    raw = [
        {"case": f"{queue_type}, {case.name}, {case.pool}", "tasks": case.tasks, "rates": rates}
        for (queue_type, case), rates in results.items()
    ]
    return Section("RabbitMQ", _text(results, options.pairs, version), raw)


def _rates(arena: RabbitArena, queue_type: str, case: Case, pairs: int) -> dict[str, list[float]]:
    rates: dict[str, list[float]] = {name: [] for name in case.contestants}
    for number in range(pairs):
        for contestant in turns(case.contestants, number):
            run = arena.run(contestant, case.pool, "", case.workload())
            found: Found = {"rate": round(rate_between(run.records, case.pool.nodes), 1)}
            rates[contestant].append(found["rate"])
            print(
                f"{queue_type:8}{case.name:6}{case.pool!s:20}{contestant:10}{shown(found)}",
                flush=True,
            )
    return rates


def _text(
    results: dict[tuple[str, Case], dict[str, list[float]]], pairs: int, version: str
) -> str:
    rows = [
        (
            queue_type, case.name, case.pool,
            *(f"{median(rates[name]):,.0f}" for name in CONTESTANTS),
            *(spread(ratios(rates["affinity"], rates[name])) for name in CONTESTANTS[1:]),
        )
        for (queue_type, case), rates in results.items()
    ]
    head = (
        "pending queue", "task", "workers", *(f"{NAMES[name]}, tasks/s" for name in CONTESTANTS),
        *(f"affinity against {NAMES[name]}" for name in CONTESTANTS[1:]),
    )
    return (
        f"RabbitMQ {version} is the broker of all, on the same two cores as everything else; "
        "affinity's ledger is a Redis beside it. Ratios: median (least - most) of "
        f"{pairs} pairs, all in turn. Results are ignored; {TAGS} tags; all tasks wait in the "
        "queue before the workers start. The rate is that between 10 % and 90 % of the tasks.\n\n"
        f"{table(head, rows)}"
    )


if __name__ == "__main__":
    main("rabbitmq", measure, 1500, __doc__)
