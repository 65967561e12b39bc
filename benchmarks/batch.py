"""`python -m benchmarks.batch`: no-op batch tasks against plain Celery's no-op tasks, in turn."""

from __future__ import annotations

import argparse
from statistics import median

from benchmarks.measure import Case, Drain, drain, preload
from celery_affinity.embedded import start_server

CASES = (Case("no-op", 2, 1, 0.0, 8000), Case("no-op", 1, 4, 0.0, 8000))


def main() -> None:
    """Measure and print each pair and the medians."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.batch", description=__doc__)
    parser.add_argument("--pairs", type=int, default=5)
    pairs = parser.parse_args().pairs
    with start_server() as server:
        for case in CASES:
            for contestant in ("batch", "plain"):
                preload(server, contestant, case)
            ratios = []
            for number in range(pairs):
                order = ("batch", "plain") if number % 2 == 0 else ("plain", "batch")
                runs = {name: drain(server, name, case) for name in order}
                ours, theirs = runs["batch"], runs["plain"]
                ratios.append(ours.rate / theirs.rate)
                print(
                    f"{case.nodes} pair {number + 1}: batch {_told(ours)}  plain {_told(theirs)}  "
                    f"ratio {ratios[-1]:.2f}",
                    flush=True,
                )
            print(
                f"{case.nodes}: ratio {min(ratios):.2f} / {median(ratios):.2f} / {max(ratios):.2f}",
                flush=True,
            )


def _told(run: Drain) -> str:
    cpu = (run.redis_cpu_us, run.parent_cpu_us, run.child_cpu_us)
    redis, parents, processes = (f"{us:.0f}" for us in cpu)
    return (
        f"{run.rate:6.0f}/s ({run.redis_commands:.1f} commands, CPU us: Redis {redis}, "
        f"parents {parents}, processes {processes})"
    )


if __name__ == "__main__":
    main()
