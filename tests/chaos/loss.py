"""`python -m chaos.loss`: the experiments in which Celery loses messages on Redis, in rounds.

busy       a worker that fetches messages is killed
idle       an idle worker is frozen, one task is sent to it, it is killed
half-open  the connection of an idle worker swallows all bytes, one task is sent to it
visibility the broker's visibility timeout is 5 s and a task takes 25 s: how often does it start?

Kombu takes a message off the list and notes it as unacknowledged in two steps; what dies between
them, or on the way, is in neither. A task counts as lost if it has not ended and, for plain
Celery, is in neither; for this library, if it has not ended after 30 s.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

from celery import Celery
from redis import Redis

from acceptance.support import LEAN, WORKER_ONLY, leading, slots, wait_for_nodes
from chaos.lanes import AFFINITY, PLAIN, SECOND, Experiment, Found, Lane, run_lanes
from chaos.proxy import Proxy
from chaos.tail import Tail, Task
from harness import Node, wait_until
from history import History, record

#: Far above what any rescue takes: a task that has not ended by then is lost.
LOST_SECONDS = 30.0
QUICKLY = {**SECOND, **WORKER_ONLY}


def affinity_busy(here: Lane, rounds: int) -> Iterator[Found]:
    workers = [
        here.cluster.worker(AFFINITY, name, queues="jobs", concurrency=2, environ=SECOND, extra=LEAN)
        for name in ("w1", "w2")
    ]
    wait_for_nodes(here.producer.affinity, 2)
    tail = Tail(here.history_path)
    number = counted = 0
    while counted < rounds:
        number += 1
        tags = [f"round-{number}-{k}" for k in range(8)]
        tasks = [(tag, seq) for tag in tags for seq in range(15)]
        wanted = len(tail.read().starts) + here.random.randint(1, len(tasks) // 2)
        here.producer.send_each(tags, 15, ms=5)
        wait_until(lambda: len(tail.read().starts) >= wanted, 30)  # noqa: B023
        time.sleep(here.random.uniform(0, 0.01))  # not for synchronisation: any moment is right
        victim = here.random.choice(workers)
        children = victim.children()
        killed = time.monotonic()
        victim.kill9()
        unfinished = len(tail.left(tasks))
        running = [tail.running.pop(pid) for pid in children if pid in tail.running]
        for found in _wait(tail, tasks, killed, unfinished=unfinished, running=len(running)):
            if unfinished:  # else the kill came too late to prove anything
                counted += 1
                yield found
        victim.destroy()
        victim.start()
        wait_for_nodes(here.producer.affinity, 2)
    _judge(here)


def affinity_idle(here: Lane, rounds: int) -> Iterator[Found]:
    here.cluster.beat(AFFINITY, environ=SECOND)
    worker = here.cluster.worker(AFFINITY, queues="jobs", environ=QUICKLY, extra=LEAN)
    tail = Tail(here.history_path)
    redis = here.server.client()
    for number in range(rounds):
        worker.wait_ready()
        _await_idle(here, 1)
        worker.stop_process(tree=True)
        here.producer.send(f"round-{number}")
        on_the_wire = _swallowed(here, redis)
        killed = time.monotonic()
        worker.destroy()
        worker.start()
        yield from _wait(tail, [(f"round-{number}", 0)], killed, on_the_wire=on_the_wire)
    _judge(here)


def affinity_half_open(here: Lane, rounds: int) -> Iterator[Found]:
    here.cluster.beat(AFFINITY, environ=SECOND)
    proxy = Proxy(here.server.port)
    victim = here.cluster.worker(
        AFFINITY, queues="jobs", environ={**QUICKLY, "AFFINITY_TEST_BROKER": proxy.url()}, extra=LEAN
    )
    here.cluster.worker(AFFINITY, "w2", queues="jobs", environ=QUICKLY, extra=LEAN)
    tail = Tail(here.history_path)
    redis = here.server.client()
    for number in range(rounds):
        _await_idle(here, 2)
        victim.wait_for_log(f"{victim.name} ready.")
        tag = _warm_tag(here, tail, victim, f"round-{number}")
        proxy.blackhole()
        here.producer.send(tag)
        on_the_wire = _swallowed(here, redis)
        cut = time.monotonic()
        yield from _wait(tail, [(tag, 1)], cut, on_the_wire=on_the_wire)
        proxy.heal()
    _judge(here)


def _warm_tag(here: Lane, tail: Tail, victim: Node, prefix: str) -> str:
    """A tag whose last slot is the victim's, so that its next task goes there."""
    for number in range(20):
        tag = f"{prefix}-{number}"
        here.producer.send(tag)
        assert not tail.wait_done([(tag, 0)], LOST_SECONDS), f"a task of {tag!r} with all well"
        _await_idle(here, 2)
        if next(worker for task, _, worker, *_ in tail.starts if task == (tag, 0)) == victim.name:
            return tag
    raise AssertionError("20 tags in turn ran on the other worker")


def _await_idle(here: Lane, workers: int) -> None:
    def idle() -> bool:
        found = here.producer.affinity.workers()
        return len(found) == workers and all(worker.status == "idle" for worker in found)

    wait_until(idle, 60, f"{workers} idle workers")


def _swallowed(here: Lane, redis: Redis) -> bool:
    """Wait until the one message is dispatched; whether no list has it: it is on the wire."""
    wait_until(lambda: any(slot.current_identify_tag for slot in slots(here.producer.affinity)), 30)
    time.sleep(0.05)  # the server hands it to whoever blocks in the same step; a kernel may be slow
    return not any(redis.type(key) == b"list" for key in redis.keys("*jobs.worker*"))


def _wait(tail: Tail, tasks: list[Task], since: float, **facts: Any) -> Iterator[Found]:
    left = tail.wait_done(tasks, LOST_SECONDS)
    last = max((tail.done[task] for task in tasks if task in tail.done), default=since)
    yield {"sent": len(tasks), "lost": len(left), "seconds": round(last - since, 3), **facts}


def _judge(here: Lane) -> None:
    History.load(here.history_path).assert_lawful(allow_rerun=True)


# The same of plain Celery: to know that the experiments bite.


def plain_busy(here: Lane, rounds: int) -> Iterator[Found]:
    app, redis = Celery(broker=here.server.url(), set_as_current=False), here.server.client()
    for number in range(rounds):
        redis.flushall()
        ids = _send_plain(app, f"round-{number}", 1500, 20)
        worker = here.cluster.worker(PLAIN, f"w{number}", queues="jobs", concurrency=2, extra=LEAN)
        until = here.random.randint(400, 1300)
        wait_until(lambda: redis.llen("jobs") <= until, 40, "a part of the messages fetched")  # noqa: B023
        worker.kill9()
        yield _plain_loss(here, redis, f"round-{number}", ids)
        worker.destroy()


def plain_idle(here: Lane, rounds: int) -> Iterator[Found]:
    app, redis = Celery(broker=here.server.url(), set_as_current=False), here.server.client()
    for number in range(rounds):
        redis.flushall()
        worker = here.cluster.worker(PLAIN, f"w{number}", queues="jobs", extra=LEAN).wait_ready()
        _await_fetch(redis, 1)
        worker.stop_process(tree=True)
        ids = _send_plain(app, f"round-{number}", 1, 0)
        time.sleep(0.2)
        worker.destroy()
        yield _plain_loss(here, redis, f"round-{number}", ids)


def plain_half_open(here: Lane, rounds: int) -> Iterator[Found]:
    app, redis, proxy = Celery(broker=here.server.url(), set_as_current=False), here.server.client(), Proxy(here.server.port)
    for number in range(rounds):
        redis.flushall()
        worker = here.cluster.worker(
            PLAIN, f"w{number}", queues="jobs", extra=LEAN,
            environ={"AFFINITY_TEST_BROKER": proxy.url()},
        ).wait_ready()
        _await_fetch(redis, 1)
        proxy.blackhole()
        ids = _send_plain(app, f"round-{number}", 1, 0)
        time.sleep(0.2)
        proxy.heal()
        worker.wait_for_log("Connection to broker lost", 20)
        time.sleep(5)  # not for synchronisation: the time in which it may find the message again
        yield _plain_loss(here, redis, f"round-{number}", ids)
        worker.destroy()


def _await_fetch(redis: Any, count: int) -> None:
    """Wait until so many clients block for messages."""
    wait_until(lambda: redis.info("clients")["blocked_clients"] >= count, 20, "a blocked consumer")


def _send_plain(app: Celery, tag: str, count: int, ms: float) -> dict[str, int]:
    ids = {}
    with app.producer_pool.acquire(block=True) as producer:
        for seq in range(count):
            record("submit", tag=tag, seq=seq)
            sent = app.send_task("jobs.work", (tag, seq, ms), queue="jobs", producer=producer)
            ids[sent.id] = seq
    return ids


def _plain_loss(here: Lane, redis: Any, tag: str, ids: dict[str, int]) -> Found:
    kept = b"\n".join([*redis.lrange("jobs", 0, -1), *redis.hvals("unacked")]).decode()
    done = {seq for found, seq in Tail(here.history_path).read().done if found == tag}
    lost = [seq for task_id, seq in ids.items() if task_id not in kept and seq not in done]
    return {"sent": len(ids), "lost": len(lost), "seconds": 0.0}


# F3


def visibility(app_name: str, here: Lane, rounds: int) -> Iterator[Found]:
    """Two workers, a task of 25 s, a visibility timeout of 5 s: how often does it start?"""
    environ = {"CHAOS_VISIBILITY": "5", "CHAOS_PREFETCH": "1"}
    tail = Tail(here.history_path)
    for name in ("w1", "w2"):
        here.cluster.worker(app_name, name, queues="jobs", concurrency=4, environ=environ, extra=LEAN)
    here.cluster.wait_ready()
    for number in range(rounds):
        tag = f"round-{number}"
        if app_name == AFFINITY:
            leading(here.producer.affinity, here.cluster.nodes)
            here.producer.send(tag, ms=25_000)
        else:
            _send_plain(Celery(broker=here.server.url(), set_as_current=False), tag, 1, 25_000)
        left = tail.wait_done([(tag, 0)], 90)
        time.sleep(6)  # not for synchronisation: another visibility timeout, for a late copy
        starts = sum(task == (tag, 0) for task, *_ in tail.read().starts)
        yield {"sent": 1, "lost": len(left), "seconds": 25.0, "starts": starts}


EXPERIMENTS: dict[str, Experiment] = {
    "busy": affinity_busy, "idle": affinity_idle, "half-open": affinity_half_open,
    "visibility": partial(visibility, AFFINITY),
    "plain-busy": plain_busy, "plain-idle": plain_idle, "plain-half-open": plain_half_open,
    "plain-visibility": partial(visibility, PLAIN),
}


def summary(name: str, found: list[Found]) -> dict[str, Any]:
    """What all rounds of an experiment came to."""
    rounds = [item for item in found if "broken" not in item]
    seconds = [item["seconds"] for item in rounds] or [0.0]
    facts: dict[str, Any] = {
        "experiment": name, "rounds": len(rounds), "broken lanes": len(found) - len(rounds),
        "rounds with loss": sum(item["lost"] > 0 for item in rounds),
        "lost": sum(item["lost"] for item in rounds), "sent": sum(item["sent"] for item in rounds),
        "median s": round(statistics.median(seconds), 2), "max s": round(max(seconds), 2),
    }
    for fact in ("on_the_wire", "running", "unfinished"):
        if values := [item[fact] for item in rounds if fact in item]:
            facts[fact] = f"{sum(values)} in all, {sum(value > 0 for value in values)} rounds"
    if starts := [item["starts"] for item in rounds if "starts" in item]:
        facts["starts"] = starts
    return facts


def main() -> int:
    """Run the experiments that are named."""
    parser = argparse.ArgumentParser(prog="python -m chaos.loss", description=__doc__)
    parser.add_argument("experiments", nargs="*", help=", ".join(EXPERIMENTS))
    parser.add_argument("--rounds", type=int, default=300)
    parser.add_argument("--lanes", type=int, default=3, help="servers at once")
    parser.add_argument("--seed", default="1")
    given = parser.parse_args()
    bad = False
    for name in given.experiments or ["busy", "idle", "half-open"]:
        found = run_lanes(EXPERIMENTS[name], given.rounds, given.lanes, given.seed, name)
        facts = summary(name, found)
        print(json.dumps(facts), flush=True)
        once = all(count == 1 for count in facts.get("starts", []))
        bad |= not name.startswith("plain") and bool(facts["lost"] or facts["broken lanes"] or not once)
    return int(bad)


if __name__ == "__main__":
    sys.exit(main())
