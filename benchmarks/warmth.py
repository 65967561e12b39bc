"""`python -m benchmarks.warmth`: what it is worth that a tag's tasks find their tag set up."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from benchmarks.pages import Options, Section, main, spread, table
from benchmarks.records import Record
from benchmarks.runs import NAMES, Arena, Pool, Task, ratios, shown, turns
from celery_affinity.embedded import Server

CONTESTANTS = ("affinity", "plain", "hashed", "lock")
POOL = Pool(1, 4)
#: As contestants.KEPT_TAGS, which only a contestant's own process can import.
KEPT_TAGS = 8
TASK_SECONDS = 0.001
#: A run ends so long after its first task: with every task cold, all would take minutes.
WINDOW_SECONDS = 3.0

Found = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """How dear a tag's set-up is, and how many tags share the work in which way."""

    setup_ms: int
    tags: int
    zipf: bool
    tasks: int

    def __str__(self) -> str:
        return f"{self.setup_ms} ms, {self.tags} tags, {'Zipf' if self.zipf else 'uniform'}"

    def workload(self) -> list[Task]:
        """The same for every contestant."""
        rng = random.Random(f"{self.tags} {self.zipf}")
        weights = [1 / rank if self.zipf else 1 for rank in range(1, self.tags + 1)]
        tags = rng.choices(range(self.tags), weights, k=self.tasks)
        return [(f"tag-{tag}", n, TASK_SECONDS, self.setup_ms / 1000) for n, tag in enumerate(tags)]


CASES = (
    Case(50, 1, False, 1000),
    Case(50, 10, False, 2000),
    Case(50, 100, False, 2000),
    Case(50, 100, True, 2000),
    Case(50, 1000, False, 4000),
    Case(50, 1000, True, 4000),
    Case(5, 100, False, 2000),
    Case(5, 100, True, 2000),
    Case(0, 100, False, 2000),
)
QUICK_CASES = (Case(50, 100, True, 600),)


def once(arena: Arena, case: Case, contestant: str) -> Found:
    """One contestant works at a case for the window, or to its end."""
    run = arena.run(contestant, POOL, str(case), case.workload(), WINDOW_SECONDS)
    records = run.records
    seconds = (max(record.ended for record in records) - records[0].began) / 1e9
    return {
        "rate": round(len(records) / seconds, 1),
        "warm": round(1 - sum(record.cold for record in records) / len(records), 4),
        "cold_within_leases": _cold_within_leases(records),
        "tasks": len(records),
    }


def _cold_within_leases(records: Sequence[Record]) -> int:
    seen: set[tuple[int, int]] = set()
    cold = 0
    for record in records:
        lease = record.tag, record.epoch
        cold += record.epoch > 0 and record.cold and lease in seen
        seen.add(lease)
    return cold


def measure(server: Server, options: Options) -> Section:
    """Every case, its contestants in turn."""
    results: dict[Case, dict[str, list[Found]]] = {}
    with Arena(server) as arena:
        for case in QUICK_CASES if options.quick else CASES:
            runs: dict[str, list[Found]] = {name: [] for name in CONTESTANTS}
            for number in range(options.pairs):
                for contestant in turns(CONTESTANTS, number):
                    found = once(arena, case, contestant)
                    runs[contestant].append(found)
                    print(f"{case!s:26}{contestant:10}{shown(found)}", flush=True)
            results[case] = runs
    raw = [
        {"case": str(case), "contestant": name, "runs": found}
        for case, runs in results.items()
        for name, found in runs.items()
    ]
    return Section("The value of warmth", _text(results), raw)


def _text(results: dict[Case, dict[str, list[Found]]]) -> str:
    def of(runs: Sequence[Found], name: str) -> list[float]:
        return [run[name] for run in runs]

    rows = []
    for case, runs in results.items():
        rates = {name: of(found, "rate") for name, found in runs.items()}
        rows.append(
            (
                f"{case.setup_ms} ms",
                f"{case.tags:,}",
                "Zipf" if case.zipf else "uniform",
                f"{median(rates['affinity']):,.0f}",
                *(spread(ratios(rates["affinity"], rates[name])) for name in CONTESTANTS[1:]),
                " / ".join(f"{median(of(runs[name], 'warm')):.0%}" for name in CONTESTANTS),
            )
        )
    found = table(
        (
            "set-up",
            "tags",
            "tasks by tag",
            "tasks/s",
            *(f"against {NAMES[name]}" for name in CONTESTANTS[1:]),
            "warm: affinity / plain / hashed / lock",
        ),
        rows,
    )
    everywhere = [one for runs in results.values() for one in runs["affinity"]]
    cold = sum(one["cold_within_leases"] for one in everywhere)
    return (
        f"1 ms tasks whose tag has to be set up (a sleep) where the process does not have it; it "
        f"keeps the last {KEPT_TAGS}. {POOL} (hashing: 4 x -c 1). All tasks wait at the start; a "
        f"run ends with them, or {WINDOW_SECONDS:g} s after its first task, which favours hashing: "
        "its workers then all have work still. Affinity's tasks a second, and its ratio to each "
        f"other contestant: median (least - most) of {len(everywhere) // len(results)} pairs in "
        f"turn.\n\n{found}\n\n"
        f"Of affinity's {sum(one['tasks'] for one in everywhere):,} tasks, {cold} that were not "
        "the first of their lease found their tag cold."
    )


if __name__ == "__main__":
    main("warmth", measure, 1800, __doc__)
