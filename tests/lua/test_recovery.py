"""Laws of nodes: what is lost, drained or cut off comes back to the head, in order."""

from __future__ import annotations

import pytest

from .conftest import Bench


def test_what_a_lost_worker_held_goes_back_to_the_head_in_order(bench: Bench) -> None:
    bench.lead()
    lost = bench.node("lost", depth=2, timeout_ms=0)
    bench.send("a", *range(6))
    bench.admit()
    first = lost.take()
    first.start()
    answer = bench.scripts.rescue("q", bench.fence, 50)
    assert answer[0] == 1 and answer[3] == 2
    node = bench.node("n")
    assert node.drain_all() == [f"a-{n}" for n in range(6)]
    assert first.settle() == "stale"


def test_a_worker_whose_heartbeat_is_not_overdue_is_not_rescued(bench: Bench) -> None:
    bench.lead()
    bench.node("n", timeout_ms=5000)
    answer = bench.scripts.rescue("q", bench.fence, 50)
    assert answer[0] == 0 and 4000 < answer[1] <= 5000


def test_a_rescue_in_steps_gives_back_all_of_it(bench: Bench) -> None:
    bench.lead()
    bench.node("lost", slots=5, timeout_ms=0)
    for tag in "abcde":
        bench.send(tag, 1, 2)
    bench.admit()
    steps = 0
    while bench.scripts.rescue("q", bench.fence, 2)[0] == 1:
        steps += 1
    assert steps == 3
    node = bench.node("n", slots=5)
    assert sorted(node.drain_all()) == sorted(f"{t}-{n}" for t in "abcde" for n in (1, 2))


def lose_two_leases_of_a_tag(bench: Bench) -> None:
    """A worker "lost" runs a-1 in its slot 1 and a-2 in its slot 0; a-3 waits."""
    bench.lead(concurrency=2)
    lost = bench.node("lost", slots=2)
    bench.send("o", 1)
    bench.admit_all()
    other = lost.take()
    other.start()
    bench.send("a", 1, 2, 3)
    bench.admit_all()
    one = lost.take()
    one.start()
    other.settle()
    two = lost.take()
    two.start()
    assert [(c.id, c.stamp.slot) for c in (one, two)] == [("a-1", 1), ("a-2", 0)]


@pytest.mark.parametrize("how", ["rescued", "left"])
def test_two_leases_of_a_tag_are_given_back_in_one_step_so_that_the_older_entry_is_first(
    bench: Bench, how: str
) -> None:
    lose_two_leases_of_a_tag(bench)
    alive = bench.node("alive")
    bench.overdue("lost")
    more = True
    while more:
        if how == "rescued":
            more = bool(bench.scripts.rescue("q", bench.fence, 1)[4])
        else:
            more = bool(bench.scripts._call("leave", "lost", 1)[1])
        bench.promote()  # or any other step that brings tags and slots together
    assert alive.drain_all() == ["a-1", "a-2", "a-3"]
    assert not bench.client.exists(bench.queue_key("held"), bench.queue_key("unst"))


def test_a_step_of_a_rescue_exceeds_its_leases_by_those_of_one_tag_at_most(bench: Bench) -> None:
    bench.lead(own={"a": 3})
    lost = bench.node("lost", slots=6)
    bench.send("a", *range(3))
    bench.send("b", 1)
    bench.send("c", 1)
    bench.send("d", 1)
    bench.admit_all()
    while copy := lost.receive():
        copy.start()
    bench.overdue("lost")
    most = 0
    while (answer := bench.scripts.rescue("q", bench.fence, 1))[0] == 1:
        most = max(most, answer[3])
    assert most == 3
    assert sorted(bench.node("alive").drain_all()) == ["a-0", "a-1", "a-2", "b-1", "c-1", "d-1"]


def test_a_rescue_that_its_leader_left_half_way_goes_on_at_once_under_the_next(bench: Bench) -> None:
    bench.lead()
    bench.node("lost", slots=2, timeout_ms=5000)
    for tag in "ab":
        bench.send(tag, 1)
    bench.admit()
    bench.overdue("lost")
    assert bench.scripts.rescue("q", bench.fence, 1)[4] == 1
    # The next one knows nothing of the time before: the heartbeats of all others count as new.
    assert bench.scripts.rebase("q", bench.fence)
    assert bench.scripts.rescue("q", bench.fence, 50)[:3:2] == [1, b"lost"]
    assert sorted(bench.node("n", slots=2).drain_all()) == ["a-1", "b-1"]


def test_the_dead_workers_warm_slot_is_not_offered_to_anybody(bench: Bench) -> None:
    bench.lead()
    lost = bench.node("lost")
    bench.send("a", 1)
    bench.admit()
    lost.drain_all()
    bench.overdue("lost")
    bench.scripts.rescue("q", bench.fence, 50)
    bench.send("a", 2)
    bench.admit()
    assert lost.receive() is None
    assert bench.node("n").drain_all() == ["a-2"]


def test_a_message_that_never_arrived_is_sent_again_and_its_older_copy_refused(
    bench: Bench,
) -> None:
    node = bench.opening(1)
    first = node.take()
    assert node.beat(1, grace_ms=60_000) == (True, 0, 0), "not before the grace is over"
    assert node.beat(2, [first]) == (True, 0, 0), "not while the node holds it"
    assert node.beat(3) == (True, 1, 0)
    assert node.beat(3) == (True, 0, 0), "a repeated beat counts once"
    second = node.take()
    assert first.start() == -2
    assert second.start() == 1


def test_a_message_that_still_waits_in_the_worker_queue_is_not_sent_again(bench: Bench) -> None:
    bench.lead()
    node = bench.node("n", slots=2)
    bench.send("a", 1)
    bench.send("b", 1)
    bench.admit()
    first = node.take()
    assert node.beat(1) == (True, 1, 0), "only the one that was taken and is not held"
    assert [node.take().id for _ in range(2)] == ["b-1", first.id]


def test_a_started_entry_that_two_beats_miss_is_taken_back(bench: Bench) -> None:
    bench.lead()
    node = bench.node("n", timeout_ms=0)  # beats may follow each other at once
    bench.send("a", 1)
    bench.admit()
    copy = node.take()
    bench.overdue("n", 60_000)
    copy.start()
    assert node.beat(1, [copy]) == (True, 0, 0)
    assert node.beat(2) == (True, 0, 0)
    assert node.beat(2) == (True, 0, 0), "a repeated beat counts once"
    assert node.beat(3, [copy]) == (True, 0, 0), "seen again: forgiven"
    assert node.beat(4) == (True, 0, 0)
    assert node.beat(5) == (True, 0, 1)
    again = node.take()
    assert (again.id, again.stamp.attempt) == ("a-1", 2)
    assert copy.settle() == "stale"
    bench.overdue("n", 60_000)
    assert again.run() == "empty"


def test_a_node_that_was_given_up_is_told_so(bench: Bench) -> None:
    bench.lead()
    node = bench.node("n", timeout_ms=0)
    bench.scripts.rescue("q", bench.fence, 50)
    assert node.beat(1) == (False, 0, 0)


def test_a_slot_that_still_runs_something_is_not_offered_at_a_new_registration(
    bench: Bench,
) -> None:
    bench.lead()
    bench.scripts.register(
        "n",
        name="n",
        depth=1,
        slots=2,
        queues=[("q", 2, bench.pending + "-w")],
        junk=[],
        role="worker",
        timeout_ms=60_000,
        busy=[0],
    )
    bench.send("a", 1)
    bench.send("b", 1)
    bench.admit()
    assert bench.client.llen(bench.pending + "-w") == 1
    assert bench.scripts.vacate("n", "slot:0")
    assert bench.client.llen(bench.pending + "-w") == 2


def test_a_draining_node_gives_back_what_has_not_started_and_gets_nothing(bench: Bench) -> None:
    bench.lead()
    node = bench.node("n", slots=2, depth=2)
    bench.send("a", *range(4))
    bench.send("b", *range(2))
    bench.admit()
    copies = {copy.id: copy for copy in iter(node.receive, None)}
    assert copies["a-0"].start() == 1
    assert bench.scripts.drain("n", 1) == 3
    assert bench.scripts.drain("n") == 0
    assert copies["b-0"].start() < 0 and copies["a-1"].start() < 0
    assert copies["a-0"].settle() == "drained"
    assert node.receive() is None
    assert bench.scripts.leave("n") == 0
    other = bench.node("m", slots=1)
    assert [i for i in other.drain_all() if i[0] == "a"] == ["a-1", "a-2", "a-3"]


def test_a_departed_worker_leaves_no_key(bench: Bench) -> None:
    bench.lead()
    node = bench.node("departing", slots=3, depth=2)
    for tag in "abcd":
        bench.send(tag, 1, 2, 3)
    bench.admit()
    node.take().start()
    bench.scripts.occupy("departing", None, "an ordinary task")
    bench.scripts.leave("departing")
    left = list(bench.client.scan_iter(match=f"{bench.scripts.keys.prefix}*departing*"))
    assert left == []
    assert bench.client.zcard(bench.scripts.keys.workers) == 0
    assert bench.client.hlen(bench.queue_key("held")) == 0
    assert bench.client.zcard(bench.queue_key("idle")) == 0


def test_an_idle_ledger_has_no_key_for_any_tag(bench: Bench) -> None:
    bench.lead(warm=0)
    node = bench.node("n", slots=3, depth=2)
    for tag in ("tag-x", "tag-y"):
        bench.send(tag, *range(25))
    bench.admit_all()
    node.drain_all()
    for key in bench.client.scan_iter(match=f"{bench.scripts.keys.prefix}*"):
        assert b"tag-" not in key
        assert b"tag-" not in (bench.client.dump(key) or b"")
    for name in ("m", "att", "held", "eta", "ring", "unst", "limits"):
        assert not bench.client.exists(bench.queue_key(name)), name


def test_an_ordinary_task_sends_its_slots_unstarted_lease_to_a_free_one(bench: Bench) -> None:
    bench.lead()
    node, other = bench.node("n"), bench.node("m")
    bench.send("a", 1, 2)
    bench.admit()
    if not bench.client.llen(node.list):
        node, other = other, node
    copy = node.take()
    bench.scripts.occupy(node.name, 0, "t")
    bench.scripts.occupy(node.name, 0, "t")
    assert copy.start() == -1
    assert other.drain_all() == ["a-1", "a-2"]
    bench.send("b", 1)
    bench.admit()
    assert other.drain_all() == ["b-1"], "an occupied slot gets no lease"
    assert bench.scripts.vacate(node.name, "t")
    assert not bench.scripts.vacate(node.name, "t")
    assert bench.client.zcard(bench.queue_key("idle")) == 2


def test_without_a_free_slot_an_unstarted_lease_waits_for_the_ordinary_task(bench: Bench) -> None:
    node = bench.opening(1)
    copy = node.take()
    bench.scripts.occupy("n", 0, "t")
    assert copy.start() == 1
    assert copy.settle() == "empty"
    assert bench.client.zcard(bench.queue_key("idle")) == 0, "its slot is still occupied"
    bench.scripts.vacate("n", "t")
    assert bench.client.zcard(bench.queue_key("idle")) == 1


def test_a_new_process_frees_its_slot_of_an_ordinary_task(bench: Bench) -> None:
    bench.lead()
    node = bench.node("n")
    bench.scripts.occupy("n", 0, "t")
    bench.send("a", 1)
    bench.admit()
    assert node.receive() is None
    assert bench.scripts.process_up("n", 0)
    assert node.drain_all() == ["a-1"]


def test_an_ordinary_task_in_a_full_pool_gets_the_next_slot_that_is_free(bench: Bench) -> None:
    node = bench.opening(1, slots=1)
    copy = node.take()
    copy.start()
    bench.scripts.occupy("n", None, "t")
    bench.send("b", 1)
    bench.admit()
    copy.settle()
    assert node.receive() is None
    bench.scripts.vacate("n", "t")
    assert node.take().id == "b-1"
