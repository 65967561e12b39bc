"""The ledger without Celery: the real scripts, with messages and nodes made here."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from celery import Celery
from redis import Redis

from celery_affinity.intake import Intake, no_tag
from celery_affinity.keys import Keys
from celery_affinity.message import TAG_HEADER, envelope
from celery_affinity.scripts import Scripts
from celery_affinity.settings import AffinityQueue

__all__ = ("QUEUE", "STAMP", "Counts", "ScriptedLedger", "template")

QUEUE = "bench"
#: What a node reads of a dispatched message: entry, epoch, send number, incarnation, slot.
STAMP = re.compile(rb'"affinity_stamp": "(\d+) (\d+) (\w+) (\S+) (\d+) ')
#: A beat of a simulated node is never overdue while it is measured.
_TIMEOUT_MS = 3_600_000
_ASIDE = tuple(f"cmdstat_{name}" for name in ("info", "config", "client", "hello", "script"))
_PUSH = """
for n = tonumber(ARGV[2]), tonumber(ARGV[2]) + tonumber(ARGV[3]) - 1 do
  local id, tag = string.format('%08d', n), ARGV[5] .. '-' .. n % tonumber(ARGV[4])
  redis.call('LPUSH', KEYS[1], (string.gsub(ARGV[1], '@([it])', {i = id, t = tag})))
end
"""


def template(argument_bytes: int = 0) -> str:
    """A message as Celery publishes it; ``@i`` stands for its number, ``@t`` for its tag."""
    app = Celery("bench", set_as_current=False)
    task_id = "5b4dcd30-7bd1-4fb1-9d3c-@i00"
    sent = app.amqp.as_task_v2(
        task_id, "shop.tasks.send_invoice", ("company-1234", 42, "x" * argument_bytes), {}
    )
    text = envelope(
        sent.body,
        {**sent.headers, TAG_HEADER: "@t", "origin": "gen4711@worker-7.example.com"},
        sent.properties,
        serializer="json",
        compression=None,
        routing_key=QUEUE,
    )
    # Each message has a delivery tag of its own, as kombu makes it.
    return re.sub(r'"delivery_tag": "[0-9a-f]{8}', '"delivery_tag": "@i', text)


@dataclass(frozen=True)
class Counts:
    """What a server did between two looks."""

    #: By command, those inside of scripts too; the looks themselves left out.
    commands: dict[str, int]
    #: Microseconds by command; a script's own commands are in the script's time too.
    usec: dict[str, int]
    #: Scripts and other commands that a client waited for one by one.
    calls: int
    cpu_us: float

    @classmethod
    def look(cls, client: Redis) -> Counts:
        """All so far."""
        # Neither what the looking costs, nor what a connection costs once.
        stats = {
            name.removeprefix("cmdstat_"): found
            for name, found in client.info("commandstats").items()
            if not name.startswith(_ASIDE)
        }
        cpu = client.info("cpu")
        return cls(
            {name: int(found["calls"]) for name, found in stats.items()},
            {name: int(found["usec"]) for name, found in stats.items()},
            0,
            (float(cpu["used_cpu_user"]) + float(cpu["used_cpu_sys"])) * 1e6,
        )

    def since(self, before: Counts, calls: int = 0) -> Counts:
        """What was done since an earlier look."""

        def less(now: dict[str, int], then: dict[str, int]) -> dict[str, int]:
            found = {name: value - then.get(name, 0) for name, value in now.items()}
            return {name: value for name, value in found.items() if value}

        return Counts(
            less(self.commands, before.commands),
            less(self.usec, before.usec),
            calls,
            self.cpu_us - before.cpu_us,
        )

    @property
    def inside(self) -> int:
        """Commands without the calls of scripts around them."""
        return sum(n for name, n in self.commands.items() if name not in ("evalsha", "eval"))


@dataclass
class ScriptedLedger:
    """One affinity queue of one namespace, its leader and its nodes."""

    client: Redis
    settings: AffinityQueue = field(default_factory=lambda: AffinityQueue(name=QUEUE))
    namespace: str = "bench"
    message: str = field(default_factory=template)
    fence: str = ""
    #: Scripts called and messages taken, each of which is a round trip.
    calls: int = 0
    _tokens: int = 0

    def __post_init__(self) -> None:
        self.scripts = Scripts(self.client, Keys(self.namespace), single_threaded=True)
        self.pending = self.scripts.keys.prefix + "pending"
        self._intake = Intake(self.scripts, QUEUE, [self.pending], no_tag)
        self._push = self.client.register_script(_PUSH)

    def lead(self) -> None:
        """Be the leader, with the queue's limits."""
        term, _ = self.scripts.claim(QUEUE, "leader", _TIMEOUT_MS)
        if term is None:
            raise RuntimeError("another leader is in office")
        self.fence = f"leader {term}"
        self.scripts.configure(QUEUE, self.fence, self.settings.limits, {})

    def publish(self, count: int, tags: int, first: int = 0, name: str = "tag") -> None:
        """Put messages into the pending queue, tag after tag (`name`-0, ...) in turn."""
        for start in range(first, first + count, 10_000):
            number = min(10_000, first + count - start)
            self._push([self.pending], [self.message, start, number, tags, name])

    def admit(self) -> int:
        """Let everything in; how many messages."""
        admitted, more = 0, True
        while more:
            found, more = self._intake.run(self.fence)
            self.calls += 1
            if found < 0:
                raise RuntimeError("the term is over")
            admitted += found
        return admitted

    def fill(self, waiting: int, tags: int) -> None:
        """Admit so many messages of so many tags; nothing may run yet."""
        batch, self._intake.BATCH = self._intake.BATCH, 2000
        for start in range(0, waiting, 50_000):
            self.publish(min(50_000, waiting - start), tags, first=start)
            self.admit()
        self._intake.BATCH = batch

    def pass_when_idle(self) -> None:
        """What a leader does in one pass without arrivals."""
        self._intake.run(self.fence)
        self.scripts.promote(QUEUE, self.fence, 100)
        self.scripts.rescue(QUEUE, self.fence, 100)
        self.calls += 3

    def node(self, name: str, slots: int = 1, depth: int = 2) -> str:
        """Register a node; its worker queue's list."""
        messages = self.list_of(name)
        self.scripts.register(
            name,
            name=f"{name}@bench",
            depth=depth,
            slots=slots,
            queues=[(QUEUE, slots, messages)],
            junk=[messages],
            role="worker",
            timeout_ms=_TIMEOUT_MS,
        )
        return messages

    def list_of(self, node: str) -> str:
        """The list of a node's worker queue."""
        return f"{self.scripts.keys.prefix}wq-{node}"

    def beat(self, node: str, held: Sequence[str] = ()) -> None:
        """A heartbeat that finds everything in order."""
        self._tokens += 1
        self.calls += 1
        registered, *_ = self.scripts.heartbeat(node, str(self._tokens), 60_000, held)
        if not registered:
            raise RuntimeError(f"{node} is not registered")

    def run(self, node: str, count: int) -> int:
        """Take, start and settle messages of a node one after another; how many there were."""
        for done in range(count):
            raw: Any = self.client.rpop(self.list_of(node))
            self.calls += 1
            if raw is None:
                return done
            self.settle(self.start(raw))
        return count

    def take(self, node: str) -> list[bytes]:
        """What is dispatched to a node, oldest first."""
        found: Any = self.client.rpop(self.list_of(node), 100_000)
        self.calls += 1
        return found or []

    def start(self, raw: bytes) -> tuple[str, int, str, str, str]:
        """Start a dispatched message; what settles it."""
        found = STAMP.search(raw)
        assert found is not None
        entry, epoch, send, incarnation, slot = (part.decode() for part in found.groups())
        self._tokens += 1
        token = f"41210:4711:0a1b2c3d:{self._tokens}"
        self.calls += 1
        answer = self.scripts.start(incarnation, int(slot), entry, epoch, send, token, 1000)
        if answer != 1:
            raise RuntimeError(f"entry {entry} was refused: {answer}")
        return incarnation, int(slot), entry, epoch, token

    def settle(self, started: tuple[str, int, str, str, str]) -> None:
        """Settle a started message."""
        self.calls += 1
        answer = self.scripts.settle(*started, "done")
        if answer == "stale":
            raise RuntimeError(f"{started} was not this caller's any more")

    def memory(self) -> int:
        """Bytes that the server uses for its data."""
        return int(self.client.info("memory")["used_memory"])
