"""`python -m benchmarks.run`: measure, print the table, write docs/performance.md.

Environment: PAIRS (default 5, at least 3) pairs of runs for each case; QUICK=1 measures less and
leaves docs/performance.md alone. No run outlives its hard limit, and no process outlives this one.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from datetime import datetime, timezone
from typing import Any

from benchmarks.measure import Case, Drain, as_json, drain, latency, preload
from benchmarks.processes import ROOT
from benchmarks.report import Results, machine, markdown
from celery_affinity.embedded import Server, start_server

CASES = (
    Case("no-op", 2, 1, 0.0, 6000),
    Case("no-op", 1, 4, 0.0, 6000),
    Case("1 ms", 2, 1, 0.001, 2000),
    Case("1 ms", 1, 4, 0.001, 2000),
)
QUICK_CASES = (Case("no-op", 2, 1, 0.0, 1500), Case("no-op", 1, 4, 0.0, 1500))
#: What waits for single tasks: contestant, whether a beat service schedules.
WAITERS = {
    "plain Celery": ("plain", False),
    "affinity, role both": ("affinity", False),
    "affinity, beat service": ("affinity", True),
}
#: Nothing here may take longer, whatever hangs.
HARD_SECONDS = 900


def run_pairs(server: Server, case: Case, pairs: int) -> list[tuple[Drain, Drain]]:
    """(affinity, plain) of each pair; who goes first alternates."""
    for contestant in ("affinity", "plain"):
        preload(server, contestant, case)
    found = []
    # A sleeping task's ratio varies less, and its runs take longer.
    for number in range(max(3, pairs - 2) if case.task_seconds else pairs):
        order = ("affinity", "plain") if number % 2 == 0 else ("plain", "affinity")
        runs = {contestant: drain(server, contestant, case) for contestant in order}
        pair = runs["affinity"], runs["plain"]
        found.append(pair)
        print(
            f"{case.name:6} {case.nodes}  pair {number + 1}: affinity {pair[0].rate:7.0f}/s  "
            f"plain {pair[1].rate:7.0f}/s  ratio {pair[0].rate / pair[1].rate:.2f}",
            flush=True,
        )
    return found


def run_latencies(server: Server, rounds: int, samples: int) -> dict[str, list[list[float]]]:
    """Rounds of samples in ms of each waiter, in turn."""
    found: dict[str, list[list[float]]] = {name: [] for name in WAITERS}
    for _ in range(rounds):
        for name, (contestant, beat) in WAITERS.items():
            found[name].append(latency(server, contestant, beat, samples))
    return found


def measure(pairs: int, quick: bool) -> Results:
    """Run everything on one embedded server."""
    began = time.monotonic()
    with start_server() as server:
        with server.client() as client:
            version = str(
                client.info("server").get("valkey_version")
                or client.info("server")["redis_version"]
            )
        latencies = run_latencies(server, 1 if quick else 3, 60 if quick else 200)
        drains = {
            case: run_pairs(server, case, pairs) for case in (QUICK_CASES if quick else CASES)
        }
    return Results(
        drains,
        latencies,
        machine(f"{server.binary.name} {version}"),
        datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        pairs,
        time.monotonic() - began,
    )


def save_raw(results: Results) -> None:
    """All runs as JSON into benchmarks/raw/."""
    raw: dict[str, Any] = {
        "when": results.when,
        "machine": results.machine,
        "latencies_ms": results.latencies,
        "drains": [
            {
                "case": f"{case.name} {case.nodes}",
                "tasks": case.tasks,
                "pairs": [
                    {"affinity": as_json(ours), "plain": as_json(theirs)} for ours, theirs in found
                ],
            }
            for case, found in results.drains.items()
        ],
    }
    folder = ROOT / "benchmarks" / "raw"
    folder.mkdir(exist_ok=True)
    path = folder / (results.when.replace(" ", "_").replace(":", "") + ".json")
    path.write_text(json.dumps(raw, indent=1))
    print(f"raw figures: {path.relative_to(ROOT)}")


def _give_up(*_: object) -> None:
    raise TimeoutError(f"the benchmark took longer than {HARD_SECONDS} s")


def main() -> None:
    """Entry point."""
    quick = os.environ.get("QUICK", "") not in ("", "0")
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__)
    default = int(os.environ.get("PAIRS") or (3 if quick else 5))
    parser.add_argument("--pairs", type=int, default=default)
    pairs = parser.parse_args().pairs
    if pairs < 3:
        parser.error("a ratio needs at least 3 pairs")
    signal.signal(signal.SIGALRM, _give_up)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    signal.alarm(HARD_SECONDS)
    results = measure(pairs, quick)
    signal.alarm(0)
    path = ROOT / "docs" / "performance.md"
    text = markdown(results, path.read_text() if path.exists() else "")
    print("\n" + text)
    save_raw(results)
    if not quick:
        path.write_text(text)


if __name__ == "__main__":
    main()
