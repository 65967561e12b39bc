"""`python -m benchmarks.latency`: how soon an idle worker starts, and the gap between two tasks."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from itertools import pairwise
from statistics import median, quantiles
from typing import Any

from benchmarks.pages import Options, Section, main, spread, table
from benchmarks.records import Record
from benchmarks.runs import Arena, Pool, Task, ratios, shown, turns
from celery_affinity.embedded import Server

#: Who waits for single tasks: contestant, whether a beat service schedules.
WAITERS = {
    "plain Celery": ("plain", False),
    "affinity, role `both`": ("affinity", False),
    "affinity, beat service": ("affinity", True),
}
POOL = Pool(1, 4)
TAGS = 20
GAP_POOLS = (Pool(1, 1), Pool(1, 4))
GAP_CONTESTANTS = ("affinity", "plain")

Found = dict[str, float]


def _percentiles(samples: Sequence[float]) -> Found:
    cuts = quantiles(samples, n=100)
    return {"p50": round(cuts[49], 3), "p99": round(cuts[98], 3)}


def idle_start(arena: Arena, waiter: str, samples: int) -> Found:
    """From just before `apply_async` to the first line of the task, one task at a time."""
    contestant, beat = WAITERS[waiter]
    publisher = arena.publisher(contestant)
    with arena.started(contestant, POOL, beat=beat) as bench:
        publisher.order("latency", samples=samples, tags=TAGS, records=str(bench.records))
        return _percentiles(publisher.answer())


def gap(arena: Arena, contestant: str, pool: Pool, tasks: int) -> Found:
    """From a task's last line to the next one's first, in each process, all of one tag."""
    workload: list[Task] = [("tag-0", n, 0.0, 0.0) for n in range(tasks)]
    run = arena.run(contestant, pool, f"one tag {tasks}", workload)
    return _percentiles(gaps(run.records[tasks // 10 : tasks * 9 // 10]))


def gaps(records: Sequence[Record]) -> list[float]:
    """Milliseconds between two tasks of a process."""
    by_process: dict[int, list[Record]] = defaultdict(list)
    for record in records:
        by_process[record.pid].append(record)
    return [
        (after.began - before.ended) / 1e6
        for ran in by_process.values()
        for before, after in pairwise(ran)
    ]


def measure(server: Server, options: Options) -> Section:
    """All in turn."""
    samples, tasks = (60, 300) if options.quick else (150, 1000)
    starts: dict[str, list[Found]] = {name: [] for name in WAITERS}
    between: dict[tuple[str, str], list[Found]] = defaultdict(list)
    with Arena(server) as arena:
        for number in range(options.pairs):
            for waiter in turns(tuple(WAITERS), number):
                starts[waiter].append(idle_start(arena, waiter, samples))
                print(f"{waiter:24}{shown(starts[waiter][-1])}", flush=True)
            for pool in GAP_POOLS:
                for contestant in turns(GAP_CONTESTANTS, number):
                    found = gap(arena, contestant, pool, tasks)
                    between[contestant, str(pool)].append(found)
                    print(f"gap {pool!s:10}{contestant:10}{shown(found)}", flush=True)
    raw: dict[str, Any] = {
        "idle_start_ms": starts,
        "gap_ms": {", ".join(key): found for key, found in between.items()},
    }
    return Section("Latency", _text(starts, between, samples, tasks), raw)


def _text(
    starts: dict[str, list[Found]],
    between: dict[tuple[str, str], list[Found]],
    samples: int,
    tasks: int,
) -> str:
    def of(found: Sequence[Found], what: str) -> list[float]:
        return [one[what] for one in found]

    plain = starts["plain Celery"]
    idle = table(
        ("", "p50, ms", "p99, ms", "p50 against plain", "p99 against plain"),
        [
            (
                name,
                *(f"{median(of(found, what)):.2f}" for what in ("p50", "p99")),
                *(spread(ratios(of(found, what), of(plain, what))) for what in ("p50", "p99")),
            )
            for name, found in starts.items()
        ],
    )

    def differences(pool: Pool, what: str) -> str:
        ours, theirs = (of(between[name, str(pool)], what) for name in GAP_CONTESTANTS)
        return f"{median(a - b for a, b in zip(ours, theirs, strict=True)):+.2f}"

    gap_table = table(
        ("workers", "affinity p50 / p99, ms", "plain p50 / p99, ms", "difference of p50", "of p99"),
        [
            (
                pool,
                *(
                    f"{median(of(between[name, str(pool)], 'p50')):.2f} / "
                    f"{median(of(between[name, str(pool)], 'p99')):.2f}"
                    for name in GAP_CONTESTANTS
                ),
                differences(pool, "p50"),
                differences(pool, "p99"),
            )
            for pool in GAP_POOLS
        ],
    )
    rounds = len(plain)
    return (
        f"Start of one task at a time by an idle worker, {POOL}, from just before `apply_async` to "
        f"the first line of the task; of {rounds} rounds of {samples} tasks in turn, medians, "
        f"ratios with the least and the most.\n\n{idle}\n\n"
        f"Gap between two tasks in one process, {tasks:,} no-op tasks of one tag, all waiting; "
        f"medians of {rounds} rounds in turn. (With `-c 4` plain Celery runs them in all four "
        f"processes, affinity in one.)\n\n{gap_table}"
    )


if __name__ == "__main__":
    main("latency", measure, 600, __doc__)
