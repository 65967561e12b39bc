"""Laws of dispatch: order, batches, the ring, warm slots, concurrency."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone

from .conftest import Bench


def test_tasks_of_a_tag_are_dispatched_in_order_of_admission(bench: Bench) -> None:
    bench.lead()
    bench.send("a", *range(30))
    node = bench.node("n", slots=3, depth=2)
    bench.admit_all()
    assert node.drain_all() == [f"a-{n}" for n in range(30)]


def test_a_tag_is_in_one_slot_however_many_are_free(bench: Bench) -> None:
    bench.lead()
    nodes = [bench.node(f"n{k}", slots=2) for k in range(3)]
    bench.send("a", *range(5))
    bench.admit()
    assert sum(bench.client.llen(node.list) for node in nodes) == 1


def test_a_lease_passes_on_after_its_batch_if_another_tag_waits(bench: Bench) -> None:
    bench.lead(batch=3)
    node = bench.node("n")
    bench.send("a", *range(5))
    bench.send("b", 0)
    bench.admit()
    assert node.drain_all() == ["a-0", "a-1", "a-2", "b-0", "a-3", "a-4"]


def test_a_lease_is_extended_in_place_while_no_other_tag_waits(bench: Bench) -> None:
    node = bench.opening(*range(9), batch=3)
    epochs = set()
    while copy := node.receive():
        epochs.add(copy.stamp.epoch)
        copy.run()
    assert len(epochs) == 1


def test_a_tag_at_place_k_is_dispatched_within_k_leases(bench: Bench) -> None:
    bench.lead(batch=2)
    tags = [f"t{k}" for k in range(10)]
    for tag in tags:
        bench.send(tag, *range(4))
    node = bench.node("n")
    bench.admit_all()
    leases: list[str] = []
    while copy := node.receive():
        if not leases or leases[-1] != copy.tag:
            leases.append(copy.tag)
        copy.run()
    assert leases == tags + tags


def test_a_tag_that_comes_back_goes_to_the_slot_that_had_it_last(bench: Bench) -> None:
    bench.lead()
    nodes = {f"n{k}": bench.node(f"n{k}") for k in range(4)}
    homes = {}
    for tag in ("a", "b", "c"):
        bench.send(tag, 0)
        bench.admit()
        homes[tag] = next(
            name
            for name, node in nodes.items()
            if name not in homes.values() and bench.client.llen(node.list)
        )
    for tag in ("a", "b", "c"):
        assert nodes[homes[tag]].drain_all() == [f"{tag}-0"]
    for tag in ("c", "a", "b"):
        bench.send(tag, 1)
        bench.admit()
        assert nodes[homes[tag]].drain_all() == [f"{tag}-1"]


def test_a_warm_slot_that_is_busy_is_not_waited_for(bench: Bench) -> None:
    bench.lead()
    first, second = bench.node("n1"), bench.node("n2")
    bench.send("a", 0)
    bench.admit()
    home, other = (first, second) if bench.client.llen(first.list) else (second, first)
    home.drain_all()
    bench.scripts.occupy(home.name, 0, "an ordinary task")
    bench.send("a", 1)
    bench.admit()
    assert other.drain_all() == ["a-1"]


def test_the_memory_of_warm_slots_is_bounded(bench: Bench) -> None:
    bench.lead(warm=5)
    node = bench.node("n")
    for k in range(20):
        bench.send(f"t{k}", 0)
    bench.admit_all()
    node.drain_all()
    assert bench.client.hlen(bench.queue_key("warm")) == 5
    assert bench.client.zcard(bench.queue_key("warmz")) == 5


def test_at_most_tag_concurrency_entries_are_out_and_start_in_order(bench: Bench) -> None:
    bench.lead(concurrency=1, own={"wide": 3})
    node = bench.node("n", slots=8)
    bench.send("wide", *range(6))
    bench.send("narrow", *range(3))
    bench.admit()
    running = []
    ids = []
    for _ in range(3):
        waiting = {copy.tag: copy for copy in iter(node.receive, None)}
        assert "wide" in waiting, "the next one is dispatched once the last has started"
        copy = waiting["wide"]
        assert copy.start() == 1
        running.append(copy)
        ids.append(copy.id)
    assert ids == ["wide-0", "wide-1", "wide-2"]
    assert node.receive() is None, "three of them run, none more is out"
    running[1].settle()
    assert node.take().id == "wide-3"


def test_the_slots_setting_limits_a_queue_to_some_of_a_node(bench: Bench) -> None:
    bench.lead()
    bench.scripts.register(
        "n",
        name="n",
        depth=1,
        slots=4,
        queues=[("q", 2, bench.pending + "-w")],
        junk=[],
        role="worker",
        timeout_ms=60_000,
    )
    for tag in "abcd":
        bench.send(tag, 0)
    bench.admit()
    assert bench.client.llen(bench.pending + "-w") == 2


def test_due_entries_join_the_back_of_their_tag_when_they_are_due(bench: Bench) -> None:
    bench.lead()
    now = datetime.now(timezone.utc)
    bench.send("a", "late", eta=(now + timedelta(hours=1)).isoformat())
    bench.send("a", "past", eta=(now - timedelta(hours=1)).isoformat())
    bench.send("a", "plain")
    node = bench.node("n")
    bench.admit()
    assert node.drain_all() == ["a-past", "a-plain"]
    ((member, due),) = bench.client.zrange(bench.queue_key("eta"), 0, -1, withscores=True)
    assert abs(due / 1000 - (now + timedelta(hours=1)).timestamp()) < 1
    promoted, left_ms, _ = bench.scripts.promote("q", bench.fence, 10)
    assert promoted == 0 and 3_590_000 < left_ms <= 3_600_000
    bench.client.zadd(bench.queue_key("eta"), {member: 1})
    assert bench.scripts.promote("q", bench.fence, 10) == (1, -1, 0)
    assert node.drain_all() == ["a-late"]


def test_due_times_of_any_zone_are_read_alike(bench: Bench) -> None:
    bench.lead()
    moment = datetime(2032, 2, 29, 23, 30, 15, 250_000, tzinfo=timezone.utc)
    for hours in (-11, 0, 5.5, 14):
        zone = timezone(timedelta(hours=hours))
        bench.send("a", hours, eta=moment.astimezone(zone).isoformat())
    bench.send("a", "Z", eta=moment.isoformat().replace("+00:00", "Z"))
    bench.admit_all()
    scores = {s for _, s in bench.client.zrange(bench.queue_key("eta"), 0, -1, withscores=True)}
    assert scores == {int(moment.timestamp() * 1000)}


def test_with_concurrency_nothing_is_dispatched_past_an_entry_that_has_not_started(
    bench: Bench,
) -> None:
    node = bench.opening(*range(4), slots=4, concurrency=3)
    first = node.take()
    first.start()
    second = node.take()
    assert first.settle() == "batch", "a-1 has not started: a-2 must not overtake it"
    assert node.receive() is None
    bench.send("a", 9)
    bench.admit()
    assert node.receive() is None
    leases = bench.client.hget(bench.queue_key("c"), "leases")
    assert leases == b"2", "no lease is opened in vain either"
    assert second.start() == 1
    assert node.take().id == "a-2"
