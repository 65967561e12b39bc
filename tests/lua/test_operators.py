"""Laws of what operators do to tags, queues and workers: order and exclusion hold, nothing is left behind."""

from __future__ import annotations

import json
import re
from datetime import datetime, timedelta, timezone
from typing import Any

import pytest
from celery import Celery

from celery_affinity import Affinity, AffinityQueue, steering
from celery_affinity.embedded import Server
from celery_affinity.operator_scripts import OperatorScripts
from harness import wait_until

from .conftest import Bench, Copy, Node


@pytest.fixture
def operator(bench: Bench) -> OperatorScripts:
    return OperatorScripts(bench.client, bench.scripts.keys)


def conf(bench: Bench) -> dict[str, str]:
    return {k.decode(): v.decode() for k, v in bench.client.hgetall(bench.queue_key("conf")).items()}


def live(node: Node) -> list[str]:
    """Run whatever may run of what is or will be dispatched; copies that were given back may not."""
    ran = []
    while copy := node.receive():
        if copy.start() == 1:
            copy.settle()
            ran.append(copy.id)
    return ran


def no_trace(bench: Bench, *names: str) -> None:
    assert not [name for name in names if bench.client.exists(bench.queue_key(name))]


def headers(bench: Bench) -> Any:
    def read(entries: Any) -> dict[int, Any]:
        raw = bench.client.hmget(bench.queue_key("m"), list(entries))
        return {e: json.loads(r)["headers"] for e, r in zip(entries, raw, strict=True) if r}

    return read


# pause and resume of a tag


@pytest.mark.parametrize("depth", [1, 2])
def test_a_paused_tag_starts_nothing_and_goes_on_in_order(
    bench: Bench, operator: OperatorScripts, depth: int
) -> None:
    bench.lead()
    node = bench.node("n", depth=depth)
    bench.send("a", 1, 2, 3)
    bench.send("b", 1)
    bench.admit_all()
    running = node.take()
    assert running.start() == 1
    assert operator.pause_tag("q", "a")
    assert not operator.pause_tag("q", "a"), "a repeat changes nothing"
    if depth == 2:
        assert node.take().start() < 0, "it had been dispatched: it went back"
    assert running.settle() == "halted"
    bench.send("a", 4)
    bench.admit_all()
    bench.promote()
    assert node.drain_all() == ["b-1"], "nor does it keep others from its slot"
    assert operator.resume_tag("q", "a")
    assert not operator.resume_tag("q", "a")
    assert node.drain_all() == ["a-2", "a-3", "a-4"]
    no_trace(bench, "halted", "hold", "later", "ring", "held")
    assert "halts" not in conf(bench), "and from then on it costs nothing"


def test_what_was_dispatched_to_a_paused_tag_and_not_started_never_starts_there(
    bench: Bench, operator: OperatorScripts
) -> None:
    bench.lead()
    node = bench.node("n")
    bench.send("a", 1)
    bench.admit_all()
    copy = node.take()
    operator.pause_tag("q", "a")
    assert copy.start() == -1
    assert bench.client.zcard(bench.queue_key("idle")) == 1, "its slot is free"
    operator.resume_tag("q", "a")
    assert node.drain_all() == ["a-1"]


def test_a_paused_tag_that_failed_goes_on_waiting_for_its_letter(
    bench: Bench, operator: OperatorScripts
) -> None:
    bench.lead(failure=1)
    node = bench.node("n")
    bench.send("a", 1, 2)
    bench.admit_all()
    copy = node.take()
    copy.start()
    operator.pause_tag("q", "a")
    assert copy.settle("failed", "boom", "traceback") == "halted"
    assert bench.scripts.requeue("q", "t", [1])[0] == 1
    assert node.receive() is None, "it is paused still"
    operator.resume_tag("q", "a")
    assert node.drain_all() == ["a-1", "a-2"]


@pytest.mark.parametrize("when", ["before", "while it runs"])
def test_an_ordered_retry_keeps_its_time_over_a_pause(
    bench: Bench, operator: OperatorScripts, when: str
) -> None:
    bench.lead(ordered=60_000)
    node = bench.node("n")
    bench.send("a", 1, 2)
    bench.admit_all()
    copy = node.take()
    copy.start()
    due = bench.now_ms() + 150
    if when == "while it runs":
        operator.pause_tag("q", "a")
    copy.settle("done", bench.retry_of(copy), due)
    operator.pause_tag("q", "a")
    operator.resume_tag("q", "a")
    assert node.receive() is None or bench.now_ms() >= due
    wait_until(lambda: bench.promote() and bench.client.llen(node.list), what="its due time")
    assert bench.now_ms() >= due
    assert node.drain_all() == ["a-1", "a-2"]
    no_trace(bench, "later", "hold", "halted")


# pause and resume of a queue


def test_a_paused_queue_takes_in_and_dispatches_nothing(
    bench: Bench, operator: OperatorScripts
) -> None:
    bench.lead()
    node = bench.node("n", slots=3, depth=2)
    bench.send("a", 1, 2, 3)
    bench.send("b", 1)
    bench.admit_all()
    first = next(copy for copy in iter(node.receive, None) if copy.id == "a-1")
    assert first.start() == 1
    assert operator.pause("q") == 2, "a-2 and b-1 had not started"
    assert operator.pause("q") == 0
    bench.send("c", 1)
    assert bench.admit()[0] == 1
    assert first.settle() == "batch"
    bench.lead(candidate="leader/1")
    bench.promote()
    assert live(node) == [], "what lies in its queue is refused"
    assert bench.scripts.resume("q")
    assert sorted(live(node)) == ["a-2", "a-3", "b-1", "c-1"]
    assert "paused" not in conf(bench)


def test_the_leases_of_other_queues_are_not_cut_short_by_a_paused_one(
    bench: Bench, operator: OperatorScripts
) -> None:
    bench.lead(batch=1)
    bench.scripts.claim("p", "leader/1", 60_000)
    bench.scripts.register(
        "n", name="n@test", depth=1, slots=1, role="worker", timeout_ms=60_000, junk=[],
        queues=[("q", 1, bench.scripts.keys.prefix + "wq-n"), ("p", 1, "other")],
    )  # fmt: skip
    operator.pause("p")
    bench.client.zadd(bench.scripts.keys.queue("p", "ring"), {"waits": 1})
    bench.send("a", 1, 2)
    bench.admit_all()
    assert Node(bench, "n", bench.scripts.keys.prefix + "wq-n").take().run() == "held"


# limit


def running(bench: Bench, copies: list[Copy]) -> list[str]:
    return [copy.id for copy in copies if copy.start() == 1]


def test_a_raised_limit_lets_more_start_at_once_in_order(
    bench: Bench, operator: OperatorScripts
) -> None:
    bench.lead()
    node = bench.node("n", slots=3, depth=2)
    bench.send("a", 1, 2, 3, 4)
    bench.admit_all()
    first, second = node.take(), node.take()
    first.start()
    assert operator.limit("q", "a", 3, "set") == (True, 2)
    assert second.start() < 0, "it comes again, before what another slot gets"
    third = node.take()
    assert third.id == "a-2"
    assert node.receive() is None, "the next goes out when that has started"
    assert third.start() == 1
    fourth = node.take()
    assert (fourth.id, fourth.start()) == ("a-3", 1)
    assert node.receive() is None, "three run"
    assert operator.limit("q", "a", 3, "set") == (True, 3), "a repeat"
    assert node.receive() is None
    first.settle()
    assert node.take().id == "a-4"


def test_a_lowered_limit_lets_what_runs_end_and_starts_nothing_before(
    bench: Bench, operator: OperatorScripts
) -> None:
    bench.lead(concurrency=3)
    node = bench.node("n", slots=3)
    bench.send("a", 1, 2, 3, 4, 5)
    bench.admit_all()
    copies = []
    for _ in range(3):
        copy = node.take()
        assert copy.start() == 1
        copies.append(copy)
    operator.limit("q", "a", 1, "set")
    bench.send("a", 6)
    bench.admit_all()
    assert [copies[0].settle(), copies[2].settle()] == ["batch", "batch"]
    assert node.receive() is None, "one runs still"
    assert copies[1].settle() == "batch"
    assert node.drain_all() == ["a-4", "a-5", "a-6"]
    no_trace(bench, "held", "unst", "ring")


def test_what_is_given_back_after_a_limit_was_lowered_keeps_its_order(
    bench: Bench, operator: OperatorScripts
) -> None:
    bench.lead(concurrency=8)
    node = bench.node("n", slots=8)
    bench.send("a", *range(1, 11))
    bench.admit_all()
    copies = []
    for _ in range(8):
        copy = node.take()
        assert copy.start() == 1
        copies.append(copy)
    operator.limit("q", "a", 1, "set")
    for copy in copies:
        assert copy.lost() == "requeued"
    assert bench.backlog("a")[-9:] == list(range(2, 11)), "the first is out again"
    assert node.drain_all() == [f"a-{n}" for n in range(1, 11)]


def test_an_operators_limit_outlives_a_leader_until_it_is_taken_back(
    bench: Bench, operator: OperatorScripts
) -> None:
    bench.lead(own={"b": 2})
    operator.limit("q", "a", 5, "set")
    operator.limit("q", "b", 7, "set")
    bench.lead(own={"b": 2})
    limits = bench.client.hgetall(bench.queue_key("limits"))
    assert limits == {b"a": b"5", b"b": b"7"}
    operator.limit("q", "a", 1, "default")
    operator.limit("q", "b", 2, "mapped")
    assert bench.client.hgetall(bench.queue_key("limits")) == {b"b": b"2"}
    bench.lead()
    assert conf(bench)["mapped"] == "0"
    no_trace(bench, "set", "limits")


def test_no_more_than_a_thousand_tags_are_limited(bench: Bench, operator: OperatorScripts) -> None:
    bench.client.hset(bench.queue_key("set"), mapping={f"t{n}": "2" for n in range(1000)})
    assert operator.limit("q", "one-more", 2, "set") == (False, 1000)
    assert operator.limit("q", "t7", 3, "set")[0], "one of them may be changed"


# move


def test_a_moved_tag_goes_on_in_the_other_worker_after_its_running_task(
    bench: Bench, operator: OperatorScripts
) -> None:
    bench.lead()
    one, two = bench.node("one", depth=2), bench.node("two", depth=2)
    bench.send("a", 1, 2, 3)
    bench.admit_all()
    copy = one.take()
    copy.start()
    assert operator.move("q", "a", "two", 60) == 1
    assert operator.move("q", "a", "two", 60) == 1, "a repeat"
    assert one.take().start() < 0, "what had not started went back"
    assert two.receive() is None, "what runs runs to its end"
    assert copy.settle() == "batch"
    assert one.receive() is None
    assert two.drain_all() == ["a-2", "a-3"]
    no_trace(bench, "moves", "held", "ring")
    assert "moving" not in conf(bench)
    bench.send("a", 4)
    bench.admit_all()
    assert two.drain_all() == ["a-4"], "it is warm there"


def test_a_moved_tag_waits_for_a_busy_worker_and_keeps_nobody_from_other_slots(
    bench: Bench, operator: OperatorScripts
) -> None:
    bench.lead(batch=1, warm_wait=60_000)
    one, two = bench.node("one"), bench.node("two")
    bench.send("busy", 1)
    bench.admit_all()
    holder = next(node for node in (one, two) if bench.client.llen(node.list))
    other = one if holder is two else two
    busy = holder.take()
    busy.start()
    bench.client.hset(bench.queue_key("warm"), "a", f"{other.name}:0")
    bench.send("a", 1)
    operator.move("q", "a", holder.name, 60)
    for tag in "abcde":
        bench.send(tag, 2)
    bench.admit_all()
    for tag in "bc":
        copy = other.take()
        assert (copy.id, copy.run()) == (f"{tag}-2", "empty")
    busy.settle()
    assert holder.take().id == "a-1", "it has kept its place before e"


def held_twice(bench: Bench, slots: int = 1) -> tuple[Copy, Copy]:
    """A tag with two leases: a-1 runs on "one", a-2 is dispatched to "two"; two more wait."""
    bench.lead(concurrency=2)
    one = bench.node("one", slots=slots)
    if slots > 1:
        bench.scripts.occupy("one", 1, "ordinary")
    bench.send("a", 1, 2, 3, 4)
    bench.admit_all()
    first = one.take()
    first.start()
    return first, bench.node("two").take()


def test_a_move_of_a_tag_with_two_leases_ends_with_the_other_workers_lease(
    bench: Bench, operator: OperatorScripts
) -> None:
    first, second = held_twice(bench)
    second.start()
    assert operator.move("q", "a", "one", 3600) == 1
    first.settle()
    third = first.node.take()
    third.start()
    assert "moving" in conf(bench), "the other worker holds it"
    assert second.settle() == "batch"
    no_trace(bench, "moves")
    assert "moving" not in conf(bench)
    assert second.node.take().id == "a-4", "it has both of its slots again"


def test_a_move_to_where_a_tag_runs_already_takes_what_has_not_started_elsewhere_there(
    bench: Bench, operator: OperatorScripts
) -> None:
    first, second = held_twice(bench, slots=2)
    bench.scripts.vacate("one", "ordinary")
    assert operator.move("q", "a", "one", 3600) == 1
    assert second.start() < 0
    assert second.node.receive() is None
    assert first.node.take().id == "a-2"
    no_trace(bench, "moves")


def test_a_move_to_where_a_tag_runs_already_is_over_at_once_if_no_slot_there_is_free(
    bench: Bench, operator: OperatorScripts
) -> None:
    _, second = held_twice(bench)
    assert operator.move("q", "a", "one", 3600) == 1
    assert second.start() < 0
    no_trace(bench, "moves")
    assert second.node.take().id == "a-2", "nobody else may use that slot meanwhile"


def test_a_move_waits_for_its_worker_when_the_last_lease_elsewhere_ends(
    bench: Bench, operator: OperatorScripts
) -> None:
    first, second = held_twice(bench)
    second.start()
    bench.node("three")
    bench.scripts.occupy("three", 0, "ordinary")
    assert operator.move("q", "a", "three", 3600) == 1
    assert first.settle() == second.settle() == "batch"
    assert (first.node.receive(), second.node.receive()) == (None, None)
    bench.scripts.vacate("three", "ordinary")
    assert Node(bench, "three", f"{bench.scripts.keys.prefix}wq-three").take().id == "a-3"
    no_trace(bench, "moves")


def test_a_move_to_a_worker_that_stops_is_forgotten(bench: Bench, operator: OperatorScripts) -> None:
    bench.lead()
    one, two = bench.node("one"), bench.node("two")
    bench.send("x", 1)
    bench.send("y", 1)
    bench.admit_all()
    copies = {copy.node.name: copy for copy in (one.take(), two.take())}
    for copy in copies.values():
        copy.start()
    bench.send("a", 1)
    bench.admit_all()
    operator.move("q", "a", "two", 60)
    copies["one"].settle()
    assert one.receive() is None, "it waits for the other"
    bench.scripts.drain("two")
    assert one.drain_all() == ["a-1"]
    assert operator.move("q", "a", "two", 60) == -1
    assert operator.move("q", "a", "nobody", 60) == -1


def test_a_move_ends_with_its_time(bench: Bench, operator: OperatorScripts) -> None:
    bench.lead()
    one, two = bench.node("one"), bench.node("two")
    bench.send("x", 1)
    bench.send("y", 1)
    bench.admit_all()
    for node in (one, two):
        node.take().start()
    bench.send("a", 1)
    bench.admit_all()
    operator.move("q", "a", "two", 0.05)
    operator.move("q", "another", "two", 60)
    three = bench.node("three")
    wait_until(lambda: bench.promote() and bench.client.llen(three.list), what="the end of the move")


def test_at_most_thirty_two_moves_are_under_way(bench: Bench, operator: OperatorScripts) -> None:
    bench.lead()
    bench.node("n")
    assert {operator.move("q", f"t{n}", "n", 60) for n in range(32)} == {1}
    assert operator.move("q", "one-more", "n", 60) == -2
    assert operator.move("q", "t5", "n", 60) == 1


# purge and revoke


def waiting_with_due(bench: Bench, count: int) -> Any:
    bench.send("a", *range(1, count + 1))
    bench.send("a", "due", eta="2100-01-01T00:00:00+00:00")
    bench.send("b", 1)
    bench.admit_all()
    return [count + 1]


def test_a_purge_deletes_what_waits_in_steps_and_nothing_else(
    bench: Bench, operator: OperatorScripts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(steering, "BATCH", 7)
    bench.lead()
    node = bench.node("n", depth=2)
    due = waiting_with_due(bench, 40)
    running = node.take()
    running.start()
    assert steering.purge(operator, "q", "a", due) == 40, "39 that waited and one that was due later"
    assert running.settle() in ("empty", "held")
    assert live(node) == ["b-1"]
    no_trace(bench, "m", "ring", "held", "eta", "big")
    assert bench.client.hget(bench.queue_key("c"), "purged") == b"40"


def test_a_purge_cut_off_half_way_is_finished_by_a_repeat(
    bench: Bench, operator: OperatorScripts
) -> None:
    bench.lead()
    waiting_with_due(bench, 20)
    first = operator.purge_tag("q", "token", "a", 20, 5)
    assert first == (5, True)
    assert operator.purge_tag("q", "token", "a", 20, 5) == first, "a lost reply deletes nothing more"
    assert bench.backlog("a") == list(range(6, 21))
    assert steering.purge(operator, "q", "a", [21]) == 16


def test_what_comes_during_a_purge_stays(bench: Bench, operator: OperatorScripts) -> None:
    bench.lead()
    bench.send("a", 1, 2)
    bench.admit_all()
    bench.send("a", 3)
    bench.admit_all()
    assert operator.purge_tag("q", "t", "a", 2, 100) == (2, False)
    assert bench.node("n").drain_all() == ["a-3"]


def test_a_purged_tag_stays_paused_and_one_that_waited_for_its_retry_does_not(
    bench: Bench, operator: OperatorScripts
) -> None:
    bench.lead(ordered=600_000)
    node = bench.node("n")
    bench.send("a", 1)
    bench.send("r", 1)
    bench.admit_all()
    operator.pause_tag("q", "a")
    copy = next(c for c in iter(node.receive, None) if c.tag == "r")
    copy.start()
    copy.settle("done", bench.retry_of(copy), bench.now_ms() + 500_000)
    assert steering.purge(operator, "q", "a", []) == steering.purge(operator, "q", "r", []) == 1
    bench.send("a", 2)
    bench.send("r", 2)
    bench.admit_all()
    assert node.drain_all() == ["r-2"]
    operator.resume_tag("q", "a")
    assert node.drain_all() == ["a-2"]
    no_trace(bench, "hold", "halted", "retrying", "later")


def test_a_revoked_tag_goes_out_with_the_note_and_what_comes_later_without(
    bench: Bench, operator: OperatorScripts
) -> None:
    bench.lead()
    node = bench.node("n", depth=2)
    due = waiting_with_due(bench, 4)
    first = node.take()
    first.start()
    count = steering.revoke(operator, "q", "a", lambda: due, headers(bench))
    assert count == 4
    bench.send("a", 9)
    bench.admit_all()
    assert first.settle("done", bench.retry_of(first), "") == "held", "what ran was left alone"
    noted = {}
    while (raw := bench.client.rpop(node.list)) is not None:
        found = json.loads(raw)["headers"]
        entry, epoch, send, inc, slot = found["affinity_stamp"].split(" ")[:5]
        noted[found["id"]] = bool(found.get("affinity_revoked"))
        bench.scripts.discard(inc, int(slot), entry, epoch, send, "settle")
    assert noted == {"a-1": True, "a-2": True, "a-3": True, "a-4": True, "a-9": False, "b-1": False}
    assert bench.client.zscore(bench.scripts.keys.prefix + "revoked", "a-due")


def test_a_task_that_becomes_due_while_its_tag_is_revoked_is_revoked(bench: Bench) -> None:
    """It has a new number then: neither was it among the tag's entries, nor among those that are due later."""

    class Slow(OperatorScripts):
        def revoke_tag(self, state: str, tag: str) -> tuple[int, list[int]] | None:
            answer = super().revoke_tag(state, tag)
            wait_until(lambda: bench.promote()[0] == 1, what="that it is due")
            return answer

    bench.lead()
    soon = datetime.now(timezone.utc) + timedelta(seconds=0.3)
    bench.send("a", 1, eta=soon.isoformat())
    bench.admit_all()

    def due() -> list[int]:
        return [int(member.split(b":")[0]) for member in bench.client.zrange(bench.queue_key("eta"), 0, -1)]

    operator = Slow(bench.client, bench.scripts.keys)
    assert steering.revoke(operator, "q", "a", due, headers(bench)) == 1
    node = bench.node("n")
    (sent,) = bench.client.lrange(node.list, 0, -1)
    assert b'"affinity_revoked": true' in sent


def test_a_new_term_forgets_revoked_tags_that_are_through(
    bench: Bench, operator: OperatorScripts
) -> None:
    bench.lead()
    bench.send("a", 1)
    bench.send("b", 1)
    bench.admit_all()
    for tag in "ab":
        operator.revoke_tag("q", tag)
    operator.purge_tag("q", "t", "b", 100, 100)
    bench.lead()
    assert bench.client.hkeys(bench.queue_key("gone")) == [b"a"]
    assert conf(bench)["revoked"] == "1"
    operator.purge_tag("q", "u", "a", 100, 100)
    bench.lead()
    assert "revoked" not in conf(bench)


# What is noted


def test_changes_are_kept_once_and_the_latest_two_hundred(
    bench: Bench, operator: OperatorScripts
) -> None:
    for number in range(205):
        assert operator.note(f"t{number}", json.dumps({"n": number})[:-1])
    assert not operator.note("t204", json.dumps({"n": 204})[:-1]), "a lost reply"
    found = [json.loads(c) for c in bench.client.lrange(bench.scripts.keys.prefix + "changes", 0, -1)]
    assert [one["n"] for one in found] == list(range(204, 4, -1))
    assert abs(found[0]["at"] - bench.now_ms()) < 60_000


def test_an_unused_operators_console_costs_the_ways_of_a_task_nothing(
    bench: Bench, operator: OperatorScripts
) -> None:
    """The commands of a start and a settle, counted on the server: the same before and after."""
    bench.lead()
    node = bench.node("n")

    def commands(tag: str) -> int:
        bench.send(tag, 1, 2, 3)
        bench.admit_all()
        copy = node.take()
        before = _calls(bench)
        copy.run()
        after = _calls(bench)
        node.drain_all()
        return after - before

    commands("warm up")
    first = commands("a")
    operator.pause_tag("q", "x")
    operator.resume_tag("q", "x")
    operator.pause("q")
    bench.scripts.resume("q")
    operator.limit("q", "x", 3, "set")
    operator.limit("q", "x", 1, "default")
    operator.move("q", "b", "n", 60)
    commands("b")
    assert commands("c") == first


def _calls(bench: Bench) -> int:
    return sum(stat["calls"] for stat in bench.client.info("commandstats").values())


def test_a_page_of_a_pause_that_comes_after_the_resume_does_not_pause_again(
    bench: Bench, operator: OperatorScripts
) -> None:
    bench.lead()
    operator.pause("q")
    bench.scripts.resume("q")
    assert operator._call("pause", "q", "17") == [b"0", 0]
    assert "paused" not in conf(bench)


# What is read


@pytest.fixture
def app(bench: Bench, shared_server: Server, namespace: str) -> Affinity:
    app = Celery("reads", broker=shared_server.url(), set_as_current=False)
    return Affinity(app, queues=[AffinityQueue("q")], namespace=namespace)


def test_pages_of_tags_follow_each_other_without_gap_or_repeat(
    bench: Bench, operator: OperatorScripts, app: Affinity
) -> None:
    bench.lead()
    bench.node("n", slots=3)
    for number in range(20):
        bench.send(f"t{number}", 1)
    bench.admit_all()
    for number in (17, 18, 19):
        operator.pause_tag("q", f"t{number}")
    pages = [app.tags("q", 4, skip=skip) for skip in range(0, 24, 4)]
    found = [record for page in pages for record in page]
    assert [record.tag for record in found[:17]] == [
        *sorted(record.tag for record in found[:3]), *[f"t{n}" for n in range(3, 17)]
    ]  # fmt: skip
    assert sorted(record.tag for record in found) == sorted(f"t{n}" for n in range(20))
    assert [bool(record.slots) for record in found[:4]] == [True, True, True, False]
    assert [record.place for record in found[3:6]] == [1, 2, 3]
    assert {record.halted for record in found[-3:]} == {("pause",)}
    assert pages[-1] == []


def test_the_longest_backlogs_are_found_among_many_short_ones(bench: Bench, app: Affinity) -> None:
    bench.lead()
    for number in range(50):
        bench.send(f"short-{number}", 1)
    bench.send("long", *range(33))
    bench.send("longest", *range(70))
    bench.admit_all()
    found = app.top_tags("q", 3)
    assert [(r.tag, r.waiting) for r in found[:2]] == [("longest", 70), ("long", 33)]
    assert len(found) == 3
    node = bench.node("n")
    while len(bench.backlog("longest")) > 20:
        node.take().run()
    top = {record.tag: record.waiting for record in app.top_tags("q", 3)}
    assert top["longest"] == len(bench.backlog("longest")), "lengths are those of now"


def test_an_explanation_names_what_a_tag_waits_for(
    bench: Bench, operator: OperatorScripts, app: Affinity
) -> None:
    bench.send("a", 1, 2)
    bench.lead(ordered=600_000)
    bench.admit_all()
    assert app.explain("a").obstacles == ("no worker is registered; start one",)
    node = bench.node("n")
    copy = node.take()
    (hold,) = app.explain("a").holds
    assert (hold.worker, hold.slot, hold.task_id, hold.running_seconds) == ("n@test", 0, "a-1", None)
    copy.start()
    (hold,) = app.explain("a").holds
    assert (hold.entry, hold.running_seconds is not None) == (1, True)
    copy.settle("done", bench.retry_of(copy), bench.now_ms() + 500_000)
    (retry,) = app.explain("a").obstacles
    assert re.fullmatch(r"waits for the retry at its head, due in (500.0|49\d.\d) s", retry)
    assert app.explain("a").last_slot == "n@test slot 0"
    operator.pause("q")
    assert app.explain("a").obstacles[1:] == ("queue paused; `celery affinity resume --queue q`",)
    operator.revoke_tag("q", "a")
    assert any("revoked" in text for text in app.explain("a").obstacles)
    bench.scripts.resign("q", bench.fence)
    assert any("nobody schedules" in text for text in app.explain("a").obstacles)
    assert not app.explain("unknown").known


def test_a_tag_whose_limit_is_lowered_while_it_waits_for_more_gets_no_other_slot(
    bench: Bench, operator: OperatorScripts
) -> None:
    bench.lead(concurrency=3)
    node = bench.node("n", depth=2)
    bench.send("a", *range(4))
    bench.admit_all()
    assert node.take().start() == 1  # the tag waits in the ring for a second slot
    assert operator.limit("q", "a", 1, "set")[0]
    other = bench.node("m")
    assert other.receive() is None


# what the next leader's configuration changes


def test_a_limit_raised_by_configuration_opens_no_slot_past_an_entry_that_has_not_started(
    bench: Bench,
) -> None:
    bench.lead()
    one, two = bench.node("n1", depth=2), bench.node("n2", depth=2)
    bench.send("a", *range(5))
    bench.admit_all()
    first, second = one.take(), one.take()
    assert first.start() == 1
    bench.configure(concurrency=2)
    bench.send("a", 5)
    bench.admit_all()
    assert two.receive() is None, "a-1 is out and has not started"
    assert first.settle() == "held"
    assert two.receive() is None
    assert second.start() == 1
    assert second.settle() == "held", "everything that the slot had out as the only one has ended"
    third = one.take()
    assert third.start() == 1
    fourth = two.take()
    assert (third.id, fourth.id) == ("a-2", "a-3"), "now it has two slots"


def test_a_limit_lowered_by_configuration_holds_for_what_is_dispatched_then(bench: Bench) -> None:
    bench.lead(concurrency=2)
    one, two = bench.node("n1", depth=2), bench.node("n2", depth=2)
    bench.send("a", *range(6))
    bench.admit_all()
    first = one.take()
    assert first.start() == 1
    second = two.take()
    assert second.start() == 1
    bench.configure(concurrency=1)
    assert first.settle() == "batch", "two slots are one too many"
    assert one.receive() is None
    assert second.settle() == "held"
    third = two.take()
    assert (third.id, third.start()) == ("a-2", 1)
    assert one.receive() is None
