"""Laws of the slots that a node moves between shards: none starves, none stands idle, none spins."""

from __future__ import annotations

from itertools import count
from types import SimpleNamespace

import pytest
from redis.exceptions import TimeoutError as RedisTimeoutError

from celery_affinity import slot_exchange
from celery_affinity.operator_scripts import OperatorScripts
from celery_affinity.sharding import incarnations_of
from celery_affinity.slot_exchange import SlotExchange

from .conftest import Bench, Node
from .test_shards import SHARDS, Shards, shards

__all__ = ("shards",)


class Endless(AssertionError):
    """A look that takes so many calls never ends."""


def bounded(shards: Shards, most: int = 100) -> None:
    calls = count(1)

    def fails() -> str:
        if next(calls) > most:
            raise Endless
        return ""

    shards.fails = fails


def send(shards: Shards, shard: int, tag: str, *ids: object) -> None:
    shards.benches[shard].send(tag, *ids)
    shards.benches[shard].admit_all()


def move(bench: Bench, tag: str, incarnation: str) -> None:
    OperatorScripts(bench.client, bench.scripts.keys).move("q", tag, incarnation, 60)


def test_a_look_ends_while_a_queue_with_tasks_waiting_is_paused(shards: Shards) -> None:
    shards.lead()
    _, exchange = shards.open(1)
    for bench in shards.benches:
        bench.client.hset(bench.queue_key("conf"), "paused", "1")
    for shard in range(SHARDS):
        send(shards, shard, "a", 1)
    bounded(shards)
    exchange.look()


def test_a_look_ends_while_the_node_is_drained(shards: Shards) -> None:
    shards.lead()
    _, exchange = shards.open(1)
    for bench, name in zip(shards.benches, incarnations_of("n", SHARDS), strict=True):
        bench.scripts.drain(name)
        bench.send("a", 1)
        bench.admit_all()
    bounded(shards)
    exchange.look()


def test_a_look_ends_while_no_tag_may_have_the_node(shards: Shards) -> None:
    """They are on their way to another one, which is busy."""
    shards.lead()
    _, exchange = shards.open(1)
    for shard, bench in enumerate(shards.benches):
        bench.node(f"other-{shard}")
        send(shards, shard, "busy", 1)
        move(bench, "a", f"other-{shard}")
        send(shards, shard, "a", 1)
    bounded(shards)
    exchange.look()


def test_a_pool_that_shrinks_while_a_slot_moves_leaves_no_shard_without_one(shards: Shards) -> None:
    shards.lead(batch=3)
    nodes, exchange = shards.open(4)
    exchange._owner |= {0: 0, 1: 1, 2: 1, 3: 1}
    exchange.look()
    for tag in "abc":
        send(shards, 1, tag, 1)
    running = list(iter(nodes[1].receive, None))
    assert [copy.start() for copy in running] == [1, 1, 1]
    send(shards, 0, "p", 1)
    send(shards, 0, "q", 1)
    exchange.look()  # one more for q, as soon as its task ends
    shards.size = 1
    for bench, node in zip(shards.benches, nodes, strict=True):
        assert bench.scripts.serve(
            node.name, 1, slots=1, queues=[("q", 1, node.list)], junk=[node.list]
        ) is not None  # fmt: skip
    for copy in running:
        copy.settle()
    send(shards, 1, "hot", *range(200))
    for step in range(60):
        exchange.look()
        for node in nodes:
            if (copy := node.receive()) is not None:
                copy.run()
                if copy.tag == "z":
                    return
        if step == 20:
            assert shards.leased(1) == {0}
            send(shards, 0, "z", 1)
    raise AssertionError("z has no slot")


def test_a_shard_does_not_wait_for_one_long_task_where_another_slot_gets_free(shards: Shards) -> None:
    shards.lead()
    nodes, exchange = shards.open(2)
    send(shards, 0, "long", 1)
    send(shards, 0, "short", 1)
    exchange.look()
    long, short = sorted(iter(nodes[0].receive, None), key=lambda copy: copy.tag)
    assert long.start() == short.start() == 1
    send(shards, 1, "x", 1)
    exchange.look()
    short.settle()
    for _ in range(3):
        exchange.look()
    assert nodes[1].drain_all() == ["x-1"]


def test_a_shard_does_not_wait_for_one_long_task_where_another_slot_passes_on(shards: Shards) -> None:
    shards.lead(batch=3)
    nodes, exchange = shards.open(2)
    send(shards, 0, "long", 1)
    send(shards, 0, "hot", *range(100))
    exchange.look()
    hot, long = sorted(iter(nodes[0].receive, None), key=lambda copy: copy.tag)
    assert long.start() == 1
    send(shards, 1, "x", 1)
    exchange.look()
    ran = 0
    copy: object = hot
    for _ in range(30):
        if copy is not None:
            copy.run()  # type: ignore[attr-defined]
            ran += 1
        exchange.look()
        if (cold := nodes[1].receive()) is not None:
            assert ran <= 6, "one lease that runs, and one more"
            return cold.run() and None
        copy = nodes[0].receive()
    raise AssertionError("the other shard's tag waited for the long task")


def test_a_slot_that_its_shards_tags_do_not_take_goes_where_one_takes_it(shards: Shards) -> None:
    shards.lead()
    nodes, exchange = shards.open(2)
    shards.benches[1].node("other")
    send(shards, 1, "a", 1)  # on slot 1
    send(shards, 1, "b", 1)  # on the other node
    move(shards.benches[1], "moved", "other")
    send(shards, 1, "moved", 1)
    assert nodes[1].drain_all() == ["a-1"]
    send(shards, 0, "p", 1)  # on slot 0
    send(shards, 0, "q", 1)  # needs slot 1, which "moved" does not take
    for _ in range(2):
        exchange.look()
    assert len(list(iter(nodes[0].receive, None))) == 2


def test_slots_are_shared_over_all_nodes_where_each_has_one(shards: Shards) -> None:
    """A long task holds one shard's only slot, the other shard has all others and always work."""
    shards.lead(batch=3)
    names = incarnations_of("m", SHARDS)
    exchanges: list[SlotExchange] = []
    nodes: list[Node] = []
    shards.size = 1
    for at in range(4):
        names = incarnations_of(f"m{at}", SHARDS)
        exchange = SlotExchange(names, shards.connect, lambda shard: ["q"], lambda: 1)
        exchange._offset = 1 if at == 0 else 0
        exchanges.append(exchange)
        nodes += [shards.register(b, n, exchange) for b, n in zip(shards.benches, names, strict=True)]
    send(shards, 1, "long", 1)
    for tag in "abcdef":
        send(shards, 0, tag, *range(100))
    send(shards, 1, "x", 1)
    ring = shards.benches[1].queue_key("ring")
    shards.benches[1].client.zincrby(ring, -60e6, "x")  # it has waited for a minute
    ran = 0
    for _ in range(40):
        for node in nodes:
            copy = node.receive()
            if copy is None:
                continue
            if copy.tag == "x":
                return
            assert copy.start() == 1
            if copy.tag != "long":
                copy.settle()
                ran += 1
        for exchange in exchanges:
            exchange.look()
    raise AssertionError(f"{ran} tasks of the other shard ran, and x has no slot")


def test_a_slot_with_a_long_ordinary_task_is_no_reason_to_give_a_shard_no_other(shards: Shards) -> None:
    shards.lead(batch=3)
    nodes, exchange = shards.open(2)
    for bench, name in zip(shards.benches, incarnations_of("n", SHARDS), strict=True):
        bench.scripts.occupy(name, 1, "ordinary")
    send(shards, 0, "hot", *range(100))
    send(shards, 1, "x", 1)
    for _ in range(10):
        if (copy := nodes[0].receive()) is not None:
            copy.run()
        exchange.look()
        if nodes[1].drain_all() == ["x-1"]:
            return
    raise AssertionError("x waits for the ordinary task")


def test_what_a_shard_lost_of_a_node_takes_its_slots_nowhere_before_it_has_registered_anew(shards: Shards) -> None:
    """A slot may still run what was taken back: a task of another shard would wait behind it."""
    shards.lead()
    _, exchange = shards.open(1)
    send(shards, 0, "a", 1)
    shards.benches[0].overdue("n")
    assert shards.benches[0].scripts.rescue("q", shards.benches[0].fence, 10)[0] == 1
    send(shards, 1, "x", 1)
    exchange.look()
    assert shards.leased(1) == set()
    shards.register(shards.benches[0], "n", exchange)
    exchange.look()
    exchange.look()
    assert shards.leased(1) == {0}


def test_a_shard_whose_server_hangs_holds_up_the_others_slots_seldom(
    shards: Shards, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards.lead()
    _, exchange = shards.open(2)
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(slot_exchange, "time", SimpleNamespace(monotonic=lambda: clock.now))

    def hangs(*_: object) -> None:
        clock.now += slot_exchange.ANSWER_SECONDS
        raise RedisTimeoutError("no answer")

    monkeypatch.setattr(exchange._scripts[1], "demand", hangs)
    for _ in range(20):
        exchange.look()
        clock.now += slot_exchange.LOOK_SECONDS
    assert clock.now < 106.0, "of 5 s, one was waited for it"
    monkeypatch.undo()
    shards.benches[1].client.delete(shards.benches[1].scripts.keys.worker("n-1", "busy"))
    exchange._quiet.clear()
    exchange.look()
    assert shards.benches[1].client.hkeys(shards.benches[1].scripts.keys.worker("n-1", "busy"))


def test_a_slot_whose_ordinary_task_ended_unheard_is_vacated(shards: Shards) -> None:
    shards.lead()
    _, exchange = shards.open(2)
    names = incarnations_of("n", SHARDS)
    for bench, name in zip(shards.benches, names, strict=True):
        bench.scripts.occupy(name, 0, "runs")
        bench.scripts.occupy(name, 1, "ended")
    shards.benches[0].scripts.vacate("n", "ended")
    exchange.look()
    assert shards.idle(1) == set(), "it may just be about to say so"
    exchange.look()
    assert shards.idle(1) == {1}
    key = shards.benches[1].scripts.keys.worker(names[1], "busy")
    assert shards.benches[1].client.hgetall(key) == {b"away:0": b"0", b"runs": b"0"}
