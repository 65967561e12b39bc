"""Stops of every kind, on every pool: nothing is lost or run twice without need, order is kept."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import acceptance.apps.stopping  # noqa: F401  (the test's producer knows its tasks)
from acceptance.support import LEAN, WORKER_ONLY, Producer, runs, wait_for_nodes, wait_for_run
from celery_affinity.embedded import Server, start_server
from chaos.nursery import ForkedCluster
from harness import Cluster, BROKER_VARIABLE, Node, wait_until
from history import HISTORY_VARIABLE, History, Run

pytestmark = pytest.mark.acceptance

APP = "acceptance.apps.stopping"
POOLS: list[str] = ["prefork", "threads", "solo", "gevent"]
#: How long a stop may take beyond what the task takes that runs.
STOP_SECONDS = 6.0
LONG_MS = 1500
SOFT_SECONDS = 0.5
TAGS, EACH, MS = 6, 6, 60


class Site:
    """Two workers of one pool and a beat, with default times: nothing may depend on a rescue."""

    def __init__(self, pool: str, server: Server, directory: Path, history_path: Path) -> None:
        self.pool, self.history_path = pool, history_path
        kind = ForkedCluster if pool != "gevent" else Cluster
        self.cluster = kind(server.url(), directory, history_path)
        self.concurrency = 1 if pool == "solo" else 2
        self.cluster.beat(APP)
        self.workers = {name: self.worker(name) for name in ("w1@test", "w2@test")}
        self.producer = Producer(server.url())

    def worker(self, name: str, **environ: str) -> Node:
        """Start one."""
        return self.cluster.worker(
            APP, name, queues="jobs", concurrency=self.concurrency, pool=self.pool,
            environ={**WORKER_ONLY, **environ}, extra=LEAN,
        )

    def whole(self) -> None:
        """Wait until both work, and nothing else."""
        for node in self.workers.values():
            if not node.alive:
                node.start()
        for node in self.workers.values():
            node.wait_ready()
        wait_for_nodes(self.producer.affinity, 2)

    def history(self, prefix: str) -> History:
        """What became of the tags that begin like that."""
        found = History.load(self.history_path)
        return History(
            [run for run in found.runs if run.tag.startswith(prefix)],
            {task: at for task, at in found.submits.items() if task[0].startswith(prefix)},
        )


@pytest.fixture(scope="module", params=POOLS)
def site(
    request: pytest.FixtureRequest, server_binary: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Site]:
    directory = tmp_path_factory.mktemp(request.param)
    history_path = directory / "history.jsonl"
    with pytest.MonkeyPatch.context() as patch, start_server() as server:
        patch.setenv(HISTORY_VARIABLE, str(history_path))
        patch.setenv(BROKER_VARIABLE, server.url())
        made = Site(request.param, server, directory, history_path)
        try:
            yield made
        finally:
            made.cluster.destroy()


def warm(node: Node) -> None:
    node.term()


def cold(node: Node) -> None:
    node.quit()


def twice(node: Node) -> None:
    node.term()
    time.sleep(0.2)
    node.term()


def soft(node: Node) -> None:
    node.quit()


def warm_then_cold(node: Node) -> None:
    node.term()
    time.sleep(0.2)
    node.quit()


@pytest.mark.parametrize("stop", [twice, cold, soft, warm_then_cold], ids=lambda stop: stop.__name__)
def test_a_stop(site: Site, stop) -> None:
    name = f"{stop.__name__}-"
    site.whole()
    producer = site.producer
    seconds = 0.5 if stop is soft else 0
    answers = producer.app.control.broadcast("soften", {"seconds": seconds}, reply=True, limit=2, timeout=5)
    assert len(answers) == 2
    producer.send(f"{name}long", ms=LONG_MS, task="long_at_first")
    producer.send(f"{name}long", 3, ms=20)
    long = wait_for_run(site.history_path, lambda run: run.tag == f"{name}long")
    stopped = site.workers[long.worker]
    tags = [f"{name}{number}" for number in range(TAGS)]
    producer.send_each(tags, EACH, ms=MS)
    wait_until(lambda: len([r for r in runs(site.history_path) if r.tag in tags]) >= 8)

    begin = time.monotonic()
    stop(stopped)

    def drains() -> bool:
        return all(w.draining or w.name != stopped.name for w in producer.affinity.workers())

    wait_until(drains)
    seen = time.monotonic()
    try:
        status = stopped.wait(30)
    except AssertionError as e:
        status = e
        stopped.destroy()
    took = time.monotonic() - begin
    try:
        wait_until(lambda: not [v for v in site.history(name).violations(allow_rerun=True) if v.kind == "loss"], 20)
    except AssertionError as e:
        print("LOSS", e)
    done = time.monotonic() - begin
    h = site.history(name)
    late = [r for r in h.runs if r.worker == stopped.name and r.start / 1e9 > seen]
    longs = [(r.seq, r.attempt, r.worker, r.outcome, round((r.start / 1e9 - begin), 2), r.end and round(r.end / 1e9 - begin, 2)) for r in h.runs if r.tag == f"{name}long"]
    print(f"RESULT {site.pool} {stop.__name__}: status {status}, took {took:.2f}, done after {done:.2f}, drain seen {seen-begin:.2f}, reruns {h.reruns()}, late {len(late)}, last start late {[r.start/1e9-seen for r in late]}")
    print("   longs", longs)
    print("   violations", [str(v) for v in h.violations(allow_rerun=True)])
    s = producer.affinity.stats("jobs")
    print("   ", s.entries, s.requeued, s.rescued if hasattr(s, "rescued") else "", producer.affinity.dead_letters("jobs", 10))
    print("   ", [l for l in stopped.log_text().splitlines() if "ERROR" in l or "CRIT" in l or "Draining" in l or "Left" in l or "WARN" in l])
