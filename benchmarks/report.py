"""The results as markdown: ratios with their spread, and what one task costs."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median, quantiles

from benchmarks.measure import Case, Drain

__all__ = ("Results", "machine", "markdown")

#: What stands below this line in docs/performance.md was written by hand, and stays.
NOTES = "<!-- notes: kept by the benchmark -->"

_HEAD = """# Performance

Written by `make bench` ({command}) on {when}; do not edit above the notes.

Machine: {machine}.

Affinity (role `both`, one of the workers leads; everything else a default) and plain Celery with
its defaults take turns on one server, {pairs} pairs for each case ({slow} where tasks sleep); who
goes first alternates.
Tasks ignore their results, belong to 20 tags, and all wait in the queue before the workers start.
A task writes 32 bytes to a file and returns (or sleeps for 1 ms). The rate is that between 10 % and
90 % of the tasks, from the times that they wrote down.
"""


@dataclass
class Results:
    """All that was measured."""

    drains: dict[Case, list[tuple[Drain, Drain]]]
    latencies: dict[str, list[list[float]]]
    machine: str
    when: str
    pairs: int
    seconds: float


def machine(server: str) -> str:
    """Processor, versions."""
    names = ("celery", "kombu", "redis")
    packages = ", ".join(
        f"{'redis-py' if name == 'redis' else name} {version(name)}" for name in names
    )
    return (
        f"{os.cpu_count()} cores of {_processor()}, {platform.system()} {platform.release()}, "
        f"Python {platform.python_version()}, {packages}, celery-affinity "
        f"{version('celery-affinity')}, {server}"
    )


def markdown(results: Results, previous: str) -> str:
    """The whole page; keeps the notes of the previous one."""
    parts = [
        _HEAD.format(
            command=f"`python -m benchmarks.run --pairs {results.pairs}`, {results.seconds:.0f} s",
            when=results.when,
            machine=results.machine,
            pairs=results.pairs,
            slow=len(next(reversed(results.drains.values()))),
        ),
        "## Throughput\n",
        _throughput(results),
        "\n## What one task costs\n",
        "Medians. Redis over the whole run, its commands inside of scripts counted; "
        "CPU of the workers between 10 % and 90 %.\n",
        _costs(results),
        "\n## Start latency of an idle worker\n",
        "One task at a time, one worker `-c 4`, from just before `apply_async` to the first line "
        f"of the task; {_rounds(results)}.\n",
        _latency(results),
        "\n## Where tasks of a tag run\n",
        "Share that the busiest process had, mean over tags (over leases).\n",
        _places(results),
        f"\n{NOTES}{previous.partition(NOTES)[2] or chr(10)}",
    ]
    return "\n".join(parts)


def _throughput(results: Results) -> str:
    rows = []
    for case, pairs in results.drains.items():
        ratios = [ours.rate / theirs.rate for ours, theirs in pairs]
        whole = [ours.whole_rate / theirs.whole_rate for ours, theirs in pairs]
        rows.append(
            (
                case.name,
                case.nodes,
                f"{case.tasks:,}",
                f"{median(ours.rate for ours, _ in pairs):,.0f}",
                f"{median(theirs.rate for _, theirs in pairs):,.0f}",
                f"{min(ratios):.2f} / **{median(ratios):.2f}** / {max(ratios):.2f}",
                f"{median(whole):.2f}",
            )
        )
    return _table(
        (
            "task",
            "workers",
            "tasks",
            "affinity, tasks/s",
            "plain, tasks/s",
            "ratio min / median / max",
            "ratio, first to last task",
        ),
        rows,
    )


def _costs(results: Results) -> str:
    kinds: Sequence[tuple[str, Callable[[Drain], float], str]] = (
        ("Redis commands", lambda run: run.redis_commands, ".1f"),
        ("Redis CPU, us", lambda run: run.redis_cpu_us, ".0f"),
        ("worker parents' CPU, us", lambda run: run.parent_cpu_us, ".0f"),
        ("pool processes' CPU, us", lambda run: run.child_cpu_us, ".0f"),
    )
    rows = []
    for case, pairs in results.drains.items():
        cells = [
            f"{median(of(ours) for ours, _ in pairs):{form}} / "
            f"{median(of(theirs) for _, theirs in pairs):{form}}"
            for _, of, form in kinds
        ]
        rows.append((case.name, case.nodes, *cells))
    return _table(
        ("task", "workers", *(f"{name} (affinity / plain)" for name, _, _ in kinds)), rows
    )


def _latency(results: Results) -> str:
    plain50, plain99 = (_of_rounds(results.latencies["plain Celery"], at) for at in (50, 99))
    rows = [
        (
            name,
            f"{_of_rounds(rounds, 50):.2f}",
            f"{_of_rounds(rounds, 99):.2f}",
            f"{_of_rounds(rounds, 50) / plain50:.2f}",
            f"{_of_rounds(rounds, 99) / plain99:.2f}",
        )
        for name, rounds in results.latencies.items()
    ]
    return _table(("", "p50, ms", "p99, ms", "p50 against plain", "p99 against plain"), rows)


def _places(results: Results) -> str:
    rows = [
        (
            case.name,
            case.nodes,
            f"{median(ours.process_share for ours, _ in pairs):.0%} "
            f"({median(ours.lease_share for ours, _ in pairs):.0%})",
            f"{median(theirs.process_share for _, theirs in pairs):.0%}",
        )
        for case, pairs in results.drains.items()
        if case.concurrency > 1
    ]
    return _table(("task", "workers", "affinity: of a tag (of a lease)", "plain: of a tag"), rows)


def _of_rounds(rounds: Sequence[Sequence[float]], percentile: int) -> float:
    """Median over the rounds of a percentile of each."""
    return median(quantiles(samples, n=100)[percentile - 1] for samples in rounds)


def _rounds(results: Results) -> str:
    rounds = next(iter(results.latencies.values()))
    return f"median of {len(rounds)} rounds of {len(rounds[0])} tasks, in turn"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
