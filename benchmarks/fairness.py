"""`python -m benchmarks.fairness`: how long cold tags wait while one hot tag has all the work."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from statistics import median, quantiles
from typing import Any

from benchmarks.pages import Options, Section, main, spread, table
from benchmarks.records import Record, load
from benchmarks.runs import NAMES, RUN_SECONDS, Arena, Pool, Task, ratios, shown, turns
from celery_affinity.embedded import Server

CONTESTANTS = ("affinity", "plain", "hashed", "lock")
POOL = Pool(1, 4)
TASK_SECONDS = 0.005
#: The hot tag's tasks, which plain Celery needs more than a second for.
HOT = 1000
#: Tasks of cold tags, one each 10 ms, while the hot one's wait.
TRICKLE, COLD_TAGS, PAUSE_SECONDS = 100, 19, 0.01
#: For Jain's index: the hot tag's tasks first, then those of the others in turn.
HOT_FIRST, COLD_EACH = 600, 30
#: For that long at most.
WINDOW_SECONDS = 2.0

Found = dict[str, Any]


def waits(arena: Arena, contestant: str, scale: float) -> Found:
    """Milliseconds from publishing to start of the cold tags' tasks."""
    hot, cold = int(HOT * scale), int(TRICKLE * scale)
    preloaded: list[Task] = [("tag-0", n, TASK_SECONDS, 0.0) for n in range(hot)]
    late: list[Task] = [(f"tag-{1 + n % COLD_TAGS}", n, TASK_SECONDS, 0.0) for n in range(cold)]
    publisher = arena.publisher(contestant)
    with arena.started(contestant, POOL, f"hot {hot}", preloaded) as bench:
        queues = POOL.of(contestant).nodes
        path = str(bench.records)
        publisher.order("trickle", tasks=late, queues=queues, pause=PAUSE_SECONDS, records=path)
        published = publisher.answer()
        started: dict[int, int] = {}
        deadline = time.monotonic() + RUN_SECONDS
        while len(started) < cold:
            if time.monotonic() > deadline:
                raise TimeoutError(f"{len(started)} of {cold} cold tasks\n{bench.nodes.logs()}")
            bench.nodes.check()
            time.sleep(0.05)
            started = {r.seq: r.began for r in load(bench.records) if r.tag > 0}
    found = [(started[n] - published[n]) / 1e6 for n in range(cold)]
    cuts = quantiles(found, n=100)
    return {"p50": round(cuts[49], 1), "p99": round(cuts[98], 1)}


def index(arena: Arena, contestant: str, scale: float) -> Found:
    """Jain's index over the tasks that each tag got done while every tag had some left."""
    hot, each = int(HOT_FIRST * scale), int(COLD_EACH * scale)
    tasks: list[Task] = [("tag-0", n, TASK_SECONDS, 0.0) for n in range(hot)]
    tasks += [(f"tag-{1 + n % COLD_TAGS}", n, TASK_SECONDS, 0.0) for n in range(each * COLD_TAGS)]
    run = arena.run(contestant, POOL, f"jain {hot}", tasks, WINDOW_SECONDS)
    return {"jain": round(jain(run.records, {0: hot}, each), 3)}


def jain(records: Sequence[Record], own: dict[int, int], each: int) -> float:
    """(sum x)^2 / (n sum x^2): 1 if all got the same, 1/n if one got all."""
    done: Counter[int] = Counter()
    for record in sorted(records, key=lambda record: record.ended):
        done[record.tag] += 1
        if done[record.tag] == own.get(record.tag, each):
            break
    square = sum(count**2 for count in done.values())
    return done.total() ** 2 / ((COLD_TAGS + 1) * square)


def measure(server: Server, options: Options) -> Section:
    """Contestants in turn."""
    scale = 0.4 if options.quick else 1.0
    runs: dict[str, list[Found]] = {name: [] for name in CONTESTANTS}
    with Arena(server) as arena:
        for number in range(options.pairs):
            for contestant in turns(CONTESTANTS, number):
                found = {**waits(arena, contestant, scale), **index(arena, contestant, scale)}
                runs[contestant].append(found)
                print(f"{contestant:10}{shown(found)}", flush=True)
    raw = [{"contestant": name, "runs": found} for name, found in runs.items()]
    return Section("Fairness", _text(runs), raw)


def _text(runs: dict[str, list[Found]]) -> str:
    def of(name: str, what: str) -> list[float]:
        return [run[what] for run in runs[name]]

    found = table(
        (
            "",
            "p50, ms",
            "p99, ms",
            "p50 against affinity's",
            "p99 against affinity's",
            "Jain's index",
        ),
        [
            (
                NAMES[name],
                f"{median(of(name, 'p50')):,.0f}",
                f"{median(of(name, 'p99')):,.0f}",
                *(spread(ratios(of(name, what), of("affinity", what))) for what in ("p50", "p99")),
                f"{median(of(name, 'jain')):.2f}",
            )
            for name in CONTESTANTS
        ],
    )
    return (
        f"{POOL} (hashing: 4 x -c 1), tasks of {TASK_SECONDS * 1000:.0f} ms. {HOT:,} tasks of one "
        f"hot tag wait; from the first one's start on, {TRICKLE} tasks of {COLD_TAGS} cold tags "
        f"are published, one each {PAUSE_SECONDS * 1000:.0f} ms: how long those wait for their "
        f"start, medians of {len(runs['affinity'])} runs in turn. Jain's index is of another run: "
        f"{HOT_FIRST} tasks of a hot tag wait before {COLD_EACH} of each of {COLD_TAGS} others; it "
        "compares what each tag got done until the first had nothing left, or for "
        f"{WINDOW_SECONDS:g} s (1: all the same; {1 / (COLD_TAGS + 1):.2f}: one got all)."
        f"\n\n{found}"
    )


if __name__ == "__main__":
    main("fairness", measure, 600, __doc__)
