"""What a queue's settings change: batches by time, lost tasks, ordered retries, warm slots, no tag."""

from __future__ import annotations

import pytest

from celery_affinity.intake import Intake, no_tag
from harness import wait_until

from .conftest import Bench, Copy, Node

# max_batch_seconds


def test_a_lease_passes_on_after_its_seconds_while_another_tag_waits(bench: Bench) -> None:
    bench.lead(batch=100, batch_ms=1)
    node = bench.node("n")
    bench.send("a", 1, 2)
    bench.send("b", 1)
    bench.admit_all()
    first = node.take()
    began = bench.now_ms()
    wait_until(lambda: bench.now_ms() > began + 2, what="the end of its share")
    assert first.run() == "batch"
    assert node.drain_all() == ["b-1", "a-2"]


def test_a_lease_goes_on_past_its_seconds_while_no_tag_waits(bench: Bench) -> None:
    node = bench.opening(1, 2, batch=100, batch_ms=1)
    first = node.take()
    began = bench.now_ms()
    wait_until(lambda: bench.now_ms() > began + 2, what="the end of its share")
    assert first.run() == "held"


def test_a_lease_keeps_its_share_until_its_seconds_are_over(bench: Bench) -> None:
    bench.lead(batch=100, batch_ms=60_000)
    node = bench.node("n")
    bench.send("a", 1, 2)
    bench.send("b", 1)
    bench.admit_all()
    assert node.take().run() == "held"


# on_lost


def test_a_started_task_is_buried_when_its_process_is_lost_if_it_must_not_run_again(
    bench: Bench,
) -> None:
    node = bench.opening(1, 2, depth=2, bury_lost=1)
    running = node.take()
    running.start()
    assert running.lost() == "buried"
    assert "on_lost" in bench.dead()[0]["reason"]
    assert bench.scripts.untold("q", 10) == [], "its parent tells"
    assert node.take().id == "a-2", "what was behind it had not started: its copy is stale"
    assert node.drain_all() == ["a-2"]


def test_what_a_lost_worker_had_started_is_buried_and_the_leader_is_to_tell(bench: Bench) -> None:
    node = bench.opening(1, 2, depth=2, bury_lost=1)
    node.take().start()
    bench.overdue("n")
    wait_until(lambda: bench.scripts.rescue("q", bench.fence, 10)[0] == 1, what="the rescue")
    assert [dead["attempts"] for dead in bench.dead()] == [1]
    ((entry, reason, message),) = bench.scripts.untold("q", 10)
    assert "on_lost" in reason and b"a-1" in message
    assert bench.backlog("a") == [2]
    assert bench.promote()[2] == 1
    assert bench.scripts.told("q", "another 1", [entry]) == -1, "only the leader"
    assert bench.scripts.told("q", bench.fence, [entry]) == 1
    assert bench.scripts.told("q", bench.fence, [entry]) == 0
    assert bench.promote()[2] == 0


# ordered_retries


def test_an_ordered_retry_runs_before_what_waits_behind_it(bench: Bench) -> None:
    node = bench.opening(1, 2, 3, depth=2, ordered=60_000)
    first, second = node.take(), node.take()
    first.start()
    assert first.settle("done", bench.retry_of(first), "") == "held"
    assert second.start() < 0, "it was given back: the retry comes first"
    assert node.drain_all() == ["a-1", "a-2", "a-3"]
    assert not bench.client.exists(bench.queue_key("retrying"))


def test_a_tag_waits_for_its_ordered_retry_and_its_slot_does_not(bench: Bench) -> None:
    bench.lead(ordered=60_000)
    node = bench.node("n")
    bench.send("a", 1, 2)
    bench.send("b", 1)
    bench.admit_all()
    first = node.take()
    first.start()
    due = bench.now_ms() + 200
    assert first.settle("done", bench.retry_of(first), due) == "retry"
    assert node.drain_all() == ["b-1"]
    bench.send("a", 3)
    bench.admit_all()
    left = bench.promote()[1]
    assert node.receive() is None or bench.now_ms() >= due
    assert not bench.client.exists(bench.queue_key("ring")), "nor does it stand in the ring"
    assert 0 < left <= 200 or bench.now_ms() >= due

    def promoted() -> bool:
        bench.promote()
        return bool(bench.client.llen(node.list))

    wait_until(promoted, what="the retry's due time")
    assert bench.now_ms() >= due
    assert node.drain_all() == ["a-1", "a-2", "a-3"]
    assert not bench.client.exists(bench.queue_key("hold"))


@pytest.mark.parametrize("bound", [0, 1_000])
def test_a_retry_that_would_hold_its_tag_for_too_long_goes_to_the_end(
    bench: Bench, bound: int
) -> None:
    node = bench.opening(1, 2, ordered=bound)
    first = node.take()
    first.start()
    assert first.settle("done", bench.retry_of(first), bench.now_ms() + 1_050) == "held"
    assert node.take().id == "a-2"


def test_an_ordered_retry_counts_the_time_since_its_first_one(bench: Bench) -> None:
    node = bench.opening(1, 2, ordered=50)
    first = node.take()
    first.start()
    began = bench.now_ms()
    first.settle("done", bench.retry_of(first), "")
    again = node.take()
    assert again.id == "a-1" and again.start() == 1
    wait_until(lambda: bench.now_ms() > began + 60, what="the bound")
    again.settle("done", bench.retry_of(again), "")
    assert node.drain_all() == ["a-2", "a-1"]


def test_with_more_concurrency_nothing_of_a_tag_starts_past_its_ordered_retry(bench: Bench) -> None:
    node = bench.opening(1, 2, 3, slots=3, concurrency=3, ordered=60_000)
    first = node.take()
    first.start()
    second = node.take()
    second.start()
    first.settle("done", bench.retry_of(first), bench.now_ms() + 30_000)
    third = node.take()  # it was on its way when the retry came
    assert third.start() == 1
    bench.send("a", 4)
    bench.admit_all()
    second.settle()
    third.settle()
    assert node.receive() is None


def test_evacuation_ends_the_wait_for_an_ordered_retry(bench: Bench) -> None:
    node = bench.opening(1, 2, ordered=60_000)
    first = node.take()
    first.start()
    first.settle("done", bench.retry_of(first), bench.now_ms() + 30_000)
    assert bench.scripts.evacuate("q", bench.pending, [1, 2]) == (0, 0, 2, True)
    left = {key for key in ("hold", "retrying", "ring") if bench.client.exists(bench.queue_key(key))}
    assert left == set()


# warm_wait


def warmed(bench: Bench, **limits: int) -> Node:
    """A node that has run the tag "a", and waits for more of it."""
    bench.lead(**limits)  # type: ignore[arg-type]
    warm = bench.node("warm")
    bench.send("a", 1)
    bench.admit_all()
    assert warm.drain_all() == ["a-1"]
    return warm


def test_a_tag_waits_for_the_slot_that_had_it_while_another_one_is_free(bench: Bench) -> None:
    warm = warmed(bench, warm_wait=60_000)
    bench.send("b", 1)
    bench.admit_all()
    busy = warm.take()
    busy.start()
    other = bench.node("other")
    bench.send("a", 2)
    bench.send("c", 1)
    bench.admit_all()
    assert other.drain_all() == ["c-1"], "a tag behind it is not held up"
    assert 0 < bench.promote()[1] <= 60_000, "the leader knows how long"
    busy.settle()
    assert warm.drain_all() == ["a-2"]
    assert not bench.client.exists(bench.queue_key("since"))


def test_a_tag_does_not_wait_longer_than_it_may(bench: Bench) -> None:
    warm = warmed(bench, warm_wait=50)
    bench.send("b", 1)
    bench.admit_all()
    warm.take().start()
    other = bench.node("other")
    began = bench.now_ms()
    bench.send("a", 2)
    bench.admit_all()

    def dispatched() -> bool:
        bench.promote()
        return bool(bench.client.llen(other.list))

    wait_until(dispatched, what="the end of its patience")
    assert bench.now_ms() - began >= 50
    assert not bench.client.exists(bench.queue_key("since"))


def test_a_tag_does_not_wait_for_a_slot_that_is_gone(bench: Bench) -> None:
    warmed(bench, warm_wait=60_000)
    bench.scripts.leave("warm")
    other = bench.node("other")
    bench.send("a", 2)
    bench.admit_all()
    assert other.drain_all() == ["a-2"]


def test_without_warm_wait_a_tag_waits_for_nobody(bench: Bench) -> None:
    warm = warmed(bench)
    bench.send("b", 1)
    bench.admit_all()
    warm.take().start()
    other = bench.node("other")
    bench.send("a", 2)
    bench.admit_all()
    assert other.drain_all() == ["a-2"]


# untagged


def test_untagged_messages_are_each_a_tag_of_their_own_where_that_is_wanted(bench: Bench) -> None:
    bench.lead()
    node = bench.node("n", slots=3)
    for one in ("x", "y", "z"):
        bench.send_untagged(one)
    intake = Intake(bench.scripts, "q", [bench.pending], no_tag, True)
    while intake.run(bench.fence)[1]:
        pass
    copies = [node.take() for _ in range(3)]
    assert [copy.tag for copy in copies] == ["untagged:x", "untagged:y", "untagged:z"]
    assert [copy.run() for copy in copies] == ["empty"] * 3
    assert not bench.client.exists(bench.queue_key("warm")), "none of them comes back"


def test_untagged_messages_are_buried_where_it_is_not(bench: Bench) -> None:
    bench.lead()
    bench.send_untagged("x")
    bench.admit_all()
    assert "without the header 'identify_tag'" in bench.dead()[0]["reason"]


# Tasks that a worker does not know


def test_an_unknown_task_goes_to_a_worker_that_may_know_it_and_keeps_its_place(
    bench: Bench,
) -> None:
    bench.lead()
    old = bench.node("old", depth=2)
    bench.send("a", 1, 2, 3)
    bench.admit_all()
    first = old.take()
    new = bench.node("new")
    assert first.discard("unknown", "t") == 2
    assert first.discard("unknown", "t") == 2, "a repeat changes nothing, and is answered as before"
    assert new.drain_all() == ["a-1", "a-2", "a-3"]
    assert not bench.client.exists(bench.queue_key("needs"))
    assert bench.dead() == []


def test_an_unknown_task_waits_for_a_busy_worker_rather_than_try_the_same_one_again(
    bench: Bench,
) -> None:
    bench.lead()
    old, new = bench.node("old"), bench.node("new")
    bench.send("b", 1)
    bench.admit_all()
    busy = (old.receive() or new.take())
    busy.start()
    bench.send("a", 1)
    bench.admit_all()
    idle = new if busy.node is old else old
    assert idle.take().discard("unknown", "t") == 2
    assert idle.receive() is None
    bench.send("c", 1)
    bench.admit_all()
    assert idle.drain_all() == ["c-1"], "other tags are not held up"
    assert bench.client.hget(bench.queue_key("c"), "leases") == b"3", "nor is it leased in vain"
    busy.settle()
    assert busy.node.drain_all() == ["a-1"]


def test_a_task_that_no_worker_knows_is_buried(bench: Bench) -> None:
    bench.lead()
    nodes = {name: bench.node(name) for name in ("n1", "n2", "n3")}
    bench.send("a", 1, 2)
    bench.admit_all()
    verdicts = []
    for _ in range(4):
        copy = next(c for node in nodes.values() if (c := node.receive()))
        verdicts.append(copy.discard("unknown", "t"))
    assert verdicts == [2, 2, 1, 1], "the last one has nobody to hand it on to"
    assert [dead["reason"] for dead in bench.dead()] == ["unknown task t"] * 2
    assert bench.scripts.untold("q", 10) == [], "the worker tells"


def test_a_worker_that_comes_later_gets_what_the_others_do_not_know(bench: Bench) -> None:
    bench.lead()
    old, newer = bench.node("old"), bench.node("newer")
    bench.send("b", 1)
    bench.send("a", 1)
    bench.admit_all()
    first, second = sorted((old.take(), newer.take()), key=lambda copy: copy.tag)
    second.start()  # b runs, so only its worker is left to try
    assert first.discard("unknown", "t") == 2
    newest = bench.node("newest")
    assert newest.drain_all() == ["a-1"]


@pytest.mark.parametrize("how", ["is rescued", "leaves"])
def test_an_unknown_task_is_buried_when_the_last_worker_that_might_know_it_is_gone(bench: Bench, how: str) -> None:
    """Its tag waited for that worker, for ever."""
    bench.lead()
    idle, busy = bench.node("idle"), bench.node("busy")
    for tag in ("b", "c"):
        bench.send(tag, 1)
    bench.admit_all()
    running = busy.take()
    assert running.start() == 1
    assert idle.take().run() == "empty"
    bench.send("a", 1)
    bench.admit_all()
    assert idle.take().discard("unknown", "t") == 2, "the other one may know it"
    bench.promote()
    assert idle.receive() is None, "it waits for that one"
    if how == "leaves":
        bench.scripts.drain("busy")
        running.settle()
        bench.scripts.leave("busy")
    else:
        bench.overdue("busy")
        assert bench.scripts.rescue("q", bench.fence, 100)[0] == 1
        assert idle.take().id == running.id
        return_of = bench.client.hget(bench.queue_key("needs"), "a")
        assert return_of == b"t"
    bench.promote()
    assert bench.client.hget(bench.queue_key("needs"), "a") is None


def test_a_pass_asks_for_few_of_the_tags_that_wait_for_a_worker_that_knows_their_task(bench: Bench) -> None:
    bench.lead()
    for number in range(50):
        bench.node(f"w{number}")
        bench.client.sadd(bench.scripts.keys.worker(f"w{number}", "lacks"), *(f"t{one}" for one in range(20)))
    bench.client.hset(bench.queue_key("needs"), mapping={f"tag-{one}": f"t{one % 20}" for one in range(400)})
    bench.client.hset(bench.queue_key("conf"), "lacking", "0")

    def asked() -> int:
        stats = bench.client.info("commandstats")
        return int(stats.get("cmdstat_sismember", {}).get("calls", 0))

    before = asked()
    bench.promote()
    assert asked() - before <= 10 * 50
    wait_until(lambda: bench.promote() and not bench.client.exists(bench.queue_key("needs")), what="all of them")


def test_a_retry_on_hold_goes_on_when_retries_are_not_ordered_any_more(bench: Bench) -> None:
    """Nobody looked for it any more: its tag waited until a new task of it came, with another tag paused for ever."""
    bench.lead(ordered=60_000)
    node = bench.node("n")
    bench.send("a", 1, 2)
    bench.admit_all()
    first = node.take()
    assert first.start() == 1
    assert first.settle("done", bench.retry_of(first), bench.now_ms() + 20) == "retry"
    bench.lead(ordered=0)
    wait_until(lambda: bench.promote() and bench.client.llen(node.list) == 1, what="its dispatch")
    assert node.drain_all() == ["a-1", "a-2"]


# Many tags that no free slot may have now


def look_on(bench: Bench) -> int:
    """A leader's passes for as long as one asks for the next soon, at most to where they begin anew."""
    for step in range(1, 100):
        wait = bench.promote()[1]
        if not bench.client.exists(bench.queue_key("wake")) and not 0 <= wait < 500:
            return step
    raise AssertionError("it never comes to an end")


def is_looking(bench: Bench) -> bool:
    return bool(bench.client.hexists(bench.queue_key("conf"), "looked"))


def unknown(bench: Bench, tags: int, **limits: int) -> tuple[Copy, Node]:
    """What runs in a worker that knows all tasks, and one without work that lacks those of so many tags."""
    bench.lead(**limits)
    knows = bench.node("knows")
    bench.send("busy", 1)
    bench.admit_all()
    busy = knows.take()
    busy.start()
    lacks = bench.node("lacks")
    bench.client.sadd(bench.scripts.keys.worker("lacks", "lacks"), "t")
    bench.client.hset(bench.queue_key("conf"), "lacking", "1")
    for n in range(tags):
        bench.client.hset(bench.queue_key("needs"), f"u{n}", "t")
        bench.send(f"u{n}", 1)
    bench.admit_all()
    look_on(bench)
    assert lacks.receive() is None
    return busy, lacks


MANY = pytest.mark.parametrize("tags", [63, 64, 65, 99, 100, 101, 300])


@MANY
def test_many_tags_of_an_unknown_task_do_not_hold_up_one_that_comes(bench: Bench, tags: int) -> None:
    _, lacks = unknown(bench, tags)
    bench.send("c", 1, 2)
    bench.admit_all()
    look_on(bench)
    assert lacks.drain_all() == ["c-1", "c-2"]


@MANY
def test_many_tags_of_an_unknown_task_do_not_hold_up_one_that_waits_for_a_slot(
    bench: Bench, tags: int
) -> None:
    _, lacks = unknown(bench, tags)
    bench.send("c", 1)
    bench.admit_all()
    look_on(bench)
    first = lacks.take()
    first.start()
    bench.send("d", 1)
    bench.send("e", 1)
    bench.admit_all()
    first.settle()
    look_on(bench)
    second = lacks.take()
    assert (second.id, second.run()) == ("d-1", "empty"), "in the order of their places"
    look_on(bench)
    assert lacks.drain_all() == ["e-1"]
    look_on(bench)


@pytest.mark.parametrize("tags", [9, 10, 11, 100])
def test_many_tags_of_an_unknown_task_do_not_hold_up_a_tags_next_lease(bench: Bench, tags: int) -> None:
    _, lacks = unknown(bench, tags, own={"c": 2})  # type: ignore[arg-type]
    other = bench.node("other")
    bench.client.sadd(bench.scripts.keys.worker("other", "lacks"), "t")
    look_on(bench)
    while copy := other.receive():  # it was tried before its worker was known to lack the task
        copy.discard("unknown", "t")
    bench.send("c", 1, 2)
    bench.admit_all()
    look_on(bench)
    first = lacks.receive() or other.take()
    first.start()
    look_on(bench)
    assert (lacks.receive() or other.take()).id == "c-2"


def test_tags_of_an_unknown_task_keep_their_places_while_others_pass_them(bench: Bench) -> None:
    busy, lacks = unknown(bench, 150)
    bench.send("c", 1)
    bench.admit_all()
    look_on(bench)
    assert lacks.drain_all() == ["c-1"]
    busy.settle()
    assert busy.node.drain_all() == [f"u{n}-1" for n in range(150)]


@pytest.mark.parametrize("tags", [63, 64, 65, 99, 100, 101, 300])
def test_many_tags_that_wait_for_their_slot_do_not_hold_up_others(bench: Bench, tags: int) -> None:
    bench.lead(warm_wait=60_000, warm=1000)
    warm = bench.node("warm")
    bench.send("busy", 1)
    bench.admit_all()
    warm.take().start()
    free = bench.node("free")
    for n in range(tags):
        bench.client.hset(bench.queue_key("warm"), f"w{n}", "warm:0")
        bench.send(f"w{n}", 1)
    bench.send("c", 1)
    bench.admit_all()
    look_on(bench)
    assert free.drain_all() == ["c-1"]
    assert 0 < bench.promote()[1] <= 60_000, "it wakes up for the first of them"


def test_a_leader_looks_on_in_bounded_steps_and_rests_at_the_end_of_the_ring(bench: Bench) -> None:
    _, lacks = unknown(bench, 500)
    assert look_on(bench) in (5, 6), "100 in each"
    assert bench.promote()[1] == 50 and is_looking(bench), "then from the start"
    bench.client.delete(bench.queue_key("idle"))
    bench.promote()
    assert not is_looking(bench), "no slot is free"
    assert bench.promote()[1] == -1
    assert lacks.receive() is None


def test_a_leader_that_sees_all_of_the_ring_in_one_pass_does_not_look_again(bench: Bench) -> None:
    unknown(bench, 150)
    assert is_looking(bench)
    bench.client.zremrangebyrank(bench.queue_key("ring"), 60, -1)
    while is_looking(bench):
        assert bench.promote()[1] in (-1, 500)
    assert bench.promote()[1] == -1
    assert not bench.client.exists(bench.queue_key("wake"))


def test_a_slot_that_becomes_free_while_the_leader_looks_on_is_looked_for_from_the_start(
    bench: Bench,
) -> None:
    busy, lacks = unknown(bench, 300)
    bench.promote()
    assert is_looking(bench)
    busy.settle()
    assert busy.node.take().id == "u0-1", "the first of those that it may have"
    bench.send("c", 1)
    bench.admit_all()
    look_on(bench)
    assert lacks.take().id == "c-1"


@pytest.mark.parametrize("tags, rings", [(63, False), (64, True), (90, True)])
def test_a_slot_that_becomes_free_before_many_such_tags_rings_the_leaders_bell_once(
    bench: Bench, tags: int, rings: bool
) -> None:
    """Behind them may be one for it. The leader looks at all of them, and is quiet then."""
    unknown(bench, tags)
    assert not bench.client.exists(bench.queue_key("wake"))
    bench.scripts.occupy("lacks", 0, "ordinary")
    bench.scripts.vacate("lacks", "ordinary")
    assert bool(bench.client.exists(bench.queue_key("wake"))) == rings
    assert look_on(bench) == 1
    assert not bench.client.exists(bench.queue_key("wake"))


def test_none_of_a_queue_waits_for_ever_behind_many_such_tags_while_another_keeps_the_slot_busy(
    bench: Bench,
) -> None:
    bench.lead()
    fence_r, *nodes = bench.beside("r", slots=(1, 1), batch=1)
    bench.client.sadd(bench.scripts.keys.worker("n", "lacks"), "t")
    bench.client.hset(bench.queue_key("conf"), "lacking", "1")
    for tag in "xy":  # the other queue: always one that waits
        bench.send(tag, *range(100))
    while bench.scripts.admit("r", fence_r, [bench.pending], 200)[1]:
        pass
    for n in range(300):
        bench.client.hset(bench.queue_key("needs"), f"u{n}", "t")
        bench.send(f"u{n}", 1)
    bench.send("c", 1)
    bench.admit_all()
    bench.client.delete(bench.queue_key("wake"))
    ran: list[str] = []
    while "c-1" not in ran and len(ran) < 30:
        copy = next(copy for node in nodes if (copy := node.receive()))
        copy.run()
        ran.append(copy.id)
    assert "c-1" in ran, "no leader has helped"
    assert not bench.client.exists(bench.queue_key("wake")), "nor was one called: the slot was busy"


@pytest.mark.parametrize("tags", [64, 65, 150, 300])
def test_a_tag_goes_on_in_its_slot_while_only_such_tags_wait(bench: Bench, tags: int) -> None:
    _, lacks = unknown(bench, tags, batch=3)
    bench.send("c", *range(12))
    bench.admit_all()
    look_on(bench)
    for n in range(12):
        copy = lacks.receive()
        assert copy is not None, f"its slot stood still after {n}"
        assert copy.run() and copy.id == f"c-{n}"
