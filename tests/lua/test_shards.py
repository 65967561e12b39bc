"""Laws of a queue that is spread over shards: two ledgers of one namespace on a real server."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from redis.exceptions import ConnectionError as RedisConnectionError

from celery_affinity.broker import Taken
from celery_affinity.carrying import Carrier, Spread
from celery_affinity.embedded import Server
from celery_affinity.exceptions import ShardsError
from celery_affinity.intake import no_tag, shard_in
from celery_affinity.keys import Keys
from celery_affinity.scripts import Scripts
from celery_affinity.settings import ENTRIES_A_SHARD
from celery_affinity.sharded_scripts import ShardedScripts
from celery_affinity.sharding import incarnations_of, shard_of
from celery_affinity.slot_exchange import SlotExchange

from .conftest import Bench, Node
from .test_carrying import Died, Hub, HubSource, Idle, admit_all, admitted, message

SHARDS = 2


class Flaky(Scripts):
    """Fails a call before or after it was made, when its owner says so."""

    fails: Callable[[], str] = staticmethod(lambda: "")

    def _call(self, name: str, *args: object, **options: Any) -> Any:
        how = self.fails()
        if how == "before":
            raise RedisConnectionError("cut off")
        answer = super()._call(name, *args, **options)
        if how == "after":
            raise RedisConnectionError("the reply was lost")
        return answer


@dataclass
class Shards:
    """Two shards, and a node of that serves both."""

    benches: list[Bench]
    size: int = 2
    fails: Callable[[], str] = lambda: ""

    def lead(self, **limits: int) -> None:
        for shard, bench in enumerate(self.benches):
            bench.lead(shards=SHARDS, first_entry=shard * ENTRIES_A_SHARD, **limits)

    def open(self, slots: int) -> tuple[list[Node], SlotExchange]:
        """A node, registered in both."""
        self.size = slots
        names = incarnations_of("n", SHARDS)
        exchange = SlotExchange(names, self.connect, lambda shard: ["q"], lambda: self.size)
        exchange._offset = 0
        nodes = []
        for name, bench in zip(names, self.benches, strict=True):
            nodes.append(self.register(bench, name, exchange))
        return nodes, exchange

    def register(self, bench: Bench, name: str, exchange: SlotExchange) -> Node:
        node = Node(bench, name, f"{bench.scripts.keys.prefix}wq-{name}")
        shard = bench.scripts.keys.shard
        bench.scripts.register(
            name, name=f"{name}@test", depth=1, slots=self.size, queues=[("q", self.size, node.list)],
            junk=[node.list], role="worker", timeout_ms=60_000, away=exchange.away(shard),
        )  # fmt: skip
        return node

    def connect(self, shard: int) -> Scripts:
        found = Flaky(self.benches[shard].client, self.benches[shard].scripts.keys)
        found.fails = lambda: self.fails()  # type: ignore[method-assign]
        return found

    def leased(self, shard: int) -> set[int]:
        key = self.benches[shard].scripts.keys.worker(incarnations_of("n", SHARDS)[shard], "leased")
        return {int(slot) for slot in self.benches[shard].client.smembers(key)}

    def idle(self, shard: int) -> set[int]:
        key = self.benches[shard].scripts.keys.worker(incarnations_of("n", SHARDS)[shard], "idle")
        return {int(slot) for slot in self.benches[shard].client.smembers(key)}


@pytest.fixture
def shards(shared_server: Server, namespace: str) -> Iterator[Shards]:
    client = shared_server.client()
    yield Shards([Bench(client, Scripts(client, Keys(namespace, n))) for n in range(SHARDS)])
    for key in client.scan_iter(match="{affinity:" + namespace + "*", count=1000):
        client.delete(key)


def test_each_slot_is_offered_in_one_shard_only(shards: Shards) -> None:
    shards.lead()
    shards.open(4)
    assert [shards.idle(0), shards.idle(1)] == [{0, 2}, {1, 3}]


def test_a_free_slot_moves_to_the_shard_that_needs_it(shards: Shards) -> None:
    shards.lead()
    nodes, exchange = shards.open(2)
    for tag in "abc":
        shards.benches[1].send(tag, 1)
    shards.benches[1].admit_all()
    assert (shards.leased(0), shards.leased(1)) == (set(), {1})
    exchange.look()
    assert (shards.leased(1), shards.idle(0)) == ({0, 1}, set())
    assert sorted(nodes[1].drain_all()) == ["a-1", "b-1", "c-1"]


def test_a_slot_moves_back_when_its_first_shard_needs_it(shards: Shards) -> None:
    shards.lead()
    nodes, exchange = shards.open(1)
    for _ in range(3):
        for shard in (1, 0):
            shards.benches[shard].send("a", 1)
            shards.benches[shard].admit_all()
            exchange.look()
            assert nodes[shard].drain_all() == ["a-1"]


def test_a_lease_ends_with_its_batch_where_another_shard_needs_the_only_slot(shards: Shards) -> None:
    shards.lead(batch=3)
    nodes, exchange = shards.open(1)
    shards.benches[0].send("hot", *range(20))
    shards.benches[0].admit_all()
    shards.benches[1].send("cold", 1)
    shards.benches[1].admit_all()
    exchange.look()
    ran = nodes[0].drain_all()
    assert ran == ["hot-0", "hot-1", "hot-2"], "without the other shard's need it would go on"
    exchange.look()
    assert nodes[1].drain_all() == ["cold-1"]
    exchange.look()
    assert nodes[0].drain_all()[0] == "hot-3"


def test_a_move_cut_off_half_way_is_finished_by_the_next_look(shards: Shards) -> None:
    for how in ("before", "after"):
        for step in range(1, 4):
            for shard in range(SHARDS):
                for key in shards.benches[shard].client.scan_iter(
                    match=shards.benches[shard].scripts.keys.prefix + "*"
                ):
                    shards.benches[shard].client.delete(key)
            shards.lead()
            nodes, exchange = shards.open(1)
            shards.benches[1].send("a", 1)
            shards.benches[1].admit_all()
            calls = iter(range(1, 100))
            shards.fails = lambda how=how, calls=calls, step=step: how if next(calls) == step else ""
            exchange.look()
            shards.fails = lambda: ""
            exchange.look()
            assert nodes[1].drain_all() == ["a-1"], (how, step)


def test_a_ledger_that_forgot_who_has_a_slot_is_told(shards: Shards) -> None:
    shards.lead()
    _, exchange = shards.open(2)
    keys, client = shards.benches[0].scripts.keys, shards.benches[0].client
    client.delete(keys.worker("n", "busy"))
    client.hset(keys.worker("n", "busy"), "away:0", "0")
    exchange.look()
    assert client.hgetall(keys.worker("n", "busy")) == {b"away:1": b"1"}


def test_a_node_that_registers_anew_offers_what_it_has_there_now(shards: Shards) -> None:
    shards.lead()
    nodes, exchange = shards.open(2)
    shards.benches[1].send("a", 1)
    shards.benches[1].send("b", 1)
    shards.benches[1].admit_all()
    exchange.look()
    assert len(nodes[1].drain_all()) == 2
    for bench, name in zip(shards.benches, incarnations_of("n", SHARDS), strict=True):
        bench.overdue(name)
        assert bench.scripts.rescue("q", bench.fence, 10)[0] == 1
        shards.register(bench, name, exchange)
    assert (shards.idle(0), shards.idle(1)) == (set(), {0, 1})


def test_a_new_process_of_a_slot_leaves_it_to_the_shard_that_has_it(shards: Shards) -> None:
    shards.lead()
    shards.open(2)
    calls = ShardedScripts({"n": shards.benches[0].scripts, "n-1": shards.benches[1].scripts})
    for name in incarnations_of("n", SHARDS):
        for slot in (0, 1):
            calls.process_up(name, slot)
    assert [shards.idle(0), shards.idle(1)] == [{0}, {1}]


@pytest.mark.parametrize("seed", range(12))
def test_a_slot_never_has_leases_in_two_shards(shards: Shards, seed: int) -> None:
    """Whatever is lost on the way. In the end all tasks have run, those of a tag in order."""
    rng = random.Random(seed)
    shards.lead(batch=rng.choice([1, 3]))
    nodes, exchange = shards.open(rng.choice([1, 2, 3]))
    shards.fails = lambda: rng.choices(["", "before", "after"], [8, 1, 1])[0]
    ran: dict[tuple[int, str], list[str]] = {}
    sent = 0
    running: list[tuple[int, Any]] = []
    for step in range(250):
        shard = rng.randrange(SHARDS)
        if step < 150 and rng.random() < 0.4:
            shards.benches[shard].send(rng.choice("abcd"), step)
            shards.benches[shard].admit_all()
            sent += 1
        if (copy := nodes[shard].receive()) is not None:
            assert copy.start() == 1
            running.append((shard, copy))
        if running and rng.random() < 0.6:
            at, copy = running.pop(rng.randrange(len(running)))
            ran.setdefault((at, copy.tag), []).append(copy.id)
            assert copy.settle() != "stale"
        if rng.random() < 0.4:
            exchange.look()
        assert not shards.leased(0) & shards.leased(1), f"after step {step}"
        assert not (shards.leased(0) | shards.idle(0)) & (shards.leased(1) | shards.idle(1)) or exchange._lent
    shards.fails = lambda: ""
    for at, copy in running:
        ran.setdefault((at, copy.tag), []).append(copy.id)
        copy.settle()
    for _ in range(60):
        exchange.look()
        for shard, node in enumerate(nodes):
            while (copy := node.receive()) is not None:
                ran.setdefault((shard, copy.tag), []).append(copy.id)
                copy.run()
    assert sum(map(len, ran.values())) == sent
    for ids in ran.values():
        assert ids == sorted(ids, key=lambda one: int(one.split("-")[1]))


# Tags and entries


def test_the_numbers_of_entries_are_unique_over_all_shards(shards: Shards) -> None:
    shards.lead()
    for bench in shards.benches:
        bench.send("a", 1, 2)
        bench.admit_all()
    assert [shards.benches[n].backlog("a") for n in (0, 1)] == [
        [1, 2], [ENTRIES_A_SHARD + 1, ENTRIES_A_SHARD + 2],
    ]  # fmt: skip


def test_another_number_of_shards_is_refused_while_tasks_wait(shards: Shards) -> None:
    bench = shards.benches[0]
    bench.lead(shards=2)
    limits = {"shards": 3, "max_batch_size": 10}
    assert bench.scripts.configure("q", bench.fence, limits, {}) == 1, "it is empty"
    bench.send("a", 1)
    bench.admit_all()
    assert bench.scripts.configure("q", bench.fence, {**limits, "shards": 2}, {}) == -2
    assert bench.scripts.shards("q") == 3, "nothing was written"


def test_tags_are_spread_evenly_and_a_tag_never_changes_its_shard() -> None:
    found = [shard_of(f"tenant-{n}", 4) for n in range(4000)]
    assert all(900 < found.count(shard) < 1100 for shard in range(4))
    assert [shard_of(tag, 8) for tag in ("company-123", "ü", "1", "eu:7")] == [0, 0, 4, 2]


def carry(shards: Shards, hub: Hub, fence: str | None = None) -> None:
    """Carry until nothing is left, the term is over, or it dies. A dead one's connection breaks."""
    sources: list[HubSource] = []

    def connect() -> HubSource:
        sources.append(hub.source())
        return sources[-1]

    spread = Spread(
        [(bench.scripts, "q") for bench in shards.benches[1:]],
        lambda raw: shard_in(raw, no_tag, False, SHARDS),
    )
    carrier = Carrier(shards.benches[0].scripts, "q", "q", connect, spread)
    try:
        carrier.run(fence or shards.benches[0].fence, threading.Event())
    except Idle:
        pass
    finally:
        for source in sources:
            source.close()


NAMES = [f"{tag}-{n}" for n in range(3) for tag in "abcd"]


def sharded(names: list[str]) -> list[list[str]]:
    return [[n for n in names if shard_of(n.partition("-")[0], SHARDS) == s] for s in range(SHARDS)]


def test_each_message_comes_into_the_shard_of_its_tag(shards: Shards) -> None:
    shards.lead()
    hub = Hub()
    hub.publish(*NAMES)
    carry(shards, hub)
    for bench in shards.benches:
        admit_all(bench)
    assert [admitted(bench) for bench in shards.benches] == sharded(NAMES)
    assert all(sharded(NAMES)), "the law is about several shards"


@pytest.mark.parametrize("step", range(1, 12))
def test_a_carrier_that_dies_between_two_shards_loses_and_doubles_nothing(
    shards: Shards, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards.lead()
    hub = Hub()
    hub.publish(*NAMES)
    calls, put = iter(range(1, 1000)), Carrier._put

    def dying(self: Carrier, *args: Any) -> Any:
        answer = put(self, *args)
        if next(calls) == step:
            raise Died
        return answer

    monkeypatch.setattr(Carrier, "_put", dying)
    try:
        carry(shards, hub)
    except Died:
        pass
    shards.benches[0].scripts.resign("q", shards.benches[0].fence)
    shards.benches[0].lead(candidate="leader/2", shards=SHARDS)
    carry(shards, hub)
    for bench in shards.benches:
        admit_all(bench)
    assert [admitted(bench) for bench in shards.benches] == sharded(NAMES)
    assert hub.waiting == []


def test_a_superseded_carrier_puts_nothing_into_any_shard(shards: Shards) -> None:
    shards.lead()
    superseded = shards.benches[0].fence.rpartition(" ")[2]
    shards.benches[0].scripts.resign("q", shards.benches[0].fence)
    shards.benches[0].lead(candidate="leader/2", shards=SHARDS)
    carry(shards, Hub())  # takes nothing, but has told its term
    taken = [Taken(message("b-1"), "one", False, None)]
    answer = shards.benches[1].scripts.carry("q", "late", superseded, taken, 60_000, 100, SHARDS)
    assert answer[0] == -1
    assert shards.benches[1].scripts.inbox_length("q") == 0


def test_a_carrier_of_another_number_of_shards_carries_nothing(shards: Shards) -> None:
    shards.lead()
    taken = [Taken(message("b-1"), "one", False, None)]
    first = shards.benches[0]
    assert first.scripts.carry("q", "t", first.fence, taken, 60_000, 100, 3) == (-3, SHARDS)
    assert first.scripts.inbox_length("q") == 0
    assert "Set shards=2 again" in str(ShardsError("q", SHARDS, 3))
