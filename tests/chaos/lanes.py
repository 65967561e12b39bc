"""Experiments in rounds, on several servers at once: one process, server and history each lane."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import shutil
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from acceptance.support import Producer
from celery_affinity.embedded import Server, start_server
from harness import BROKER_VARIABLE, Cluster
from history import HISTORY_VARIABLE

#: Every time of the library that an experiment waits for, as short as they go here.
SECOND = {
    "AFFINITY_HEARTBEAT_INTERVAL": "0.3",
    "AFFINITY_HEARTBEAT_TIMEOUT": "1",
    "AFFINITY_LEADER_TTL": "1",
}
AFFINITY, PLAIN = "chaos.apps.affinity", "chaos.apps.plain"
Found = dict[str, Any]


@dataclass
class Lane:
    """What the rounds of one lane share."""

    number: int
    server: Server
    cluster: Cluster
    producer: Producer
    history_path: Path
    random: random.Random


#: Does its rounds, yields what it found in each.
Experiment = Callable[[Lane, int], Iterator[Found]]


@contextlib.contextmanager
def lane(number: int, seed: object, *, aof: bool = False) -> Iterator[Lane]:
    """A server, a cluster and a producer of this process' own."""
    directory = Path(tempfile.mkdtemp(prefix="chaos-"))
    history_path = directory / "history.jsonl"
    with start_server(aof=aof) as server:
        os.environ.update({HISTORY_VARIABLE: str(history_path), BROKER_VARIABLE: server.url()})
        cluster = Cluster(server.url(), directory, history_path)
        try:
            yield Lane(
                number, server, cluster, Producer(server.url()), history_path,
                random.Random(f"{seed}/{number}"),
            )
        except BaseException:
            print(f"kept for a look: {directory}", flush=True)
            cluster.destroy()
            raise
        else:
            cluster.destroy()
            shutil.rmtree(directory, ignore_errors=True)


def run_lanes(
    experiment: Experiment, rounds: int, lanes: int, seed: object, name: str
) -> list[Found]:
    """All rounds, shared between the lanes; a lane that fails takes its rounds with it."""
    context = multiprocessing.get_context("fork")
    results: Any = context.Queue()
    shares = [rounds // lanes + (number < rounds % lanes) for number in range(lanes)]
    processes = [
        context.Process(target=_lane_main, args=(experiment, number, share, seed, results))
        for number, share in enumerate(shares) if share
    ]
    for process in processes:
        process.start()
    found: list[Found] = []
    open_lanes = len(processes)
    started = time.monotonic()
    while open_lanes:
        item = results.get()
        if item is None:
            open_lanes -= 1
            continue
        found.append(item)
        if len(found) % 20 == 0:
            print(f"{name}: {len(found)} of {rounds}, {time.monotonic() - started:.0f} s", flush=True)
    for process in processes:
        process.join()
    return found


def _lane_main(experiment: Experiment, number: int, rounds: int, seed: object, results: Any) -> None:
    try:
        with lane(number, seed) as here:
            for found in experiment(here, rounds):
                results.put(found)
    except BaseException:
        traceback.print_exc()
        results.put({"broken": traceback.format_exc()})
    finally:
        results.put(None)
