"""Publishes for one contestant, in a process of its own (the two apps never meet).

    python -m benchmarks.submit <contestant> preload <tasks> <tags> <seconds>
    python -m benchmarks.submit <contestant> latency <samples> <tags>

`latency` publishes one task at a time to idle workers and prints its samples in ms as JSON.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from importlib import import_module
from pathlib import Path
from typing import Any

from benchmarks.records import RECORDS_VARIABLE, SIZE, load, now_ns

#: Seconds after which a single task is given up.
TASK_SECONDS = 10.0
#: Tasks that are not counted: connections, imports.
WARM_UP = 20


def preload(contestant: Any, tasks: int, tags: int, seconds: float) -> None:
    """Publish so many tasks, tag after tag in turn."""
    with contestant.app.producer_pool.acquire() as producer:
        for number in range(tasks):
            contestant.work.apply_async(
                (f"tag-{number % tags}", number // tags, seconds), producer=producer
            )


def latency(contestant: Any, samples: int, tags: int) -> list[float]:
    """Milliseconds from just before `apply_async` to the first line of the task."""
    path = Path(os.environ[RECORDS_VARIABLE])
    pauses = random.Random(5)
    began: list[int] = []
    with contestant.app.producer_pool.acquire() as producer:
        for number in range(WARM_UP + samples):
            time.sleep(pauses.uniform(0.005, 0.015))
            began.append(now_ns())
            contestant.work.apply_async((f"tag-{number % tags}", number), producer=producer)
            _wait_for(path, number + 1)
    ended = {record.seq: record.time_ns for record in load(path)}
    return [(ended[number] - began[number]) / 1e6 for number in range(WARM_UP, len(began))]


def _wait_for(path: Path, count: int) -> None:
    deadline = time.monotonic() + TASK_SECONDS
    while not path.exists() or path.stat().st_size < count * SIZE:
        if time.monotonic() > deadline:
            raise TimeoutError(f"task {count} did not start within {TASK_SECONDS:g} s")
        time.sleep(0.001)


def main() -> None:
    """Do what the command line says."""
    name, what, *numbers = sys.argv[1:]
    contestant = import_module(f"benchmarks.{name}_app")
    if what == "preload":
        preload(contestant, int(numbers[0]), int(numbers[1]), float(numbers[2]))
    else:
        print(json.dumps(latency(contestant, int(numbers[0]), int(numbers[1]))))


if __name__ == "__main__":
    main()
