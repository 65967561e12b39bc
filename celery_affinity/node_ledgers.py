"""A node's side of the ledger, in each shard: its name there, its reporter, its relay, its scripts.

With one shard, which is the rule, all of these are one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

from celery_affinity.connection import connect
from celery_affinity.delivery import Delivery
from celery_affinity.keys import Keys
from celery_affinity.leftovers import Leftovers
from celery_affinity.relay import Relay
from celery_affinity.reporter import Reporter
from celery_affinity.reporters import Reporters
from celery_affinity.scripts import Scripts
from celery_affinity.settings import AffinityQueue, AffinitySettings
from celery_affinity.sharded_scripts import ShardedScripts
from celery_affinity.sharding import incarnations_of
from celery_affinity.slot_exchange import ANSWER_SECONDS, SlotExchange
from celery_affinity.vacancy import Vacancy
from celery_affinity.watchdog import Lifeline

__all__ = ("NodeLedgers", "Serving")

Look = Callable[[Scripts], None]


class Serving(Protocol):
    """What is announced of a node; it may change while it runs."""

    @property
    def name(self) -> str:
        """Celery's name of it."""

    @property
    def incarnation(self) -> str:
        """Its own name, new at each start."""

    @property
    def serves(self) -> Sequence[AffinityQueue]:
        """The affinity queues that it serves now."""

    @property
    def worker_queues(self) -> Mapping[str, str]:
        """Affinity queue -> its worker queue, also of those that it served once."""

    @property
    def slots(self) -> int:
        """How many it has."""

    @property
    def slots_are_processes(self) -> bool:
        """Whether each slot is one process."""

    @property
    def depth(self) -> int:
        """How many messages of a lease are sent to it at a time."""


class NodeLedgers:
    """The ledgers of one node.

    Arguments:
        looks: Called after each beat in the first shard.
        pulse: Called before each beat in the first shard.
        connect_anew: See `Relay`.
    """

    def __init__(
        self,
        node: Serving,
        settings: AffinitySettings,
        url: str,
        delivery: Delivery,
        looks: Sequence[Look],
        pulse: Callable[[], None],
        connect_anew: Callable[[Iterable[str]], None],
    ) -> None:
        self._node = node
        self._settings = settings
        self._url = url
        self._delivery = delivery
        self._connect_anew = connect_anew
        #: The node's name in each shard. Stamps carry it: it says which shard a message is of.
        self.incarnations = incarnations_of(node.incarnation, settings.shards)
        self._shards = range(settings.shards)
        self.exchange = self._make_exchange() if settings.shards > 1 else None
        self.lifelines = {incarnation: Lifeline() for incarnation in self.incarnations}
        reporters = [
            self._make_reporter(shard, lifeline, looks if not shard else (), pulse)
            for shard, lifeline in enumerate(self.lifelines.values())
        ]
        self.reporter = Reporters(dict(zip(self.incarnations, reporters, strict=True)))
        self.relays: list[Relay] = []
        if (broker := delivery.broker) is not None:
            self.relays = [self._relay(shard, broker.outlet) for shard in self._shards]

    @property
    def queue_names(self) -> dict[str, str]:
        """Of all that are declared: a process must know also those that its node serves later."""
        return {part.state: part.name for part in self._settings.parts}

    @property
    def loops(self) -> dict[str, Callable[[], None]]:
        """What runs for as long as the node does, in threads of these names."""
        found = {f"affinity-heartbeat-{s}": loop for s, loop in enumerate(self.reporter.loops)}
        return {**found, "affinity-slots": self.exchange.run} if self.exchange else found

    def scripts_of(
        self, shard: int, single_threaded: bool = False, socket_timeout: float = 10.0
    ) -> Scripts:
        """One shard's, over a connection of their own."""
        keys = Keys(self._settings.namespace, shard)
        client = connect(self._url, keys.prefix, socket_timeout=socket_timeout)
        return Scripts(client, keys, single_threaded=single_threaded)

    def scripts(self, single_threaded: bool = False) -> Scripts:
        """Those of all shards."""
        if self.exchange is None:
            return self.scripts_of(0, single_threaded)
        shards = [self.scripts_of(shard, single_threaded) for shard in self._shards]
        by_word = dict(zip(self.incarnations, shards, strict=True))
        by_word |= {part.state: shards[part.shard] for part in self._settings.parts}
        return ShardedScripts(by_word)

    def part(self, state: str) -> AffinityQueue | None:
        """The part of a queue that has this state name."""
        return next((part for part in self._settings.parts if part.state == state), None)

    def served(self, shard: int) -> list[AffinityQueue]:
        """What the node serves of a shard now."""
        return [part for queue in self._node.serves for part in queue.parts if part.shard == shard]

    def _make_exchange(self) -> SlotExchange:
        return SlotExchange(
            self.incarnations,
            partial(self.scripts_of, socket_timeout=ANSWER_SECONDS),
            lambda shard: [part.state for part in self.served(shard)],
            lambda: self._node.slots,
        )

    def _make_reporter(
        self, shard: int, lifeline: Lifeline, looks: Sequence[Look], pulse: Callable[[], None]
    ) -> Reporter:
        all_looks = [*looks, Leftovers(self.incarnations[shard]).look]
        if self._settings.role == "worker":
            names = {part.state: part.name for part in self.served(shard)}
            all_looks.append(Vacancy(names, 2 * self._settings.leader_ttl).look)
        return Reporter(
            partial(self.scripts_of, shard),
            self.incarnations[shard],
            partial(self._announcement, shard),
            self._settings.heartbeat_interval,
            lifeline,
            all_looks,
            (lambda: None) if shard else pulse,
            partial(self.exchange.away, shard) if self.exchange else tuple,
            in_turn=self._node.slots_are_processes,
        )

    def _relay(self, shard: int, outlet: Callable[[], Any]) -> Relay:
        keys = Keys(self._settings.namespace, shard)
        return Relay(
            connect(self._url, keys.prefix),
            keys.outbox(self.incarnations[shard]),
            outlet,
            self._queue_abroad,
            self.reporter.held,
            lambda stamp, reason: self.reporter.discard(stamp, "bury", reason),
            self._connect_anew,
        )

    def _queue_abroad(self, state: str) -> str | None:
        found = self.part(state)
        return None if found is None else self._node.worker_queues.get(found.name)

    def _announcement(self, shard: int) -> dict[str, Any]:
        node, here, delivery = self._node, self.incarnations[shard], self._delivery
        slots, names = node.slots, node.worker_queues
        queues = [
            (
                part.state,
                min(part.slots or slots, slots),
                delivery.worker_list(names[part.name], here, shard),
            )
            for part in self.served(shard)
        ]
        junk = [key for name in names.values() for key in delivery.leftovers(name, here, shard)]
        return {
            "name": node.name,
            "depth": node.depth,
            "slots": slots,
            "queues": queues,
            "junk": junk,
            "role": self._settings.role,
            "timeout_ms": int(self._settings.heartbeat_timeout * 1000),
        }
