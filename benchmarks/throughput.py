"""`python -m benchmarks.throughput`: how many tasks a second, against the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from benchmarks.pages import Options, Section, main, spread, table
from benchmarks.records import busiest_process_share, lease_share
from benchmarks.runs import NAMES, Arena, Pool, Task, rate_between, ratios, shown, turns
from celery_affinity.embedded import Server

TAGS = 20

_ALL = ("affinity", "plain", "acks_late", "hashed", "lock")
_CELERY = ("affinity", "plain", "acks_late")


@dataclass(frozen=True)
class Case:
    """What is drained, by which workers, of whom."""

    name: str
    pool: Pool
    seconds: float
    tasks: int
    contestants: tuple[str, ...] = _CELERY

    def workload(self) -> list[Task]:
        """Tag after tag in turn."""
        return [(f"tag-{n % TAGS}", n // TAGS, self.seconds, 0.0) for n in range(self.tasks)]


_TWO, _FOUR = Pool(2, 1), Pool(1, 4)
_THREADS, _GREENLETS = Pool(1, 4, "threads"), Pool(1, 20, "gevent")
#: Sleeping tasks vary less and take longer, so there are fewer of them.
CASES = (
    Case("no-op", _TWO, 0, 6000, (*_ALL, "batch")),
    Case("no-op", _FOUR, 0, 6000, (*_ALL, "batch")),
    Case("no-op", _THREADS, 0, 1200),
    Case("no-op", _GREENLETS, 0, 1200),
    Case("1 ms", _TWO, 0.001, 1000, _ALL),
    Case("1 ms", _FOUR, 0.001, 1000, _ALL),
    Case("1 ms", _THREADS, 0.001, 1000),
    Case("1 ms", _GREENLETS, 0.001, 1000),
    Case("10 ms", _TWO, 0.01, 240),
    Case("10 ms", _FOUR, 0.01, 400, _ALL),
    Case("10 ms", _THREADS, 0.01, 400),
    Case("10 ms", _GREENLETS, 0.01, 800),
)
QUICK_CASES = (
    Case("no-op", _TWO, 0, 600, _ALL),
    Case("no-op", _FOUR, 0, 600, (*_CELERY, "batch")),
    Case("1 ms", _THREADS, 0.001, 300),
    Case("10 ms", _GREENLETS, 0.01, 200),
)

Found = dict[str, Any]


def once(arena: Arena, case: Case, contestant: str) -> Found:
    """One contestant drains a case."""
    run = arena.run(contestant, case.pool, f"{case.tasks} x {case.seconds}", case.workload())
    found: Found = {
        "rate": round(rate_between(run.records, case.pool.of(contestant).nodes), 1),
        "commands": round(run.redis.inside / case.tasks, 2),
        "redis_us": round(run.redis.cpu_us / case.tasks, 1),
        "parent_us": round(run.parent_cpu / run.counted * 1e6, 1),
        "child_us": round(run.child_cpu / run.counted * 1e6, 1),
    }
    if case.pool.kind == "prefork":
        found["process_share"] = round(busiest_process_share(run.records), 3)
        if contestant == "affinity":
            found["lease_share"] = round(lease_share(run.records), 3)
    return found


def measure(server: Server, options: Options) -> Section:
    """Every case, its contestants in turn."""
    results: dict[Case, dict[str, list[Found]]] = {}
    with Arena(server) as arena:
        for case in QUICK_CASES if options.quick else CASES:
            runs: dict[str, list[Found]] = {name: [] for name in case.contestants}
            for number in range(options.pairs):
                for contestant in turns(case.contestants, number):
                    found = once(arena, case, contestant)
                    runs[contestant].append(found)
                    print(f"{case.name:6}{case.pool!s:20}{contestant:10}{shown(found)}", flush=True)
            results[case] = runs
    raw = [
        {
            "case": f"{case.name}, {case.pool}",
            "tasks": case.tasks,
            "contestant": name,
            "runs": found,
        }
        for case, runs in results.items()
        for name, found in runs.items()
    ]
    return Section("Throughput", _text(results), raw)


def _text(results: dict[Case, dict[str, list[Found]]]) -> str:
    def of(runs: Sequence[Found], name: str) -> list[float]:
        return [run[name] for run in runs]

    def against(case: Case, other: str) -> str:
        runs = results[case]
        if other not in runs:
            return ""
        return spread(ratios(of(runs["affinity"], "rate"), of(runs[other], "rate")))

    rates = table(
        ("task", "workers", "tasks/s", *(f"against {NAMES[name]}" for name in _ALL[1:])),
        [
            (
                case.name,
                case.pool,
                f"{median(of(runs['affinity'], 'rate')):,.0f}",
                *(against(case, other) for other in _ALL[1:]),
            )
            for case, runs in results.items()
        ],
    )

    def costs(case: Case, name: str, form: str) -> str:
        if name not in results[case]["plain"][0]:
            return ""
        return " / ".join(
            f"{median(of(results[case][who], name)):{form}}" for who in ("affinity", "plain")
        )

    kinds = {
        "Redis commands": ("commands", ".1f"),
        "Redis CPU, us": ("redis_us", ".0f"),
        "CPU of the parents, us": ("parent_us", ".0f"),
        "CPU of the pool's processes, us": ("child_us", ".0f"),
        "share of a tag's tasks in one process": ("process_share", ".0%"),
    }
    spent = table(
        ("task", "workers", *kinds),
        [
            (case.name, case.pool, *(costs(case, name, form) for name, form in kinds.values()))
            for case in results
        ],
    )
    batches = table(
        ("task", "workers", "tasks/s in batches", "against plain Celery", "against single tasks"),
        [
            (
                case.name,
                case.pool,
                f"{median(of(runs['batch'], 'rate')):,.0f}",
                *(
                    spread(ratios(of(runs["batch"], "rate"), of(runs[other], "rate")))
                    for other in ("plain", "affinity")
                ),
            )
            for case, runs in results.items()
            if "batch" in runs
        ],
    )
    pairs = len(next(iter(results.values()))["affinity"])
    return (
        "Affinity's tasks a second, and its ratio to each other contestant: median (least - most) "
        f"of {pairs} pairs, all in turn on one server. Above 1 affinity is faster. Results are "
        f"ignored; {TAGS} tags; all tasks wait in the queue before the workers start. A task "
        "writes 48 bytes to a file (and sleeps). The rate is that between 10 % and 90 % of the "
        "tasks. Hashing has a `-c 1` worker for each process that the others have; a lock that is "
        f"not got is tried again after 1 s.\n\n{rates}\n\n"
        "The same work by a batch task (`batch=True`), at most 100 entries a call.\n\n"
        f"{batches}\n\n"
        "What one task costs, affinity / plain Celery. Redis over the whole run, its commands "
        f"inside of scripts counted; CPU between 10 % and 90 %.\n\n{spent}"
    )


if __name__ == "__main__":
    main("throughput", measure, 1200, __doc__)
