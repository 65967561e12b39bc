"""A running node changes the queues that it serves, or the number of its slots."""

from __future__ import annotations

from collections import Counter

import pytest

from .conftest import Bench, Node


def serve(bench: Bench, node: Node, change: int, slots: int, serves: bool = True) -> int | None:
    """Tell the ledger of a change, in the smallest steps."""
    queues = [("q", slots, node.list)] if serves else []
    return bench.scripts.serve(
        node.name, change, slots=slots, queues=queues, junk=[node.list], budget=1
    )


def send_and_admit(bench: Bench, tags: str, count: int = 3) -> None:
    for tag in tags:
        bench.send(tag, *range(count))
    bench.admit_all()


def test_a_queue_that_is_no_longer_served_gets_back_what_has_not_started_in_order(
    bench: Bench,
) -> None:
    bench.lead()
    node = bench.node("n", slots=3, depth=2)
    send_and_admit(bench, "abc")
    running = node.take()
    assert running.start() == 1

    back = serve(bench, node, 1, 3, serves=False)

    assert back == 5, "two of each lease were out, one of them runs"
    assert bench.client.llen(node.list) == 0, "no copy is left to arrive"
    assert [len(bench.backlog(tag)) for tag in "abc"] == [2, 3, 3]
    assert bench.backlog("b") == sorted(bench.backlog("b"))
    assert running.settle() == "drained", "what runs runs to its end, and nothing follows"
    assert bench.client.zcard(bench.queue_key("idle")) == 0
    other = bench.node("other", slots=1)
    assert sorted(other.drain_all()) == sorted(
        ["a-1", "a-2", *(f"{tag}-{n}" for tag in "bc" for n in range(3))]
    )


def test_what_waits_goes_to_another_node_at_once_when_one_stops_serving(bench: Bench) -> None:
    bench.lead()
    node, other = bench.node("n", slots=3), bench.node("other", slots=1)
    bench.scripts.occupy("other", 0, "ordinary")
    send_and_admit(bench, "abc", 1)
    bench.scripts.vacate("other", "ordinary")

    serve(bench, node, 1, 3, serves=False)

    assert len(other.drain_all()) == 3


def test_a_queue_that_is_served_anew_is_worked_on_at_once(bench: Bench) -> None:
    bench.lead()
    node = bench.node("n", slots=2)
    serve(bench, node, 1, 2, serves=False)
    send_and_admit(bench, "ab", 1)
    assert node.receive() is None

    serve(bench, node, 2, 2)

    assert sorted(node.drain_all()) == ["a-0", "b-0"]


def test_a_slot_that_went_gives_back_what_has_not_started_and_is_offered_no_more(
    bench: Bench,
) -> None:
    bench.lead()
    node = bench.node("n", slots=3)
    send_and_admit(bench, "abc", 2)
    copies = {copy.stamp.slot: copy for copy in (node.take() for _ in range(3))}
    assert copies[1].start() == copies[0].start() == 1

    assert serve(bench, node, 1, 1) == 1, "slot 2 gives back, slot 1 runs on"

    assert copies[2].start() == -1
    assert copies[1].settle() == "drained"
    assert node.receive() is None
    assert copies[0].settle() == "held"
    assert node.drain_all(), "slot 0 goes on"
    assert not bench.client.exists(bench.queue_key("m"))
    assert bench.client.zrange(bench.queue_key("idle"), 0, -1) == [b"n:0"]
    assert bench.client.smembers(bench.scripts.keys.worker("n", "idle")) == {b"0"}


def test_new_slots_take_work_and_ordinary_tasks_that_wait_for_one_come_first(bench: Bench) -> None:
    bench.lead()
    node = bench.node("n", slots=1)
    send_and_admit(bench, "abc", 1)
    assert node.take().start() == 1
    bench.scripts.occupy("n", None, "ordinary")  # in a full pool: it is owed a slot

    serve(bench, node, 1, 3)

    assert [copy.stamp.slot for copy in (node.take(),)] == [2], "slot 1 went to the ordinary task"
    assert node.receive() is None
    bench.scripts.vacate("n", "ordinary")
    assert node.take().stamp.slot == 1


def test_a_change_that_comes_late_changes_nothing_and_a_repeat_does_no_harm(bench: Bench) -> None:
    bench.lead()
    node = bench.node("n", slots=2)
    send_and_admit(bench, "ab", 2)
    copies = [node.take(), node.take()]
    assert serve(bench, node, 2, 3) == serve(bench, node, 2, 3) == 0

    assert serve(bench, node, 1, 1, serves=False) is None

    assert [copy.run() for copy in copies] == ["held", "held"]
    assert node.beat(1)[0]
    assert bench.scripts.heartbeat("n", "2", 0, [])[3] == 2, "beats tell which one is in force"


def test_a_node_that_was_given_up_is_told_so_and_registers_with_its_change(bench: Bench) -> None:
    bench.lead()
    node = bench.node("n", slots=2)
    bench.client.zadd(bench.scripts.keys.workers, {"n": 1})
    bench.scripts.rescue("q", bench.fence, 10)

    assert serve(bench, node, 3, 1) is None
    assert not bench.client.exists(bench.scripts.keys.worker("n", "info"))
    again = {"name": "n", "depth": 1, "slots": 1, "queues": [("q", 1, node.list)], "junk": [],
             "role": "worker", "timeout_ms": 60_000}
    assert bench.scripts.register("n", **again, change=3) == 3
    assert bench.scripts.register("n", **again, change=5) == 3, "a repeat says what is in force"
    assert bench.client.zcard(bench.queue_key("idle")) == 1


def test_a_draining_node_that_changes_is_offered_nothing(bench: Bench) -> None:
    bench.lead()
    node = bench.node("n", slots=1)
    bench.scripts.drain("n")
    serve(bench, node, 1, 4)
    assert not bench.client.exists(bench.queue_key("idle"))
    send_and_admit(bench, "ab", 1)
    assert node.receive() is None
    assert not bench.client.exists(bench.queue_key("idle"))


def test_slots_that_a_node_once_had_leave_no_key(bench: Bench) -> None:
    bench.lead()
    node = bench.node("n", slots=4)
    send_and_admit(bench, "abcd", 1)
    assert len(node.drain_all()) == 4
    serve(bench, node, 1, 1)
    bench.scripts.leave("n")
    assert not bench.client.keys("*:s:n:*")
    assert not bench.client.keys("*:w:n:*")


def test_an_unstarted_lease_behind_an_ordinary_task_moves_when_another_slot_can_take_it(
    bench: Bench,
) -> None:
    bench.lead(batch=2)
    node = bench.node("n", slots=2)
    send_and_admit(bench, "ab", 5)
    copies = {copy.stamp.slot: copy for copy in (node.take(), node.take())}
    stuck, busy = copies[0], copies[1]
    assert busy.start() == 1
    bench.scripts.occupy("n", 0, "long")

    node.beat(1, [stuck, busy], grace_ms=60_000)
    assert busy.settle() == "held", "nobody waits in the ring yet"
    next_one = node.take()
    node.beat(2, [stuck, next_one])

    assert stuck.start() == -1, "it was given back"
    assert next_one.run() == "batch"
    assert node.take().tag == stuck.tag, "and is next in the other slot"


def test_an_unstarted_lease_keeps_its_turn_where_every_slot_has_an_ordinary_task(
    bench: Bench,
) -> None:
    bench.lead()
    node = bench.node("n", slots=2)
    send_and_admit(bench, "ab", 1)
    copies = [node.take(), node.take()]
    for slot in range(2):
        bench.scripts.occupy("n", slot, f"long-{slot}")
    node.beat(1, copies)
    assert [copy.start() for copy in copies] == [1, 1]


@pytest.mark.parametrize("depth", [1, 2])
def test_two_queues_of_a_node_share_its_slots(bench: Bench, depth: int) -> None:
    bench.lead(batch=3)
    fence_p, *nodes = bench.beside("p", slots=(2, 2), batch=3, depth=depth)
    for tag in "abcd":
        bench.send(tag, *range(25))
    bench.admit_all()
    for tag in "abcd":
        bench.send(tag, *range(25))
    while bench.scripts.admit("p", fence_p, [bench.pending], 100)[1]:
        pass

    starts: Counter[str] = Counter()
    while sum(starts.values()) < 100:
        for q, node in zip("qp", nodes, strict=True):
            if copy := node.receive():
                assert copy.run() != "stale"
                starts[q] += 1
    assert 35 <= starts["q"] <= 65, starts


def test_a_lease_goes_on_while_what_waits_may_not_have_its_slot(bench: Bench) -> None:
    bench.lead(batch=3)
    fence_p, wide, narrow = bench.beside("p", slots=(2, 1), batch=3)
    for tag in "xy":
        bench.send(tag, 1)
    bench.scripts.admit("p", fence_p, [bench.pending], 100)
    holder = narrow.take()
    holder.start()
    send_and_admit(bench, "b", 8)
    epochs = []
    for _ in range(8):
        copy = wide.take()
        epochs.append(copy.stamp.epoch)
        assert copy.stamp.slot == 1
        copy.run()
    assert len(set(epochs)) == 1, "y waits for slot 0, so nothing is won by a new lease"
    holder.settle()
    assert narrow.take().id == "y-1"
