"""`python -m benchmarks.growth`: what a task costs, in counts, as the ledger grows.

One ledger of each size lies in one server; all are measured in turn, on the real scripts and
without Celery, so that the counts are exact and repeat.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

from benchmarks.pages import Options, Section, main, table
from benchmarks.scripted import QUEUE, Counts, ScriptedLedger
from celery_affinity.embedded import Server
from celery_affinity.settings import AffinityQueue

__all__ = ("Size", "build", "sample")

#: Tasks of one sample. 10^3 waiting tasks have to last for a few.
SAMPLE = 200
#: Tags that a sample admits messages of.
SAMPLE_TAGS = 10
#: Half of the default: with 10^6 tasks of 10^5 tags each tag has 10, and a lease must not end for
#: want of tasks at one size and with its batch at another.
BATCH = 5


@dataclass(frozen=True)
class Size:
    """How large a ledger is."""

    waiting: int
    tags: int
    workers: int

    def __str__(self) -> str:
        return f"{self.waiting:,} / {self.tags:,} / {self.workers:,}"


SIZES = (
    Size(1_000, 10, 2),
    Size(1_000, 1, 2),
    Size(10_000, 1_000, 10),
    Size(100_000, 10_000, 100),
    Size(1_000_000, 100_000, 1_000),
)
QUICK_SIZES = (Size(1_000, 10, 2), Size(1_000, 1, 2), Size(10_000, 1_000, 10))

Sample = dict[str, float]


def build(server: Server, size: Size, namespace: str = "") -> tuple[ScriptedLedger, float]:
    """A ledger of that size; bytes for each waiting task, its message included."""
    ledger = ScriptedLedger(
        server.client(), AffinityQueue(name=QUEUE, max_batch_size=BATCH), namespace or str(size)
    )
    ledger.lead()
    before = ledger.memory()
    ledger.fill(size.waiting, size.tags)
    memory = (ledger.memory() - before) / size.waiting
    for number in range(size.workers):
        ledger.node(f"node-{number}")
    return ledger, memory


def sample(ledger: ScriptedLedger, size: Size) -> Sample:
    """What two workers run, what is admitted, a heartbeat, an idle pass."""
    found: Sample = {}
    run, tasks = _count(ledger, lambda: _run(ledger, size))
    found["commands"] = run.inside / tasks
    found["calls"] = run.calls / tasks
    found["redis_us"] = run.cpu_us / tasks
    found["script_us"] = run.usec["evalsha"] / tasks
    ledger.publish(SAMPLE, SAMPLE_TAGS, first=size.waiting, name="new")
    began = time.process_time()
    admit, tasks = _count(ledger, ledger.admit)
    found["scheduler_us"] = (time.process_time() - began) / tasks * 1e6
    found["admit_commands"] = admit.inside / tasks
    found["admit_calls"] = admit.calls / tasks
    found["admit_us"] = admit.cpu_us / tasks
    found["beat_commands"] = _count(ledger, lambda: ledger.beat("node-0"))[0].inside
    found["pass_commands"] = _count(ledger, ledger.pass_when_idle)[0].inside
    return found


def _run(ledger: ScriptedLedger, size: Size) -> int:
    # A single tag is in one slot only, and that is nobody's choice.
    busy = [n for n in ("node-0", "node-1") if ledger.client.exists(ledger.list_of(n))]
    done = sum(ledger.run(node, SAMPLE // len(busy)) for node in busy)
    if done != SAMPLE:
        raise RuntimeError(f"{done} of {SAMPLE} tasks ran with {size}")
    return done


def _count(ledger: ScriptedLedger, step: Callable[[], Any]) -> tuple[Counts, Any]:
    before, calls = Counts.look(ledger.client), ledger.calls
    answer = step()
    return Counts.look(ledger.client).since(before, ledger.calls - calls), answer


def measure(server: Server, options: Options) -> Section:
    """All sizes in turn."""
    sizes = QUICK_SIZES if options.quick else SIZES
    # Scripts are loaded, and the server's own tables have grown, before memory is compared.
    small = sizes[0]
    warm, _ = build(server, small, "warm-up")
    sample(warm, small)
    ledgers: dict[Size, ScriptedLedger] = {}
    memory: dict[Size, float] = {}
    for size in sizes:
        began = time.monotonic()
        ledgers[size], memory[size] = build(server, size)
        print(f"built {size}: {time.monotonic() - began:.1f} s", flush=True)
    found: dict[Size, list[Sample]] = {size: [] for size in sizes}
    for _ in range(options.pairs):
        for size, ledger in ledgers.items():
            found[size].append(sample(ledger, size))
    raw = [
        {"size": str(size), "bytes_per_waiting_task": round(memory[size], 1), "samples": samples}
        for size, samples in found.items()
    ]
    return Section("Growth", _text(found, memory, len(warm.message)), raw)


def _text(found: dict[Size, list[Sample]], memory: dict[Size, float], message: int) -> str:
    def middle(size: Size, name: str) -> float:
        return median(one[name] for one in found[size])

    first = next(iter(found))
    counts = table(
        (
            "waiting / tags / workers",
            "commands, admit",
            "commands, start to settle",
            "round trips, start to settle",
            "commands of a heartbeat",
            "commands of an idle pass",
        ),
        [
            (
                size,
                f"{middle(size, 'admit_commands'):.2f}",
                f"{middle(size, 'commands'):.2f}",
                f"{middle(size, 'calls'):.2f}",
                f"{middle(size, 'beat_commands'):.0f}",
                f"{middle(size, 'pass_commands'):.0f}",
            )
            for size in found
        ],
    )

    def against(size: Size, *names: str) -> float:
        return median(
            sum(one[name] for name in names) / sum(base[name] for name in names)
            for one, base in zip(found[size], found[first], strict=True)
        )

    costs = table(
        (
            "waiting / tags / workers",
            "Redis CPU, us: admit",
            "start to settle",
            "of that in scripts",
            "against the smallest",
            "scheduler CPU, us",
            "bytes beside the message",
        ),
        [
            (
                size,
                f"{middle(size, 'admit_us'):.0f}",
                f"{middle(size, 'redis_us'):.0f}",
                f"{middle(size, 'script_us'):.0f}",
                f"{against(size, 'admit_us', 'redis_us'):.2f}",
                f"{middle(size, 'scheduler_us'):.0f}",
                f"{memory[size] - message:.0f}",
            )
            for size in found
        ],
    )
    samples = len(found[first])
    return (
        "Of one task, by a scripted leader and scripted workers that call the real scripts one at "
        f"a time; medians of {samples} samples of {SAMPLE} tasks, all sizes in turn. Commands are "
        "those inside of scripts. A round trip is a script or the taking of a message. Batches of "
        f"{BATCH}, so that leases end for the same reason at each size.\n\n{counts}\n\n"
        "Lua tells no count of instructions: the time inside of scripts (commandstats) stands for "
        "it. The scheduler's CPU is that of admission. The message has "
        f"{message} bytes.\n\n{costs}"
    )


if __name__ == "__main__":
    main("growth", measure, 400, __doc__)
