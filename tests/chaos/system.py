"""The system under chaos: a server, workers behind a proxy each, beats, and who of them leads.

The broker is that server, or a RabbitMQ beside it; the proxies stand before the ledger in both cases.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from redis.exceptions import RedisError

from acceptance.support import LEAN, WORKER_ONLY, Producer
from brokers import LEDGER_VARIABLE, Broker
from celery_affinity.embedded import Server
from chaos.proxy import Proxy
from harness import BROKER_VARIABLE, Cluster, Node, wait_until
from rabbit import RabbitServer

APP = "chaos.apps.affinity"
HEARTBEAT_INTERVAL_SECONDS, HEARTBEAT_TIMEOUT_SECONDS, LEADER_TTL_SECONDS = 0.75, 3.0, 2.0
TIMES = {
    "AFFINITY_HEARTBEAT_INTERVAL": str(HEARTBEAT_INTERVAL_SECONDS),
    "AFFINITY_HEARTBEAT_TIMEOUT": str(HEARTBEAT_TIMEOUT_SECONDS),
    "AFFINITY_LEADER_TTL": str(LEADER_TTL_SECONDS),
}
WORKERS, CONCURRENCY = 3, 2
SLOTS = WORKERS * CONCURRENCY
#: A script is "busy" for others from here on (ms); Redis' own default is 5 s.
BUSY_AFTER_MS = 200


class System:
    """Three workers of two slots, the first of which may lead as well, and two beats."""

    def __init__(
        self, server: Server, directory: Path, history_path: Path, broker: Broker,
        rabbit: RabbitServer | None = None,
    ) -> None:
        self.server = server
        self.broker = broker
        self.rabbit = rabbit
        self.cluster = Cluster(broker.url, directory, history_path)
        ledger = BROKER_VARIABLE if rabbit is None else LEDGER_VARIABLE
        self.proxies = [Proxy(server.port) for _ in range(WORKERS)]
        self.workers = [
            self.cluster.worker(
                APP, f"w{number}", queues="jobs", concurrency=CONCURRENCY, extra=LEAN,
                environ={**TIMES, ledger: proxy.url(), **(WORKER_ONLY if number > 1 else {})},
            )
            for number, proxy in enumerate(self.proxies, 1)
        ]
        self.beats = [self.cluster.beat(APP, f"beat-{n}", environ=TIMES) for n in (1, 2)]
        self.producer = Producer(broker.url)
        if rabbit is not None:  # or it may lose a message after its publish has returned
            self.producer.app.conf.broker_transport_options = {"confirm_publish": True}
        self.producer.app.conf.task_publish_retry_policy = {"max_retries": 30, "interval_max": 0.5}
        self.client: Any = server.client()
        self.client.config_set("busy-reply-threshold", BUSY_AFTER_MS)

    @property
    def nodes(self) -> list[Node]:
        """All of them."""
        return [*self.workers, *self.beats]

    def proxy_of(self, node: Node) -> Proxy:
        """The proxy between a worker and Redis."""
        return self.proxies[self.workers.index(node)]

    def leading(self) -> Node | None:
        """Which node leads now, as far as Redis tells."""
        with contextlib.suppress(RedisError):
            if found := self.producer.affinity.leader("jobs"):
                pid = found.leader.split("/")[1]
                return next((node for node in self.nodes if str(node.pid) == pid), None)
        return None

    def wait_until_whole(
        self, timeout: float = 60.0, revive: Callable[[], object] = lambda: None
    ) -> None:
        """Wait until every node works and is registered.

        Arguments:
            revive: Starts nodes that have ended; called again and again, as a start may fail, too.
        """

        def not_ready() -> list[Node]:
            revive()
            return [node for node in self.nodes if not node.is_ready]

        wait_until(lambda: not not_ready(), timeout, "all nodes to work")
        pids: Callable[[], bool] = lambda: (  # noqa: E731
            sorted(worker.name for worker in self.producer.affinity.workers())
            == sorted(worker.name for worker in self.workers)
        )
        wait_until(pids, timeout, "exactly the living workers in the ledger")
        wait_until(self.leading, timeout, "a leader")

    def close(self) -> None:
        """End all."""
        self.cluster.destroy()
        for proxy in self.proxies:
            proxy.close()


def now() -> float:
    """CLOCK_MONOTONIC, as in histories."""
    return time.monotonic()
