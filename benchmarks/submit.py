"""A publisher of its own process for each kind of message: the apps never meet.

    BENCH_CONTESTANT=... BENCH_BROKER=... python -m benchmarks.submit

Reads orders from stdin, a line of JSON each, and answers each with one. A task is written
``[tag, seq, seconds, setup]``.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from zlib import crc32

from benchmarks.contestants import CONTESTANT, QUEUE, app, work
from benchmarks.records import SIZE, load, now_ns

#: Seconds after which a single task is given up.
TASK_SECONDS = 10.0
#: Tasks that are not counted: connections, imports.
WARM_UP = 20


def _send(producer: Any, task: list[Any], queues: int) -> None:
    options: dict[str, Any] = {}
    if CONTESTANT == "hashed":
        options["queue"] = f"{QUEUE}-{crc32(task[0].encode()) % queues}"
    work.apply_async(tuple(task), producer=producer, **options)


def preload(producer: Any, tasks: list[list[Any]], queues: int) -> int:
    """Publish all, one after the other."""
    for task in tasks:
        _send(producer, task, queues)
    return len(tasks)


def trickle(
    producer: Any, tasks: list[list[Any]], queues: int, pause: float, records: str
) -> list[int]:
    """Once a first task has run, publish one each `pause` seconds; when each was published."""
    _wait_for(Path(records), 1)
    published = []
    due = time.monotonic()
    for task in tasks:
        time.sleep(max(0.0, due - time.monotonic()))
        due += pause
        published.append(now_ns())
        _send(producer, task, queues)
    return published


def latency(producer: Any, samples: int, tags: int, records: str) -> list[float]:
    """Milliseconds from just before `apply_async` to the first line of the task, one at a time."""
    path = Path(records)
    pauses = random.Random(5)
    began: list[int] = []
    for number in range(WARM_UP + samples):
        time.sleep(pauses.uniform(0.005, 0.015))
        began.append(now_ns())
        _send(producer, [f"tag-{number % tags}", number], 1)
        _wait_for(path, number + 1)
    first_line = {record.seq: record.began for record in load(path)}
    return [(first_line[number] - began[number]) / 1e6 for number in range(WARM_UP, len(began))]


def _wait_for(path: Path, count: int) -> None:
    deadline = time.monotonic() + TASK_SECONDS
    while not path.exists() or path.stat().st_size < count * SIZE:
        if time.monotonic() > deadline:
            raise TimeoutError(f"task {count} did not run within {TASK_SECONDS:g} s")
        time.sleep(0.001)


def main() -> None:
    """Do what is ordered until stdin ends."""
    orders: dict[str, Callable[..., Any]] = {
        "preload": preload,
        "trickle": trickle,
        "latency": latency,
    }
    answers = os.fdopen(os.dup(1), "w")
    with app.producer_pool.acquire() as producer:
        for line in sys.stdin:
            order = json.loads(line)
            answer = orders[order.pop("do")](producer, **order)
            answers.write(json.dumps(answer) + "\n")
            answers.flush()


if __name__ == "__main__":
    main()
