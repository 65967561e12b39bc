"""Laws of cost: what a task costs Redis does not depend on how much waits beside it.

Commands inside of scripts are counted by the server (INFO commandstats). A command that reads a
whole collection is one command however large that is, so its time is looked at too, by a percentile
that a busy machine does not move. Larger ledgers, up to a million tasks: python -m benchmarks.growth.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
from redis.exceptions import ResponseError

from benchmarks.scripted import QUEUE, Counts, ScriptedLedger
from celery_affinity.embedded import Server
from celery_affinity.settings import AffinityQueue

SAMPLE = 200


@dataclass(frozen=True)
class Size:
    waiting: int
    tags: int
    workers: int


#: The largest that ten seconds are enough for. In the one pair every task is a lease of its own; in
#: the other each tag has more tasks than a batch takes.
LEASES_OF_ONE = Size(1_000, 1_000, 2), Size(100_000, 100_000, 1_000)
LEASES_OF_FIVE = Size(1_000, 10, 2), Size(30_000, 5_000, 1_000)


@dataclass
class Cost:
    commands: dict[str, int]
    calls: int
    #: Microseconds that nine of ten calls of a command stay below.
    p90: dict[str, float]

    @property
    def inside(self) -> int:
        return sum(n for name, n in self.commands.items() if name != "evalsha")


@pytest.fixture(autouse=True)
def scripts_are_loaded(server: Server) -> None:
    """What a server does once for each script is not what a task costs."""
    ledger = ledger_of(server, Size(1_000, 100, 2), "loaded")
    run(ledger)
    ledger.beat("node-0")
    ledger.pass_when_idle()


def ledger_of(server: Server, size: Size, namespace: str = "") -> ScriptedLedger:
    queue = AffinityQueue(name=QUEUE, max_batch_size=5)
    ledger = ScriptedLedger(server.client(), queue, namespace or str(size))
    ledger.lead()
    ledger.fill(size.waiting, size.tags)
    # Whether there are long backlogs (16 tasks and more) is noted once.
    ledger.client.hset(ledger.scripts.keys.queue(QUEUE, "conf"), "marks", "1")
    for number in range(size.workers):
        ledger.node(f"node-{number}")
    return ledger


def cost_of(ledger: ScriptedLedger, step: Callable[[], Any]) -> Cost:
    client = ledger.client
    with contextlib.suppress(ResponseError):  # before Redis 7.0 counts alone are looked at
        client.config_set("latency-tracking-info-percentiles", "90")
    client.config_resetstat()
    before = ledger.calls
    step()
    counts = Counts.look(client)
    stats = client.info("latencystats")
    p90 = {
        name.removeprefix("latency_percentiles_usec_"): float(found["p90"])
        for name, found in stats.items()
    }
    return Cost(counts.commands, ledger.calls - before, p90)


def run(ledger: ScriptedLedger) -> None:
    assert ledger.run("node-0", SAMPLE // 2) == ledger.run("node-1", SAMPLE // 2) == SAMPLE // 2


def assert_same(small: Cost, large: Cost, what: str) -> None:
    assert large.commands.keys() == small.commands.keys(), what
    for name, found in large.commands.items():
        # Which entries are timed depends on their numbers; a warm lease is counted where it is one.
        slack = SAMPLE // 4 if name in ("hincrby", "hget", "hset", "hdel") else 0
        assert abs(found - small.commands[name]) <= slack, (what, name, found, small.commands[name])
    assert large.calls == small.calls, what
    # One call may be the one in which Redis makes room; and caches are smaller than ledgers.
    slow = {
        name: (small.p90[name], found)
        for name, found in large.p90.items()
        if small.commands.get(name, 0) >= 10 and found > 3 * small.p90[name] + 100
    }
    assert not slow, f"{what}: microseconds in the small and in the large ledger"


@pytest.mark.parametrize("sizes", [LEASES_OF_ONE, LEASES_OF_FIVE], ids=["leases of 1", "leases of 5"])
def test_a_task_costs_the_same_however_much_waits(server: Server, sizes: tuple[Size, Size]) -> None:
    found = []
    for size in sizes:
        ledger = ledger_of(server, size)
        ran = cost_of(ledger, lambda ledger=ledger: run(ledger))
        ledger.publish(SAMPLE, 10, name="new", first=size.waiting)
        admitted = cost_of(ledger, ledger.admit)
        beat = cost_of(ledger, lambda ledger=ledger: ledger.beat("node-0"))
        idle = cost_of(ledger, ledger.pass_when_idle)
        found.append({"run": ran, "admit": admitted, "heartbeat": beat, "idle pass": idle})
    small, large = found
    for what in small:
        assert_same(small[what], large[what], what)
    # Taking the message, start, settle: a worker waits for Redis three times a task, and the
    # leader for two scripts of 200 messages and one that finds no more.
    print({what: (cost.inside / SAMPLE, cost.calls / SAMPLE) for what, cost in large.items()})
    assert large["run"].calls <= 3 * SAMPLE
    assert large["run"].inside <= (25 if sizes is LEASES_OF_FIVE else 46) * SAMPLE
    assert large["admit"].inside <= 4 * SAMPLE


def test_a_task_for_an_idle_worker_costs_the_same_however_many_are_idle(server: Server) -> None:
    found = []
    for workers in (2, 1_000):
        ledger = ledger_of(server, Size(0, 1, workers))
        ledger.publish(1, 1)
        admitted = cost_of(ledger, ledger.admit)
        (node,) = [n for n in ("node-0", "node-1") if ledger.client.exists(ledger.list_of(n))]
        ran = cost_of(ledger, lambda ledger=ledger, node=node: ledger.run(node, 1))
        found.append((admitted, ran))
    for small, large in zip(*found, strict=True):
        assert large.commands == small.commands


@pytest.mark.parametrize("tags", [3_000, 30_000])
def test_a_waiting_task_takes_its_message_and_at_most_450_bytes(server: Server, tags: int) -> None:
    ledger = ScriptedLedger(server.client(), namespace="measured")
    ledger.lead()
    before = ledger.memory()
    ledger.fill(30_000, tags)
    beside = (ledger.memory() - before) / 30_000 - len(ledger.message)
    print(f"{beside:.0f} bytes beside the message of {len(ledger.message)}")
    assert 0 < beside <= 450


def test_an_idle_tag_takes_no_byte(server: Server) -> None:
    """But for the slot that had it last: that is remembered of `warm_tags` tags, here of none."""
    ledger = ScriptedLedger(server.client(), AffinityQueue(name=QUEUE, warm_tags=0), "measured")
    ledger.lead()
    ledger.node("node", slots=4)

    def after(tags: int, first: int) -> dict[bytes, int]:
        ledger.publish(tags, tags, first=first, name=f"of-{first}")
        ledger.admit()
        while ledger.run("node", 1000):
            pass
        # A slot keeps its last token, whose number gets longer.
        client = ledger.client
        # The counters are of a fixed number: the bounds of waits come as they are first met.
        assert client.hlen(next(key for key in client.keys("*:c"))) <= 40
        return {
            key: 0 if b":s:" in key or key.endswith(b":c") else client.memory_usage(key, samples=0)
            for key in client.keys("*")
        }

    few, many = after(10, 1_000), after(2_000, 10_000)
    assert many.keys() == few.keys()
    # A stamp that gets longer may need the allocator's next size: not a byte for each of 2,000 tags.
    assert {key: size for key, size in many.items() if abs(size - few[key]) > 64} == {}
