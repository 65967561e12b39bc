"""What the laws about several queues and several apps share."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from acceptance.apps.domains import make_app
from acceptance.support import LEAN, QUICK
from harness import Cluster, Node
from history import record

APP = "acceptance.apps.domains"


class Domain:
    """One app of a cluster: its producer and its workers."""

    def __init__(self, cluster: Cluster, name: str = "shop") -> None:
        self.name = name
        self.cluster = cluster
        self.app, self.affinity = make_app(name, cluster.broker_url)
        self.invoices, self.reports = f"{name}-invoices", f"{name}-reports"
        self.ordinary = f"{name}-ordinary"
        self._numbers: dict[str, int] = {}

    def worker(
        self, name: str = "w1", *, queues: Sequence[str] | None = None, concurrency: int = 2,
        pool: str = "prefork", extra: Sequence[str] = (), **environ: str,
    ) -> Node:
        """Start a worker of this app; without `queues` it has no -Q."""
        return self.cluster.worker(
            APP, f"{name}@{self.name}", queues=",".join(queues) if queues else None,
            concurrency=concurrency, pool=pool, extra=(*LEAN, *extra),
            environ={**QUICK, "DOMAIN": self.name, **environ},
        )

    def send(
        self, queue: str, tag: str, count: int = 1, ms: float = 0, until: Path | str = ""
    ) -> None:
        """Send the next tasks of a tag to an affinity queue or to the ordinary one."""
        task = f"{self.name}.plain_work" if queue == self.ordinary else f"{queue}.work"
        key = f"{queue}:{tag}"
        with self.app.producer_pool.acquire(block=True) as producer:
            for _ in range(count):
                seq = self._numbers.get(key, 0)
                self._numbers[key] = seq + 1
                record("submit", tag=key, seq=seq)
                self.app.tasks[task].apply_async((tag, seq, ms, str(until)), producer=producer)

    @property
    def sent(self) -> int:
        """Tasks sent so far."""
        return sum(self._numbers.values())

    def ask(self, command: str, node: Node, **arguments: Any) -> dict[str, Any]:
        """A remote-control command's reply from one node, once that is ready."""
        node.wait_ready()
        replies = self.app.control.broadcast(
            command, arguments=arguments, destination=[node.name], reply=True, timeout=10, limit=1
        )
        assert replies, f"{node.name} did not answer {command}"
        reply = replies[0][node.name]
        return reply if isinstance(reply, dict) else {"ok": reply}

    def consumed(self, node: Node) -> list[str]:
        """Names of the queues that a node consumes."""
        return sorted(queue["name"] for queue in self.ask("active_queues", node)["ok"])


def starts(history_path: Path) -> list[dict[str, Any]]:
    """The start events as they were recorded, in order."""
    lines = history_path.read_text().splitlines() if history_path.exists() else []
    events = [json.loads(line) for line in lines]
    return sorted((e for e in events if e["event"] == "start"), key=lambda event: event["t"])
