"""`python -m chaos.failover`: how long after a kill does the work go on?

leader  the scheduling beat is killed and four tags get a task each at once; until the last of
        the four has started. At most leader_ttl + 1 s.
worker  one of two busy workers is killed; until the last of the tasks that it was running has
        started elsewhere. At most heartbeat_timeout + 1 s.
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

from acceptance.support import LEAN, WORKER_ONLY, leading, wait_for_nodes
from chaos.lanes import AFFINITY, Found, Lane, run_lanes
from chaos.tail import Tail, Task
from harness import wait_until
from history import History


def environ(leader_ttl: float, heartbeat_timeout: float) -> dict[str, str]:
    """The times that are measured."""
    return {
        "AFFINITY_LEADER_TTL": str(leader_ttl), "AFFINITY_HEARTBEAT_TIMEOUT": str(heartbeat_timeout),
        "AFFINITY_HEARTBEAT_INTERVAL": str(heartbeat_timeout / 4),
    }


def leader(leader_ttl: float, heartbeat_timeout: float, here: Lane, rounds: int) -> Iterator[Found]:
    times = environ(leader_ttl, heartbeat_timeout)
    here.cluster.worker(
        AFFINITY, queues="jobs", concurrency=2, environ={**times, **WORKER_ONLY}, extra=LEAN
    )
    beats = [here.cluster.beat(AFFINITY, name, environ=times) for name in ("beat-1", "beat-2")]
    wait_for_nodes(here.producer.affinity, 1)
    tail = Tail(here.history_path)
    for number in range(rounds):
        for beat in beats:
            beat.wait_ready()
        victim = leading(here.producer.affinity, beats)
        # Any moment between two renewals; not for synchronisation.
        time.sleep(here.random.uniform(0, leader_ttl / 2))
        killed = time.monotonic()
        victim.kill9()
        tags = [f"round-{number}-{k}" for k in range(4)]
        here.producer.send_each(tags)
        tasks = [(tag, 0) for tag in tags]
        left = tail.wait_done(tasks, 30)
        firsts = _first_starts(tail, tasks, killed, "")
        yield {"seconds": max(firsts.values(), default=30.0), "left": len(left)}
        victim.start()
        wait_until(lambda: leading(here.producer.affinity, beats) is not victim, 30)  # noqa: B023
    History.load(here.history_path).assert_lawful(allow_rerun=True)


def worker(leader_ttl: float, heartbeat_timeout: float, here: Lane, rounds: int) -> Iterator[Found]:
    times = environ(leader_ttl, heartbeat_timeout)
    here.cluster.beat(AFFINITY, environ=times)
    workers = [
        here.cluster.worker(
            AFFINITY, name, queues="jobs", concurrency=2, environ={**times, **WORKER_ONLY}, extra=LEAN
        )
        for name in ("w1", "w2")
    ]
    tail = Tail(here.history_path)
    done = number = 0
    while done < rounds:
        number += 1
        wait_for_nodes(here.producer.affinity, 2)
        tags = [f"round-{number}-{k}" for k in range(6)]
        tasks = [(tag, seq) for tag in tags for seq in range(6)]
        before = len(tail.read().starts)
        here.producer.send_each(tags, 6, ms=40)
        started = here.random.randint(4, 20)
        wait_until(lambda: len(tail.read().starts) >= before + started, 30)  # noqa: B023
        victim = here.random.choice(workers)
        pids = victim.children()
        killed = time.monotonic()
        victim.kill9()
        tail.read()
        caught = [tail.running.pop(pid) for pid in pids if pid in tail.running]
        left = tail.wait_done(tasks, 30)
        firsts = _first_starts(tail, caught, killed, victim.name)
        if caught:
            done += 1
            yield {"seconds": max(firsts.values(), default=30.0), "left": len(left)}
        victim.start()
    History.load(here.history_path).assert_lawful(allow_rerun=True)


def _first_starts(tail: Tail, tasks: list[Task], after: float, but: str) -> dict[Task, float]:
    firsts: dict[Task, float] = {}
    for task, at, name, *_ in tail.starts:
        if task in tasks and at > after and name != but:
            firsts.setdefault(task, at - after)
    return firsts


def summary(name: str, found: list[Found], limit: float) -> dict[str, Any]:
    """What all rounds came to."""
    rounds = [item for item in found if "broken" not in item]
    seconds = sorted(item["seconds"] for item in rounds) or [30.0]
    return {
        "experiment": name, "kills": len(rounds), "broken lanes": len(found) - len(rounds),
        "limit s": limit, "median s": round(statistics.median(seconds), 2),
        "p95 s": round(seconds[int(len(seconds) * 0.95)], 2), "max s": round(seconds[-1], 2),
        "above the limit": [round(value, 2) for value in seconds if value > limit],
        "not done after 30 s": sum(item["left"] for item in rounds),
    }


def main() -> int:
    """Run both, or the one that is named."""
    parser = argparse.ArgumentParser(prog="python -m chaos.failover", description=__doc__)
    parser.add_argument("experiments", nargs="*", help="leader, worker; default: both")
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--lanes", type=int, default=2, help="servers at once")
    parser.add_argument("--leader-ttl", type=float, default=1.5)
    parser.add_argument("--heartbeat-timeout", type=float, default=2.0)
    parser.add_argument("--seed", default="1")
    given = parser.parse_args()
    times = given.leader_ttl, given.heartbeat_timeout
    bad = False
    for name in given.experiments or ["leader", "worker"]:
        experiment, limit = {
            "leader": (partial(leader, *times), given.leader_ttl + 1),
            "worker": (partial(worker, *times), given.heartbeat_timeout + 1),
        }[name]
        found = run_lanes(experiment, given.kills, given.lanes, given.seed, name)
        facts = summary(name, found, limit)
        print(json.dumps(facts), flush=True)
        bad |= bool(facts["above the limit"] or facts["broken lanes"] or facts["not done after 30 s"])
    return int(bad)


if __name__ == "__main__":
    sys.exit(main())
