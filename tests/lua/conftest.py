"""A scripted ledger: the real scripts on a real server, with nodes and messages made by hand."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import count
from types import SimpleNamespace
from typing import Any

import pytest
from redis import Redis
from redis.client import Pipeline

from celery_affinity.embedded import Server
from celery_affinity.intake import Intake, no_tag
from celery_affinity.keys import Keys
from celery_affinity.message import STAMP_HEADER, Stamp, envelope
from celery_affinity.scripts import Scripts


@dataclass
class Bench:
    """One affinity queue of one namespace, or its part in one shard."""

    client: Redis
    scripts: Scripts
    fence: str = ""
    state: str = "q"
    tokens: Iterator[int] = field(default_factory=count)

    @property
    def pending(self) -> str:
        return self.scripts.keys.prefix + "pending"

    def lead(
        self,
        batch: int = 10,
        concurrency: int = 1,
        own: dict[str, int] | None = None,
        candidate: str = "leader/1",
        deliveries: int = 3,
        warm: int = 100,
        **limits: int,
    ) -> None:
        term, _ = self.scripts.claim(self.state, candidate, 60_000)
        assert term
        self.fence = f"{candidate} {term}"
        self.configure(batch, concurrency, own, deliveries, warm, **limits)

    def configure(
        self,
        batch: int = 10,
        concurrency: int = 1,
        own: dict[str, int] | None = None,
        deliveries: int = 3,
        warm: int = 100,
        **limits: int,
    ) -> None:
        limits = {
            "max_batch_size": batch, "tag_concurrency": concurrency, "max_deliveries": deliveries,
            "warm_tags": warm, **limits,
        }
        self.scripts.configure(self.state, self.fence, limits, own or {})

    def node(
        self, name: str, slots: int = 1, depth: int = 1, timeout_ms: int = 60_000, title: str = ""
    ) -> Node:
        node = Node(self, name, f"{self.scripts.keys.prefix}wq-{name}")
        self.scripts.register(
            name,
            name=f"{title or name}@test",
            depth=depth,
            slots=slots,
            queues=[(self.state, slots, node.list)],
            junk=[node.list],
            role="worker",
            timeout_ms=timeout_ms,
        )
        return node

    def beside(
        self, other: str, *, slots: tuple[int, int], batch: int, depth: int = 1
    ) -> tuple[str, Node, Node]:
        """A second queue, and a node "n" that serves both with so many slots each.

        Returns:
            The second one's fence, and the node as each queue sees it.
        """
        term, _ = self.scripts.claim(other, "leader/1", 60_000)
        fence = f"leader/1 {term}"
        self.scripts.configure(other, fence, {"max_batch_size": batch}, {})
        own, others = (Node(self, "n", f"{self.pending}-w{q}") for q in (self.state, other))
        self.scripts.register(
            "n", name="n", depth=depth, slots=max(slots), role="worker", timeout_ms=60_000, junk=[],
            queues=[(self.state, slots[0], own.list), (other, slots[1], others.list)],
        )
        return fence, own, others

    def opening(
        self, *ids: object, slots: int = 1, depth: int = 1, timeout_ms: int = 60_000, **limits: int
    ) -> Node:
        """A leader, a node "n" and tasks of the tag "a", the first of which is on its way to it.

        Arguments:
            ids: What tells the tasks apart, in their order.
            slots: As depth and timeout_ms: the node's.
            limits: See `lead`.
        """
        self.lead(**limits)  # type: ignore[arg-type]
        node = self.node("n", slots, depth, timeout_ms)
        self.send("a", *ids)
        self.admit_all()
        return node

    def send(self, tag: object, *ids: object, eta: str | None = None) -> None:
        for one in ids:
            headers = {"id": f"{tag}-{one}", "task": "t", "identify_tag": tag, "eta": eta}
            self.push(
                envelope(
                    [[], {}, {}], headers, {}, serializer="json", compression=None, routing_key="q"
                )
            )

    def send_untagged(self, task_id: str) -> None:
        self.push(
            envelope(
                [[], {}, {}], {"id": task_id, "task": "t"}, {}, serializer="json", compression=None,
                routing_key="q",
            )
        )

    def retry_of(self, copy: Copy) -> str:
        """The message that a task would publish to be retried."""
        return envelope(
            [[], {}, {}], {"id": copy.id, "task": "t", "identify_tag": copy.tag, "retries": 1}, {},
            serializer="json", compression=None, routing_key="q",
        )

    def now_ms(self) -> int:
        seconds, micros = self.client.time()
        return int(seconds) * 1000 + int(micros) // 1000

    def overdue(self, node: str, ms: int = -1) -> None:
        """Have a node's heartbeat be overdue, or be so in a while."""
        self.client.zadd(self.scripts.keys.workers, {node: self.now_ms() + ms})

    def promote(self) -> tuple[int, int, int]:
        return self.scripts.promote(self.state, self.fence, 100)

    def push(self, raw: str | bytes) -> None:
        self.client.lpush(self.pending, raw)

    def admit(self) -> tuple[int, bool]:
        return Intake(self.scripts, self.state, [self.pending], no_tag).run(self.fence)

    def admit_all(self) -> None:
        while self.admit()[1]:
            pass

    def backlog(self, tag: str) -> list[int]:
        return [int(e) for e in self.client.lrange(self.scripts.keys.backlog(self.state, tag), 0, -1)]

    def queue_key(self, name: str) -> str:
        return self.scripts.keys.queue(self.state, name)

    def dead(self) -> list[dict[str, Any]]:
        return [json.loads(v) for v in self.client.hvals(self.queue_key("dead"))]


@dataclass
class Copy:
    """A dispatched message as a node received it."""

    node: Node
    stamp: Stamp
    id: str
    tag: str
    token: str = ""

    def start(
        self, token: str | None = None, send: str | None = None, epoch: str | None = None,
        least_ms: int = 0,
    ) -> int:
        s = self.stamp
        self.token = token or f"token-{next(self.node.bench.tokens)}"
        return self.node.bench.scripts.start(
            s.incarnation, s.slot, s.entry, epoch or s.epoch, send or s.send, self.token, least_ms
        )

    def settle(
        self, outcome: str = "done", *retries: object, token: str | None = None, grant: str = "",
        least_ms: int = 0,
    ) -> str:
        s = self.stamp
        return self.node.bench.scripts.settle(
            s.incarnation, s.slot, s.entry, s.epoch, token or self.token, outcome, *retries,
            grant=grant, least_ms=least_ms,
        )

    def decline(self, token: str) -> bool:
        s = self.stamp
        return self.node.bench.scripts.decline(s.incarnation, s.slot, s.entry, s.epoch, token)

    def discard(self, verdict: str, reason: str = "", alone: bool = False) -> int:
        s = self.stamp
        return self.node.bench.scripts.discard(
            s.incarnation, s.slot, s.entry, s.epoch, s.send, verdict, reason, alone
        )

    def lost(self) -> str:
        s = self.stamp
        return self.node.bench.scripts.lost(s.incarnation, s.slot, s.entry, s.epoch, self.node.bench.state)

    def run(self) -> str:
        assert self.start() == 1
        return self.settle()


@dataclass
class Node:
    """A registered node whose messages a test takes by hand."""

    bench: Bench
    name: str
    list: str

    def receive(self) -> Copy | None:
        raw = self.bench.client.rpop(self.list)
        if raw is None:
            return None
        headers = json.loads(raw)["headers"]
        stamp = Stamp.parse(headers[STAMP_HEADER])
        assert stamp is not None
        return Copy(self, stamp, headers["id"], str(headers["identify_tag"]))

    def take(self) -> Copy:
        copy = self.receive()
        assert copy is not None, "nothing was dispatched to this node"
        return copy

    def drain_all(self) -> list[str]:
        """Run whatever is dispatched until nothing is; returns the ids in order."""
        ran = []
        while copy := self.receive():
            copy.run()
            ran.append(copy.id)
        return ran

    def beat(self, number: int, held: list[Copy] = [], grace_ms: int = 0) -> tuple[bool, int, int]:  # noqa: B006
        return self.bench.scripts.heartbeat(
            self.name, str(number), grace_ms, [copy.stamp.held for copy in held]
        )[:3]


class _PipelineAhead(Pipeline):
    def __init__(self, client: Redis, ahead: Callable[[], float]) -> None:
        super().__init__(client.connection_pool, client.response_callbacks, False, None)
        self._ahead = ahead

    def execute(self, raise_on_error: bool = True) -> list[Any]:
        *others, (seconds, micros) = super().execute(raise_on_error)
        return [*others, (int(seconds + self._ahead()), micros)]


def client_ahead(client: Redis, ahead: Callable[[], float]) -> Any:
    """Calls scripts, and its pipelines that end with TIME say that the clock is so many seconds ahead."""
    return SimpleNamespace(
        register_script=client.register_script, zrange=client.zrange,
        pipeline=lambda **_: _PipelineAhead(client, ahead),
    )  # fmt: skip


@pytest.fixture
def bench(shared_server: Server, namespace: str) -> Iterator[Bench]:
    client = shared_server.client()
    yield Bench(client, Scripts(client, Keys(namespace)))
    for key in client.scan_iter(match="{affinity:" + namespace + "}*", count=1000):
        client.delete(key)
