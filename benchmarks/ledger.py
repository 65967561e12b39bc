"""`python -m benchmarks.ledger`: how many tasks a second the ledger alone lets through.

A real leader's intake and scripted workers that pipeline their calls, on one server, without
Celery: admit, dispatch, start, settle.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any

from benchmarks.pages import Options, Section, main, table
from benchmarks.pipelined import Pipeline, Recorder
from benchmarks.processes import ROOT
from benchmarks.scripted import QUEUE, STAMP, Counts, ScriptedLedger
from celery_affinity.embedded import Server, die_with_parent

TAGS = 1_000
SLOTS = 100
#: Scripted workers, from too few to fill the server to more than enough.
WORKERS = (1, 2)
#: One run is given up after so long.
RUN_SECONDS = 60.0

Found = dict[str, float]


@contextmanager
def _workers(server: Server, count: int) -> Iterator[list[subprocess.Popen[bytes]]]:
    command = [sys.executable, "-m", "benchmarks.pipelined", str(server.port)]
    started = [
        subprocess.Popen(
            [*command, f"node-{number}", str(SLOTS)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            preexec_fn=die_with_parent(),
        )
        for number in range(count)
    ]
    try:
        yield started
    finally:
        for process in started:
            process.kill()
            process.communicate()


def drain(server: Server, tasks: int, workers: int) -> Found:
    """All tasks wait in the pending queue when the leader begins; until the last is settled."""
    with server.client() as client:
        client.flushall()
        ledger = ScriptedLedger(client)
        ledger.lead()
        ledger.publish(tasks, TAGS)
        with _workers(server, workers) as processes:
            deadline = time.monotonic() + RUN_SECONDS
            _wait(lambda: client.zcard(ledger.scripts.keys.workers) == workers, deadline, processes)
            before, began = Counts.look(client), time.monotonic()
            ledger.admit()
            _wait(lambda: _settled(ledger) == tasks, deadline, processes)
            seconds = time.monotonic() - began
            spent = Counts.look(client).since(before)
    return {
        "rate": tasks / seconds,
        "redis_us": spent.cpu_us / tasks,
        "script_us": spent.usec["evalsha"] / tasks,
        "commands": spent.inside / tasks,
        "scripts": spent.commands["evalsha"] / tasks,
    }


def steps(server: Server, tasks: int) -> Found:
    """Redis CPU of each script, pipelined, one kind after the other; one message of a lease out."""
    with server.client() as client:
        client.flushall()
        ledger = ScriptedLedger(client)
        ledger.lead()
        ledger.publish(tasks, TAGS)
        pipeline = Pipeline(server.port)
        scripts: Any = Recorder(pipeline, ledger.scripts.keys)
        found = dict.fromkeys(("admit", "start", "settle"), 0.0)

        def spend(name: str, step: Callable[[], Any]) -> None:
            before = Counts.look(client)
            step()
            found[name] += Counts.look(client).since(before).cpu_us / tasks

        spend("admit", ledger.admit)
        # As many slots as tags: each round is long enough for the looking to cost next to nothing.
        ledger.node("node", slots=TAGS, depth=1)
        for _ in range(TAGS // 100):  # that many leases are opened by one script at most
            ledger.pass_when_idle()
        done = 0
        while messages := ledger.take("node"):
            marks = []
            for raw in messages:
                match = STAMP.search(raw)
                assert match is not None
                marks.append(match.groups())
            for entry, epoch, send, incarnation, slot in marks:
                scripts.start(incarnation, slot, entry, epoch, send, b"token" + entry, 1000)
            spend("start", scripts.flush)
            for entry, epoch, _, incarnation, slot in marks:
                scripts.settle(incarnation, slot, entry, epoch, b"token" + entry, "done")
            spend("settle", scripts.flush)
            done += len(marks)
        if done != tasks or _settled(ledger) != tasks:
            raise RuntimeError(f"{done} of {tasks} tasks ran, {_settled(ledger)} settled")
        return found


def measure(server: Server, options: Options) -> Section:
    """Rounds of all worker counts in turn."""
    tasks = 4_000 if options.quick else 40_000
    drains: dict[int, list[Found]] = {count: [] for count in WORKERS}
    parts: list[Found] = []
    for _ in range(options.pairs):
        for count in WORKERS:
            found = drain(server, tasks, count)
            drains[count].append(found)
            print(f"{count} workers: {found['rate']:,.0f} tasks/s", flush=True)
        parts.append(steps(server, tasks // 2))
    raw = {"drains": {str(count): found for count, found in drains.items()}, "steps": parts}
    return Section("The ledger alone", _text(drains, parts, tasks), raw)


def _text(drains: dict[int, list[Found]], parts: list[Found], tasks: int) -> str:
    def middle(of: list[Found], name: str) -> float:
        return median(one[name] for one in of)

    rates = table(
        (
            "workers",
            "tasks/s",
            "least - most",
            "Redis CPU, us a task",
            "of that in scripts",
            "scripts a task",
            "commands a task",
        ),
        [
            (
                f"{count} x {SLOTS} slots",
                f"**{middle(found, 'rate'):,.0f}**",
                " - ".join(f"{of(one['rate'] for one in found):,.0f}" for of in (min, max)),
                f"{middle(found, 'redis_us'):.0f}",
                f"{middle(found, 'script_us'):.0f}",
                f"{middle(found, 'scripts'):.2f}",
                f"{middle(found, 'commands'):.1f}",
            )
            for count, found in drains.items()
        ],
    )
    scripts = table(
        ("script", "Redis CPU, us a task"),
        [(name, f"{middle(parts, name):.1f}") for name in parts[0]],
    )
    return (
        f"{tasks:,} tasks of {TAGS:,} tags wait in the pending queue; a real leader's intake and "
        "scripted workers, which start and settle all they were sent in one round trip, let them "
        f"through. Medians of {len(parts)} runs each, in turn.\n\n{rates}\n\n"
        "Redis CPU of each script, pipelined, without the taking of messages (a message of each "
        f"lease is out; leases go on until their tag is done):\n\n{scripts}"
    )


def _settled(ledger: ScriptedLedger) -> int:
    return int(ledger.client.hget(ledger.scripts.keys.queue(QUEUE, "c"), "settled") or 0)


def _wait(
    there: Callable[[], bool], deadline: float, processes: list[subprocess.Popen[bytes]]
) -> None:
    while not there():
        if any(process.poll() is not None for process in processes):
            raise RuntimeError("a scripted worker has ended")
        if time.monotonic() > deadline:
            raise TimeoutError(f"not done in {RUN_SECONDS:g} s")
        time.sleep(0.005)


if __name__ == "__main__":
    main("ledger", measure, 300, __doc__)
